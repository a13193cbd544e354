// The mailbox: one warp of rank 0's block 0 talks to the host and decides what every step computes. It reads descriptors from mapped
// host memory, keeps the slots, publishes each step's plan to all ranks one step ahead, and writes the tokens back. It runs beside
// the compute: nothing waits for it but the plan after next.
//
// The plan of step s + 1 leaves before the tokens of s are known. A sequence that ends at s therefore has one more row in s + 1, a
// ghost: computed, its token dropped here, its k and v written to a position of its own that nobody reads. Its slot and pages go
// back to the host (RELEASE) when the last step with a row of it is done.
#pragma once
#include "kv.cuh"
#include "logprobs.cuh"
#include "plan.cuh"
#include "rings.cuh"
#include "search.cuh"

namespace imex {

struct SlotState {
  u32 active;  // 0: free; 1: running; 2: ended, waiting for its last step
  u32 request, arena, prompt_len, max_tokens, min_tokens, num_stop;
  u32 next_position;  // the next position to plan
  u32 num_planned;    // tokens whose row is planned
  u32 num_emitted;
  u32 last_step, last_row;  // the last planned step with a row of this slot, and that row (its last)
  u32 last_token;           // sampled by it, once that step is done
  u32 finish;
  u32 ticket;                  // admission order
  u32 draw;                    // which rows are not plainly greedy
  u32 sampling, num_logprobs;  // offset of struct Sampling in the arena; LOGPROB records before each token
  u32 stop[kMaxStopIds];
};

struct PlannedRow {
  u32 slot, position, samples, draws, from_row;  // from_row: token source, or kArenaToken / kKnownToken
};
constexpr u32 kArenaToken = ~0u;
constexpr u32 kKnownToken = ~1u;

struct MailboxState {
  u32 line[kLineWords];  // the last descriptor taken
  SlotState slots[kHeldSlots];
  PlannedRow planned[2][kHeldRows];  // by step parity
  u32 num_planned[2];
  u32 num_sampling, num_drawing;
};
static_assert(sizeof(MailboxState) <= kMailboxBytes, "raise kMailboxBytes in block.cuh");

constexpr u64 kHostSilenceNs = 30000000000ull;  // a host whose heartbeat stops for so long is gone

// Page tables written for new requests: in which plan their readers are told (publish_plan). In order of haste.
enum class NewTables : u32 { kNone, kPlanAfterNext, kNextPlan };

struct MailboxWarp {
  const RankParams* params;
  Shared* shared;
  MailboxState* state;
  Rings rings;
  int lane;
  u32 done, published;  // steps whose tokens were handled, plans published
  u32 tickets;
  u32 heartbeat;  // the host's, and when it last changed
  u64 heard_ns;
  u32 next_align;    // trace.cuh
  u32 unpolled = 0;  // steps that ended since the ring was last looked at
  u32 turn = 0;      // the slot that is dealt a row first (choose_rows)
  NewTables new_tables = NewTables::kNone;
  // Of the last request admitted: token number fresh_position + lane, page number 0, and whether its arena is still to be read.
  u32 fresh_slot = ~0u, fresh_position, fresh_token, fresh_page;
  bool unread = false;
};

// ---------------------------------------------------------------------------------------------- descriptors
DEV void release_if_over(MailboxWarp& m, SlotState& slot) {
  if (slot.active != 2 || (slot.last_step != ~0u && slot.last_step >= m.done)) return;
  slot.active = 0;
  fence_sys();  // all lanes' reads of the request's arena (since then: warp_sync) come before the host hears that it may write there
  write_record(m.rings, Record::kRelease, slot.request, 0, slot.num_emitted, (Finish)slot.finish);
}
DEV void cancel(MailboxWarp& m, u32 request) {
  ROLLED for (u32 i = 0; i < shape().num_slots; i++) {
    SlotState& slot = m.state->slots[i];
    if (slot.active != 1 || slot.request != request) continue;
    slot.active = 2;
    slot.finish = (u32)Finish::kCancelled;
    release_if_over(m, slot);
  }
}
DEV void fill_slot(SlotState& slot, const Descriptor& d, u32 ticket) {
  slot.request = d.request;
  slot.arena = d.arena;
  slot.prompt_len = d.prompt_len;
  slot.max_tokens = d.max_tokens;
  slot.min_tokens = d.min_tokens;
  slot.num_stop = smaller(d.num_stop, kMaxStopIds);
  slot.next_position = d.cached_len;
  slot.num_planned = slot.num_emitted = 0;
  slot.last_step = ~0u;
  slot.finish = (u32)Finish::kNone;
  slot.ticket = ticket;
  slot.draw = d.draw;
  slot.sampling = d.arena + d.prompt_len + d.num_pages + d.num_stop;
  slot.num_logprobs = smaller(d.num_logprobs, 1 + kMaxLogprobs);
  slot.active = 1;
}
// All lanes write a new request's page table in every rank, whole: all its pages are reserved. Only this warp writes page tables; the
// producers of all ranks read them (find_page, kv.cuh). Nobody reads this slot's now: the last step with a row of its last request is
// done, so every block has sent the word that follows its copies, and the next step with a row of it is planned after this.
// Words order nothing but themselves, so the other direction takes two fences: in publish_plan, between the stores of all lanes and the
// header of a plan that says kPlanNewPages; and by whoever reads such a header, before its block's producer goes on (begin_step).
// A request that begins at position 0 can wait for that until its second step: in the first one, every page it attends to is that of a
// row of the same step, and comes with the plan. So the fence is not on the way to its first token, and where that step has one row of it, nor
// is the table; where that row is all that it has, nobody will look and there is none.
DEV void write_page_table(MailboxWarp& m, const Descriptor& d, NewTables told) {
  constexpr int kBatch = 4;  // reads of host memory under way
  const u32* pages = arena_of(m.rings) + d.arena + d.prompt_len;
  ROLLED for (u32 base = m.lane; base < d.num_pages; base += kBatch * LANES) {
    u32 page[kBatch];
    UNROLL for (int i = 0; i < kBatch; i++) page[i] = load_relaxed_sys(pages + smaller(base + i * LANES, d.num_pages - 1));
    ROLLED for (u32 rank = 0; rank < shape().world_size; rank++) {
      u32* table = page_table(m.params, rank) + d.slot * shape().pages_per_slot;
      UNROLL for (int i = 0; i < kBatch; i++)
        if (base + i * LANES < d.num_pages) store_global(table + base + i * LANES, page[i]);
    }
  }
  if (told > m.new_tables) m.new_tables = told;
}
DEV void acknowledge(MailboxWarp& m, const Descriptor& d) { write_record(m.rings, Record::kAck, d.request, d.sequence, 0, Finish::kNone); }
// Acknowledges the last descriptor, a request's, and all lanes read what it speaks of, in one round trip: stop token ids, the first steps' tokens, and
// page ids.
DEV void read_arena(MailboxWarp& m, NewTables told) {
  constexpr int kStops = (kMaxStopIds + LANES - 1) / LANES;
  const Descriptor& d = *(const Descriptor*)m.state->line;
  SlotState& slot = m.state->slots[d.slot];
  if (m.lane == 0) acknowledge(m, d);
  // The host fenced between the rest and the line, and lanes saw the line by relaxed loads: an acquire is what is missing, and unlike
  // fence_sys it waits for none of the stores under way, such as the ACK. warp_sync makes it every lane's.
  fence_acquire_sys();  // the descriptor was seen: now what the host wrote before it is, too
  warp_sync();
  const u32* prompt = arena_of(m.rings) + d.arena;
  const u32 num_stop = smaller(d.num_stop, kMaxStopIds);
  u32 stop[kStops];
  UNROLL for (int j = 0; j < kStops; j++)
    stop[j] = m.lane + j * LANES < num_stop ? load_relaxed_sys(prompt + d.prompt_len + d.num_pages + m.lane + j * LANES) : 0;
  m.fresh_token = load_relaxed_sys(prompt + smaller(d.cached_len + m.lane, d.prompt_len - 1));
  if (told == NewTables::kPlanAfterNext || slot.num_planned < slot.max_tokens) write_page_table(m, d, told);  // else its only step has left
  UNROLL for (int j = 0; j < kStops; j++)
    if (m.lane + j * LANES < num_stop) slot.stop[m.lane + j * LANES] = stop[j];
  m.unread = false;
  warp_sync();
}
// All lanes. The line itself has what a first step of one row needs: its plan leaves before the arena is read (publish_plan).
DEV void admit(MailboxWarp& m, const Descriptor& d) {
  if (m.lane == 0) fill_slot(m.state->slots[d.slot], d, m.tickets++);
  m.fresh_slot = d.slot;
  m.fresh_position = d.cached_len;
  m.fresh_token = d.first_token;
  m.fresh_page = d.first_page;
  m.unread = true;
  if (d.cached_len) read_arena(m, NewTables::kNextPlan);
}
// Does what the line in `state` asks for; all lanes.
DEV void take_descriptor(MailboxWarp& m) {
  const Descriptor& d = *(const Descriptor*)m.state->line;
  if (d.command == (u32)Command::kSubmit) return admit(m, d);
  if (m.lane != 0) return;
  if (d.command == (u32)Command::kCancel) cancel(m, d.request);
  acknowledge(m, d);
}

// ---------------------------------------------------------------------------------------------- steps
// Whether a row is not plainly greedy: then its struct Sampling travels beside the plan (sampling.cuh).
DEV bool draws(const SlotState& slot, u32 position) {
  if (slot.draw == (u32)Draw::kAll || position + 1 < slot.prompt_len) return slot.draw == (u32)Draw::kAll;
  return slot.draw == (u32)Draw::kSampled || (slot.draw == (u32)Draw::kMasked && position + 1 - slot.prompt_len < slot.min_tokens);
}
// The slot of the prompt that has waited longest, of those with this ticket or a later one; ~0u: there is none.
DEV u32 oldest_prompt(const MailboxState& s, u32 ticket) {
  u32 best = ~0u;
  ROLLED for (u32 i = 0; i < shape().num_slots; i++) {
    const SlotState& slot = s.slots[i];
    if (slot.active != 1 || slot.next_position >= slot.prompt_len || slot.ticket < ticket) continue;
    if (best == ~0u || slot.ticket < s.slots[best].ticket) best = i;
  }
  return best;
}
// Lane 0 fills `planned` for step m.published. Returns the number of rows.
//
// Rows are dealt one at a time, in turn, to each sequence that decodes and to the oldest prompt; what is left then goes to prompts, the
// oldest first. Where there are as many rows as slots everybody has a row in every step: a prompt never costs a sequence one, and a
// gap between two tokens is one step of at most max_rows rows. With more slots than rows the next step's dealing goes on where this
// one's ended, so nobody waits for more than ceil(num_slots / max_rows) steps, a prompt no more than a sequence that decodes: without a
// turn of its own it would wait as long as others fill the step. Prompts share one turn, not one each: however many wait, sequences that
// decode lose no more by them, and the first to come is answered first. The order of a step's rows, and which step a row is in, change
// none of its bits.
DEV u32 choose_rows(MailboxWarp& m) {
  MailboxState& s = *m.state;
  const u32 step = m.published, prompt = oldest_prompt(s, 0), first = m.turn;
  PlannedRow* rows = s.planned[step & 1];
  u32 count = 0, dealt = 0;  // rows of `planned`; with the prompt's, which come last to be neighbours
  s.num_sampling = s.num_drawing = 0;
  auto add = [&](SlotState& slot, u32 index, u32 source) {
    PlannedRow& row = rows[count];
    row.slot = index;
    row.position = slot.next_position++;
    row.samples = row.position + 1 >= slot.prompt_len;
    row.draws = draws(slot, row.position);
    row.from_row = source;
    slot.last_step = step;
    slot.last_row = count++;
    slot.num_planned += row.samples;
    s.num_sampling += row.samples;
    s.num_drawing += row.draws;
  };
  m.turn = 0;
  ROLLED for (u32 i = 0; i < shape().num_slots; i++) {
    const u32 index = (first + i) % shape().num_slots;
    SlotState& slot = s.slots[index];
    if (index != prompt) {
      if (slot.active != 1 || slot.next_position < slot.prompt_len || slot.num_planned == slot.max_tokens) continue;
      add(slot, index, slot.last_step < m.done ? kKnownToken : slot.last_row);
    }
    if (++dealt < shape().max_rows) continue;
    m.turn = (index + 1) % shape().num_slots;
    break;
  }
  ROLLED for (u32 next = dealt > count ? prompt : ~0u; next != ~0u && count < shape().max_rows;) {
    SlotState& slot = s.slots[next];
    while (count < shape().max_rows && slot.next_position < slot.prompt_len) add(slot, next, kArenaToken);
    next = oldest_prompt(s, slot.ticket + 1);
  }
  s.num_planned[step & 1] = count;
  return count;
}
// All lanes fetch their rows' tokens and pages, and store them to every rank. Those of the last request admitted are here.
DEV void publish_plan(MailboxWarp& m, u32 rows, Command command) {
  const u32 step = m.published, epoch = plan_epoch(step);
  if (m.unread && m.state->slots[m.fresh_slot].next_position > 1) read_arena(m, NewTables::kPlanAfterNext);  // the step has more rows of it
  const bool new_pages = m.new_tables == NewTables::kNextPlan;
  if (new_pages) {
    warp_sync();
    fence_ranks();  // all lanes' parts of page tables, before lane 0's header that tells of them: so after they met
  }
  m.new_tables = m.new_tables == NewTables::kPlanAfterNext ? NewTables::kNextPlan : NewTables::kNone;
  const u32* tables = page_table(m.params, m.params->rank);  // all entries are this warp's own stores
  ROLLED for (u32 base = 0; base < shape().max_rows; base += LANES) {  // all lanes together: they shuffle
    const u32 r = base + m.lane;
    const PlannedRow& row = m.state->planned[step & 1][r < rows ? r : 0];
    const u32 after = row.position - m.fresh_position;
    const bool fresh = row.slot == m.fresh_slot && after < LANES;
    const u32 fresh_token = shuffle(m.fresh_token, after % LANES);
    u32 token = 0, position = 0, where = 0, page = 0;
    if (r < rows) {
      const SlotState& slot = m.state->slots[row.slot];
      position = row.position;
      where = row.slot | (row.samples ? kRowSamples : 0) | (row.draws ? kRowDraws : 0);
      page = row.slot == m.fresh_slot && !position ? m.fresh_page
                                                   : load_global(tables + row.slot * shape().pages_per_slot + position / shape().page_size);
      token = row.from_row == kKnownToken    ? slot.last_token
              : row.from_row != kArenaToken ? kTokenFromRow | row.from_row
              : fresh                       ? fresh_token
                                            : load_relaxed_sys(arena_of(m.rings) + slot.arena + position);
    }
    ROLLED for (u32 rank = 0; r < shape().max_rows && rank < shape().world_size; rank++) {
      u64* to = (u64*)m.params->peers[rank] + plan_offset(step) + kPlanHeaderWords + r * kPlanRowWords;
      store_words(to, token, position, epoch);
      store_words(to + 2, where, page, epoch);
    }
  }
  if (m.lane == 0) {
    const u32 aligns = rows && plan_aligns(step, m.published == m.done, m.next_align) ? kPlanAligns : 0;
    const u32 kinds = rows ? m.state->num_sampling | m.state->num_drawing << 16 | aligns : 0;
    ROLLED for (u32 rank = 0; rank < shape().world_size; rank++)
      store_words((u64*)m.params->peers[rank] + plan_offset(step), rows | (u32)command << 16 | (new_pages ? kPlanNewPages : 0), kinds, epoch);
  }
  if (m.unread) read_arena(m, NewTables::kNextPlan);  // this one has left
  constexpr u32 kPairs = kSamplingWords / 2;  // the rest is read after the LM head: the step need not wait for it to begin
  ROLLED for (u32 i = m.lane; i < rows * kPairs && m.state->num_drawing; i += LANES) {
    const PlannedRow& row = m.state->planned[step & 1][i / kPairs];
    if (!row.draws) continue;
    const u32* from = arena_of(m.rings) + m.state->slots[row.slot].sampling + i % kPairs * 2;
    const u32 first = load_relaxed_sys(from), second = load_relaxed_sys(from + 1);
    ROLLED for (u32 rank = 0; rank < shape().world_size; rank++)
      store_words((u64*)m.params->peers[rank] + sampling_offset(step) + 2 * i, first, second, epoch);
  }
  m.published++;
}
// Lane 0 hands the tokens of step m.done to the host and ends what ends.
DEV void finish_step(MailboxWarp& m) {
  MailboxState& s = *m.state;
  const u32 parity = m.done & 1;
  ROLLED for (u32 r = 0; r < s.num_planned[parity]; r++) {
    const PlannedRow& row = s.planned[parity][r];
    SlotState& slot = s.slots[row.slot];
    if (!row.samples || slot.active != 1) continue;
    const u32 token = m.shared->tokens[parity][r];
    const u32* of_row = (const u32*)m.params->logprobs + (parity * shape().max_rows + r) * kLogprobRowWords;
    ROLLED for (u32 i = 0; i < slot.num_logprobs; i++, of_row += kLogprobWords)  // written before step_end by this block
      write_record(m.rings, Record::kLogprob, slot.request, load_global(of_row), load_global(of_row + 2), (Finish)load_global(of_row + 1));
    slot.last_token = token;
    u32 finish = (u32)Finish::kNone;
    if (slot.num_emitted >= slot.min_tokens)
      ROLLED for (u32 i = 0; i < slot.num_stop; i++)
        if (slot.stop[i] == token) finish = (u32)Finish::kStop;
    if (finish == (u32)Finish::kNone && slot.num_emitted + 1 == slot.max_tokens) finish = (u32)Finish::kLength;
    write_record(m.rings, Record::kToken, slot.request, token, slot.num_emitted++, (Finish)finish);
    if (finish != (u32)Finish::kNone) slot.active = 2, slot.finish = finish;
  }
  m.done++;
  ROLLED for (u32 i = 0; i < shape().num_slots; i++) release_if_over(m, s.slots[i]);
  store_relaxed_sys(&m.rings.host->header.steps, m.done);
}

// Steps are counted in 32 bits: two weeks at 0.3 ms each. The step after the last is never planned.
constexpr u32 kLastStep = 0xfffffffeu;

// Whether the kernel must end without being asked in the ring: another block gave up, the host says stop, or the host is gone.
DEV bool must_abort(MailboxWarp& m) {
  if (aborted(m.params)) return true;
  if (m.done >= kLastStep) {
    m.shared->fault = {1, 0, 0, (u32)Wait::kCount, kLastStep, m.done, 0, m.params->rank};
    fence_sys();  // the note, before the consumers see the abort word and look for it
    raise_abort(m.params);
    return true;
  }
  const u32 beat = load_relaxed_sys(&m.rings.host->header.heartbeat);
  const u64 now = timer_ns();
  if (beat != m.heartbeat) m.heartbeat = beat, m.heard_ns = now;
  if (!load_relaxed_sys(&m.rings.host->header.stop) && now - m.heard_ns < kHostSilenceNs) return false;
  raise_abort(m.params);
  return true;
}

DEV bool all_free(const MailboxWarp& m) {
  ROLLED for (u32 i = 0; i < shape().num_slots; i++)
    if (m.state->slots[i].active) return false;
  return true;
}

enum class News : u32 { kNone, kDescriptor, kStepEnd, kCheck };
constexpr u32 kMaxUnpolled = 4;  // so that cancels, and words to stop, are seen even if a step has always ended by the time of the next look

// Looks until there is something to do, or only `once`; all lanes. While a step runs, mostly for its end: a descriptor that comes then waits
// for the plan after next anyway, and its poll would hold up the tokens for a round trip to the host.
DEV News await_news(MailboxWarp& m, bool once) {
  ROLLED for (;;) {
    mailbox_pause();
    bool ended = false;
    if (m.lane == 0 && m.done < m.published)
      ROLLED for (int i = 0; i < kTestsPerPoll && !ended; i++) ended = mbar_test_now({&m.shared->step_end[m.done & 1], m.done >> 1 & 1});
    if (shuffle(ended, 0) && ++m.unpolled < kMaxUnpolled) return News::kStepEnd;
    m.unpolled = 0;  // an end that is put off is found by the next test
    if (poll_descriptor(m.rings, m.state->line)) return News::kDescriptor;
    if (m.rings.num_polls >= kPollsPerCheck) return News::kCheck;
    if (once) return News::kNone;
  }
}

// Rank 0's block 0, the last warp. Lane 0 decides; the others help to read lines and to publish plans.
DEV void run_mailbox(Block& b) {
  MailboxState* state = (MailboxState*)b.shared->mailbox;
  MailboxWarp m = {b.params, b.shared, state, {(Mailbox*)b.params->mailbox, b.lane, 1, 1}, b.lane, 0, 0, 0, 0, timer_ns()};
  ROLLED for (u32 i = b.lane; i < kHeldSlots; i += LANES) state->slots[i].active = 0;
  ROLLED for (u32 i = b.lane; i < 2; i += LANES) state->num_planned[i] = 0;
  warp_sync();
  if (m.lane == 0) store_release_sys(&m.rings.host->header.resident, 1);
  enum { kGoOn, kLeave, kAbort };
  bool leaving = false;
  ROLLED for (News news = News::kNone;;) {
    if (news == News::kStepEnd && m.lane == 0) finish_step(m);
    if (news == News::kDescriptor) {
      take_descriptor(m);
      leaving |= ((const Descriptor*)state->line)->command == (u32)Command::kShutdown;
    }
    u32 rows = 0, end = kGoOn;
    if (m.lane == 0) {
      const bool may_publish = m.published <= m.done + 1 && m.published < kLastStep;  // every block has read its buffer's last plan
      if (may_publish && has_room(m.rings)) rows = choose_rows(m);
      if (may_publish && leaving && all_free(m)) end = kLeave;
      if (m.rings.num_polls >= kPollsPerCheck && must_abort(m)) end = kAbort;
    }
    if (m.rings.num_polls >= kPollsPerCheck) m.rings.num_polls = 0;
    rows = shuffle(rows, 0);
    end = shuffle(end, 0);
    warp_sync();  // lane 0's choice of rows, before every lane publishes
    if (end == kAbort) break;
    if (rows) publish_plan(m, rows, Command::kNone);
    else if (m.unread) read_arena(m, NewTables::kPlanAfterNext);  // the next line takes this one's place
    if (end == kLeave) {
      publish_plan(m, 0, Command::kShutdown);
      break;
    }
    warp_sync();  // before lane 0 chooses again
    news = await_news(m, rows);  // having published, it may publish one more: but who has come meanwhile should be in it
  }
  if (m.lane == 0) store_release_sys(&m.rings.host->header.resident, 2);
}

}  // namespace imex
