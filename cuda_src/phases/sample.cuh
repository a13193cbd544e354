// sample: every block's candidates -> the next token of every row, the same on every block of every rank. Also the end of the step:
// having the word of every block, KV pages of this step may be read, claim counters of this parity used again, and sets of bare words that this
// step has cleared.
#pragma once
#include "../logprobs.cuh"
#include "lm_head.cuh"

namespace imex {

DEV bool sample(Block& b) {
  if (!runs(Phase::kSample)) return true;
  b.waiter.phase = Phase::kSample;
  mark(b, Mark::kBegin);
  const u32 epoch = layer_epoch(b.step, shape().num_layers);
  const int rows = num_rows(b), sources = shape().world_size * shape().num_blocks,
            per_row = divide_up(sources, kConsumerThreads);
  u64 best = 0;
  auto source_of = [&](int i) { return (int)smaller(b.thread + i % per_row * kConsumerThreads, sources - 1); };
  gather(
      b, epoch, rows * per_row,
      [&](int i) { return own_words(b, shape().off_best + (source_of(i) * shape().max_rows + i / per_row) * 2); },
      [&](int i) { return (u32)source_of(i) / shape().num_blocks; },
      [&](int i, u32 first, u32 second) {
        const u64 key = (u64)first << 32 | second;
        best = i % per_row == 0 || key > best ? key : best;
        if (i % per_row < per_row - 1) return;
        const u64 of_warp = warp_max(best);
        if (b.lane == 0) b.shared->best[i / per_row][b.warp] = of_warp;
      });
  // The KV rule's and the sets' (bare.cuh) reader's side: each thread for the words it read; the barriers below and step_begin carry it on.
  fence_step();
  if (!all_well(b)) return false;
  mark(b, Mark::kInput, take_word_clocks(b));
  for (int row = b.thread; row < rows; row += kConsumerThreads) {
    u64 k = 0;
    for (int w = 0; w < kConsumerWarps; w++) k = b.shared->best[row][w] > k ? b.shared->best[row][w] : k;
    b.shared->tokens[b.step & 1][row] = k ? candidate_id(k) : 0;  // no candidate: logits that are no numbers
  }
  consumer_sync();
  if (b.shared->num_drawing && !find_logprobs(b.index, b.step)) return false;
  consumers_arrive(b, &b.shared->step_end[b.step & 1]);  // only rank 0's block 0 has a mailbox that listens
  mark_clock(b, Mark::kPair);  // the LM head is the longest phase: with this, it too lies between two pairs
  mark(b, Mark::kEnd);
  return true;
}

}  // namespace imex
