// The plan of a step: which rows it has. Rank 0's mailbox publishes it as words to every rank, one step ahead, so that all ranks run
// the same rows and admission costs no latency; every block reads it here.
#pragma once
#include "deal.cuh"
#include "trace.cuh"

namespace imex {

DEV u32 plan_width() { return kPlanHeaderWords + kPlanRowWords * shape().max_rows; }
DEV u32 plan_offset(u32 step) { return shape().off_plan + (step & 1) * plan_width(); }

// Waits for the step's plan, for as long as nobody has a request. All consumers; false when the block must leave.
// Two buffers, by parity: the mailbox writes the plan of step s + 2 after its block passed `sample` of step s, which waited for a
// word of every block of every rank, and each block read plan s before anything else of that step.
DEV bool begin_step(Block& b) {
  b.waiter.phase = Phase::kEmbed;
  b.waiter.layer = 0;
  Shared& s = *b.shared;
  ROLLED for (u32 pair = b.thread; pair < plan_width() / 2; pair += kConsumerThreads) {
    u32 words[1][2];
    const u64* from = own_words(b, plan_offset(b.step) + 2 * pair);
    wait_words<1>(
        b.waiter, Wait::kPlan, true, plan_epoch(b.step), 1, [&](int) { return from; }, [&](int) { return 0u; }, words);
    if (pair == 0 && words[0][0] & kPlanNewPages) fence_ranks();  // page tables are seen by this block from its next barrier on
    s.plan[2 * pair] = words[0][0];
    s.plan[2 * pair + 1] = words[0][1];
  }
  if (!all_well(b)) return false;
  if (b.thread == 0) {
    s.last_rows = s.num_rows;
    s.num_rows = s.plan[0] & 0xffff;
    s.command = (s.plan[0] & ~kPlanNewPages) >> 16;
    s.num_sampling = s.plan[1] & 0xffff;
    s.num_drawing = (s.plan[1] & ~kPlanAligns) >> 16;
  }
  const int rows = s.plan[0] & 0xffff;
  ROLLED for (int r = b.thread; r < rows; r += kConsumerThreads) {
    const u32* words = s.plan + kPlanHeaderWords + r * kPlanRowWords;
    Row& row = s.rows[r];
    row.token = words[0] & kTokenFromRow ? s.tokens[(b.step & 1) ^ 1][words[0] & 0xff] : words[0];
    row.position = words[1];
    row.slot = words[2] & kRowSlot;
    row.flags = words[2];
    row.page = words[3];
    auto with = [&](int other) {  // of row r's slot
      return other >= 0 && other < rows && (s.plan[kPlanHeaderWords + other * kPlanRowWords + 2] & kRowSlot) == row.slot;
    };
    auto chunk = [&](int other) { return s.plan[kPlanHeaderWords + other * kPlanRowWords + 1] / kChunk; };
    int first = r;
    while (with(first - 1)) first--;
    row.first_row = first;
    row.runs = num_runs(row.position);
    row.together = 1;
    while (row.together < shape().attention_rows && with(r + row.together) && chunk(r + row.together) == chunk(r)) row.together++;
  }
  const int turns = shape().head_dim / 2;
  ROLLED for (int i = b.thread; i < rows * turns; i += kConsumerThreads) {
    const u32 position = s.plan[kPlanHeaderWords + i / turns * kPlanRowWords + 1];
    rope_rows(b)[i] = load_const((const float2*)b.params->rope + (u64)position * turns + i % turns);
  }
  consumer_sync();
  if (b.thread == 0) deal_items(b);  // the others look behind a barrier of `embed`, the producer behind the arrival
  consumers_arrive(b, &s.step_begin);
  if (!align_clocks(b)) return false;
  mark_clock(b, Mark::kClock);
  take_word_clocks(b);  // waiting for a plan is no part of the step
  return true;
}

}  // namespace imex
