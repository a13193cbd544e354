"""More planted bugs, of what crosses blocks and ranks: words, epochs, the exchange, claims, the KV rule, the mailbox, faults."""

from __future__ import annotations

from .mutations import BLOCK, DRILL, RING, TSAN, WARP, Mutation, gone, one

IDLE = (
    "DEV void push_units(Block& b, Producer& p, const Matrix& m) {\n",
    "DEV void push_units(Block& b, Producer& p, const Matrix& given) {\n  Matrix m = given;\n"
    "  if (m.num_blocks > 1 && m.index == --m.num_blocks) m.index = m.units;\n",
)
IDLE_CLAIMS = ("i < kClaims && per_use; i++)", "i < kClaims && per_use && m.index < m.units; i++)")
ADMIT = "  fence_acquire_sys();  // the descriptor was seen: now what the host wrote before it is, too\n"
SYNC_RENEW = "  consumer_sync();\n  ROLLED for (u32 r ="
WORDS = (
    one("one_epoch_for_all_layers", "words of the layer before are taken for this one's", "block.cuh",
        "renew_steps * epochs_per_step() + layer + 1", "renew_steps * epochs_per_step() + 1"),
    one("epochs_repeat", "words of two steps ago are taken for this step's", "block.cuh",
        "return step % shape().renew_steps *", "return (step & 1) *"),
    one("epoch_zero", "zeroed memory is taken for words", "block.cuh", "epochs_per_step() + layer + 1", "epochs_per_step() + layer"),
    one("down_awaits_this_layer", "qkv waits for the wrong epoch", "decode.cu",
        "down_exchange(), layer - 1, multiplies", "down_exchange(), layer, multiplies"),
    one("one_plan_buffer", "a plan is overwritten before every block has read it", "plan.cuh",
        "(step & 1) * plan_width()", "0 * plan_width()"),
    one("one_sum_buffer", "down sums overwrite o sums that a late block still reads", "exchange.cuh",
        "shape().off_down_part, shape().off_down_sum", "shape().off_down_part, shape().off_o_sum"),
    Mutation("block_without_a_unit", "condition C: one block publishes nothing in any matrix phase (as with grid > hidden / 8)",
             (("stream.cuh", *IDLE), ("stream.cuh", *IDLE_CLAIMS))),
    one("claims_start_elsewhere", "the claims of a use are counted from the wrong base", "phases/qkv.cuh",
        "b.step / 2", "(b.step + 1) / 2"),
    one("lm_head_claims_by_step", "the LM head's counter is taken to be used in every step", "decode.cu",
        "lm_head_matrix(b, with_logits)", "lm_head_matrix(b, b.step / 2)"),
    one("last_layer_claims_by_step", "the counters of the last layer after o_proj are taken to be used in every step", "decode.cu",
        "b.waiter.layer + 1 < shape().num_layers ? b.step / 2 : with_logits", "b.step / 2"),
)  # fmt: skip
KV = (
    one("kv_writer_without_proxy_fence", "pages are written, but not for the async proxy", "phases/lm_head.cuh",
        "fence_async_global();  // the KV rule: this block's", "// the KV rule: this block's"),
    one("kv_writer_without_fence", "a block's word overtakes its pages", "phases/lm_head.cuh",
        "    fence_step();\n", ""),
    one("kv_reader_without_fence", "words of `sample` make nothing else fresh", "phases/sample.cuh",
        "  fence_step();\n  if (!all_well(b)) return false;", "  if (!all_well(b)) return false;"),
    one("kv_reader_without_proxy_fence", "copies through the async proxy read old pages", "decode.cu",
        "fence_async_global();  // the KV rule's last link", "// the KV rule's last link"),
    one("table_reader_without_fence", "page tables are read before this block has to see them", "plan.cuh",
        "if (pair == 0 && words[0][0] & kPlanNewPages) fence_ranks();", "", **DRILL),
    one("table_writer_without_fence", "a plan overtakes the page table of its rows", "mailbox.cuh",
        "    fence_ranks();  // all lanes' parts of page tables", "    // all lanes' parts of page tables", **DRILL),
    one("table_fence_of_a_gpu", "wrong scope: what other ranks' blocks read of a table is not ordered by fences of their GPUs", "block.cuh",
        "shape().world_size > 1 ? fence_sys() : fence_gpu()", "fence_gpu()", **DRILL),
    one("table_never_told", "no plan tells of the page table of a prompt from position 0", "mailbox.cuh",
        "m.new_tables == NewTables::kPlanAfterNext ? NewTables::kNextPlan : NewTables::kNone;", "NewTables::kNone;", **DRILL),
    Mutation("append_before_o_proj", "pages are written while other blocks' copies of them are in flight",
             (("decode.cu", "    if (phase == Phase::kGateUp) append_kv(b), clear_set(b);\n",
               "    if (phase == Phase::kQkv) append_kv(b);\n    if (phase == Phase::kGateUp) clear_set(b);\n"),), **TSAN),
    gone("page_without_proxy_fence", "a bulk copy into a stage is not ordered after what this step put into its page",
         "phases/attention.cuh", "    if (passed == 0) fence_async_shared();  // what this thread put into pages, before a later copy\n"),
    one("tail_without_care", "what is beyond a row's position is cleared together with what may just have been put", "phases/attention.cuh",
        "if (keep == 2 * j + 1) *(u16*)(piece + 8 * j + 2) = *(u16*)(piece + 8 * j + 6) = 0;",
        "if (keep == 2 * j + 1) *(u64*)(piece + 8 * j) &= 0xffff0000ffffull;", **TSAN),
)  # fmt: skip
BARE = (
    one("sets_never_cleared", "bare words of a step ago are taken for this one's", "bare.cuh", "at < chunks; at +=", "at < 0; at +="),
    one("set_cleared_early", "bare words are cleared before a late block has read them", "decode.cu",
        "    if (phase == Phase::kQkv && !attention(b)) return false;\n",
        "    if (phase == Phase::kQkv) clear_set(b);\n    if (phase == Phase::kQkv && !attention(b)) return false;\n"),
    one("one_set_too_few", "a set is used again before the end of a step says that it is cleared", "bare.cuh",
        "return shape().num_layers + 1;", "return shape().num_layers;"),
    one("rows_of_the_last_step", "rows that only the step before had are not cleared", "bare.cuh",
        "b.waiter.layer ? b.shared->num_rows : b.shared->last_rows", "b.shared->num_rows"),
    one("two_zeros_as_zero", "a pair of zeros is sent as a place that is clear", "bare.cuh", "pair ? pair : kTwoZeros", "pair"),
)  # fmt: skip
MAILBOX = (
    one("two_steps_ahead", "a plan overwrites one that is not read yet", "mailbox.cuh",
        "m.published <= m.done + 1", "m.published <= m.done + 2"),
    one("step_not_awaited", "tokens are handed out before they are sampled", "mailbox.cuh",
        "mbar_test_now({&m.shared->step_end[m.done & 1], m.done >> 1 & 1})", "true"),
    Mutation("one_token_buffer", "tokens of the next step overwrite those the mailbox still reads",
             (("phases/sample.cuh", "tokens[b.step & 1][row]", "tokens[0][row]"), ("plan.cuh", "tokens[(b.step & 1) ^ 1]", "tokens[0]"),
              ("mailbox.cuh", "m.shared->tokens[parity][r]", "m.shared->tokens[0][r]")), **TSAN),
    one("record_tagged_early", "words of a record carry its number before they have what they are to say", "rings.cuh",
        "  store_words((u64*)&r->token, token, index, sequence);\n", "  store_words((u64*)&r->token, 0, 0, sequence);\n"
        "  store_words((u64*)&r->token, token, index, sequence);\n", **DRILL),
    gone("admit_without_fence", "the prompt is read before the descriptor that speaks of it", "mailbox.cuh", ADMIT, **DRILL),
    one("admit_with_gpu_fence", "wrong scope: what the host wrote is not ordered by a fence of the GPU", "mailbox.cuh",
        ADMIT, ADMIT.replace("_acquire_sys", "_gpu"), **DRILL),
    gone("arena_left_unread", "the next descriptor takes a line's place before the arena that it speaks of is read", "mailbox.cuh",
         "    else if (m.unread) read_arena(m, NewTables::kPlanAfterNext);  // the next line takes this one's place\n"),
    one("rows_before_their_arena", "a first step's further rows are planned before the arena is read", "mailbox.cuh",
        "m.unread && m.state->slots[m.fresh_slot].next_position > 1", "false"),
    one("first_page_from_the_table", "a first page is looked up before the table is written", "mailbox.cuh",
        "row.slot == m.fresh_slot && !position ? m.fresh_page", "row.slot == m.fresh_slot && false ? m.fresh_page"),
    one("descriptor_not_checked", "half a line is taken for a descriptor", "rings.cuh",
        " || !check_fits(words, rings.lane)", "", **DRILL),
)  # fmt: skip
LEAVING = (
    gone("abort_not_looked_at", "a wait without a deadline outlives the kernel", "faults.cuh",
         "  if (aborted(params)) return true;\n", **DRILL),
    one("stage_counted_after_failure", "a producer that was held up waits for a stage that it never filled (was here once)",
        "stream.cuh", "if (!take_stage(b, p, unit)) return;\n  mbar_arrive(",
        "if (!take_stage(b, p, unit)) return pass_stage(p);\n  mbar_arrive("),
    Mutation("consumer_lane_by_lane", "lanes that give up leave the others at a collective (was here twice)",
             (("stream.cuh", "mbar_wait_warp(b.waiter, Wait::kTile, false, full, full2,",
               "mbar_wait(b.waiter, Wait::kTile, false, full, full2,"),
              ("stream.cuh", "mbar_wait_warp(b.waiter, Wait::kTile, false, full, also",
               "mbar_wait(b.waiter, Wait::kTile, false, full, also")),
             **DRILL),
    one("leaves_without_a_vote", "a block's warps do not leave together", "bare.cuh", "  return all_well(b);\n}\n",
        "  consumer_sync();\n  return !b.waiter.failed;\n}\n"),
)  # fmt: skip
RENEW = (
    one("renew_without_zeros", "epochs begin again and old words match them", "renew.cuh", "; meeting && pair <", "; false && pair <"),
    one("renew_without_first_meeting", "words are zeroed that a late block still waits for", "renew.cuh",
        "meeting = 0; meeting < 2", "meeting = 1; meeting < 2"),
    one("renew_without_second_meeting", "words of the next step are zeroed", "renew.cuh",
        "    if (meet(", "    if (meeting) break;\n    if (meet("),
    one("renew_without_barrier", "a block is at the meeting before all its zeros are", "renew.cuh", SYNC_RENEW, "  ROLLED for (u32 r ="),
    one("renew_with_one_set_of_words", "who is late at the first meeting finds the second's words", "renew.cuh",
        "meeting * shape().world_size", "0 * shape().world_size"),
)  # fmt: skip
MUTATIONS = {m.name: m for m in (*BLOCK, *WARP, *RING, *WORDS, *KV, *BARE, *MAILBOX, *LEAVING, *RENEW)}
QUICK = (  # of every group one; hand-picked for time
    "gather_without_barrier", "hand_over_without_warp_sync", "expect_too_few_bytes", "one_sum_buffer",
    "kv_reader_without_proxy_fence", "two_steps_ahead",
)  # fmt: skip
