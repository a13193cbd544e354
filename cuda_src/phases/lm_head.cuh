// lm_head: residual -> logits of this rank's part of the vocabulary, of which each block keeps every row's best and publishes it.
// Steps in which no row samples skip the product, tiles and all; the words go out in every step, since they also end it (kv.cuh).
#pragma once
#include "../draw.cuh"
#include "../exchange.cuh"
#include "../tap.cuh"

namespace imex {

DEV Matrix lm_head_matrix(const Block& b, u32 uses) {
  return {(const char*)b.params->lm_head,
          (int)shape().hidden_size,
          (int)shape().vocab_rows / kUnitRows,
          b.index,
          (int)shape().num_blocks,
          claim_counter(b, shape().num_layers, 0),
          uses};
}

// The best logits that one adder has seen in this step: each lane looks after cells lane, lane + LANES, …
struct Candidates {
  u64 best[kCells / LANES];
};
DEV void clear(Candidates& c) {
  UNROLL for (int j = 0; j < kCells / LANES; j++) c.best[j] = 0;
}
DEV void keep_best(Block& b, Candidates& c, int unit, int slot) {
  const int rows = num_rows(b);
  const bool drawing = b.shared->num_drawing;  // of this step: its consumers wait for this adder's mark before they go on
  UNROLL for (int j = 0; j < kCells / LANES; j++) {
    const int i = b.lane + j * LANES, row = i / (kUnitRows / 2), pair = i % (kUnitRows / 2);
    if (row >= rows) continue;
    const float scale = row_scale(b, row);
    float2 v = unit_sums(b, slot, row, pair);
    v = make_float2(v.x * scale, v.y * scale);
    const u32 n = unit * kUnitRows + 2 * pair, id = b.params->rank * shape().vocab_rows + n;
    const u64 k0 = id < shape().vocab_size ? candidate_key(v.x, id) : 0;
    const u64 k1 = id + 1 < shape().vocab_size ? candidate_key(v.y, id + 1) : 0;
    const u64 k = k0 > k1 ? k0 : k1;
    if (k > c.best[j]) c.best[j] = k;
    if (drawing && b.shared->rows[row].flags & kRowDraws)  // sampling.cuh says why one buffer is enough
      store_words(own_words(b, logits_offset(row) + n), float_bits(v.x), float_bits(v.y), layer_epoch(b.step, shape().num_layers));
    tap(b, Phase::kLmHead, row, n, v.x);
    tap(b, Phase::kLmHead, row, n + 1, v.y);
  }
}
// At the mark that ends the units: this adder's candidates, for the block's consumers.
DEV void put_candidates(Block& b, Candidates& c, int adder) {
  UNROLL for (int j = 0; j < kCells / LANES; j++) b.shared->candidates[adder][b.lane + j * LANES] = c.best[j];
  clear(c);
  warp_arrive(b, &b.shared->candidates_ready);
}

// After the product: gathers the adders' candidates and publishes this block's.
DEV bool publish_best(Block& b) {
  const u32 epoch = layer_epoch(b.step, shape().num_layers);
  const int rows = num_rows(b);
  const bool sampling = b.shared->num_sampling;
  if (sampling) {
    hand_over_mark(b, kUnitEnd);
    mbar_wait(b.waiter, Wait::kPartial, false, Pending{&b.shared->candidates_ready, b.num_lm_heads++ & 1});
  }
  if (!all_well(b)) return false;
  if (b.shared->num_drawing && !draw_rows(b.index, b.step)) return false;
  for (int row = b.thread; row < rows; row += kConsumerThreads) {
    u64 best = 0;
    for (int i = 0; i < kAdderWarps * (kUnitRows / 2) && sampling; i++) {
      const u64 k = b.shared->candidates[i / (kUnitRows / 2)][row * (kUnitRows / 2) + i % (kUnitRows / 2)];
      best = k > best ? k : best;
    }
    fence_async_global();  // the KV rule: this block's pages, written before the barrier above, are visible before its word is
    fence_step();
    const u32 at = shape().off_best + ((b.params->rank * shape().num_blocks + b.index) * shape().max_rows + row) * 2;
    for (u32 r = 0; r < shape().world_size; r++) store_words(words_of(b, r, at), (u32)(best >> 32), (u32)best, epoch);
  }
  return true;
}

}  // namespace imex
