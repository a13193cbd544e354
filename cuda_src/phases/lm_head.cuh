// lm_head: residual -> logits of this rank's part of the vocabulary, of which each block keeps every row's best and publishes it.
// Steps in which no row samples skip the product, tiles and all; the words go out in every step, since they also end it (kv.cuh).
#pragma once
#include "../exchange.cuh"
#include "../norm.cuh"
#include "../tap.cuh"

namespace imex {

DEV int lm_head_units() { return shape().vocab_rows / kUnitRows; }

DEV void stream_lm_head(Block& b, Producer& p) {
  if (!runs(Phase::kLmHead) || b.shared->num_sampling == 0) return;
  const u32 uses = b.step & 1 ? p.num_lm_head_odd++ : p.num_lm_head_even++;
  push_norm(b, p, 2 * shape().num_layers);
  push_units(b, p, (const char*)b.params->lm_head, shape().hidden_size,
             {claim_counter(b, shape().num_layers, 0), uses, lm_head_units(), b.index, (int)shape().num_blocks});
}

// Candidates compare as integers: the logit's order first, then the lower id.
DEV u64 candidate_key(float logit, u32 id) {
  const u32 bits = float_bits(logit);
  return (u64)(bits & 0x80000000u ? ~bits : bits | 0x80000000u) << 32 | (0xffffffffu - id);
}
DEV u32 candidate_id(u64 key) { return 0xffffffffu - (u32)key; }

// The best logits that one adder has seen in this step: each lane looks after (row, pair of the unit's outputs) cells.
constexpr int kCells = kMaxRows * (kUnitRows / 2);
struct Candidates {
  u64 best[kCells / LANES];
};
DEV void clear(Candidates& c) {
  UNROLL for (int j = 0; j < kCells / LANES; j++) c.best[j] = 0;
}
DEV void keep_best(Block& b, Candidates& c, int unit, int slot) {
  UNROLL for (int j = 0; j < kCells / LANES; j++) {
    const int i = b.lane + j * LANES, row = i / (kUnitRows / 2), pair = i % (kUnitRows / 2);
    if (row >= num_rows(b)) continue;
    const float2 v = unit_sums(b, slot, row, pair);
    const u32 n = unit * kUnitRows + 2 * pair, id = b.params->rank * shape().vocab_rows + n;
    const u64 k0 = id < shape().vocab_size ? candidate_key(v.x, id) : 0;
    const u64 k1 = id + 1 < shape().vocab_size ? candidate_key(v.y, id + 1) : 0;
    const u64 k = k0 > k1 ? k0 : k1;
    if (k > c.best[j]) c.best[j] = k;
    tap(b, Phase::kLmHead, row, n, v.x);
    tap(b, Phase::kLmHead, row, n + 1, v.y);
  }
}
// At the mark that ends the units: this adder's candidates, for the block's consumers.
DEV void put_candidates(Block& b, Candidates& c, int adder) {
  UNROLL for (int j = 0; j < kCells / LANES; j++) b.shared->candidates[adder][b.lane + j * LANES] = c.best[j];
  clear(c);
  warp_sync();
  if (b.lane == 0) mbar_arrive(&b.shared->candidates_ready);
}

DEV bool lm_head(Block& b) {
  if (!runs(Phase::kLmHead)) return true;
  b.waiter.phase = Phase::kLmHead;
  mark(b, Mark::kBegin);
  const u32 epoch = layer_epoch(b.step, shape().num_layers);
  const int rows = num_rows(b);
  const bool sampling = b.shared->num_sampling;
  if (!receive(b, down_exchange(), epoch - 1)) return false;  // also when nothing is sampled: it is this step's condition C
  mark(b, Mark::kInput);
  if (sampling) {
    normalize(b);
    mark(b, Mark::kReady);
    multiply_units<Phase::kLmHead>(b);
    hand_over_mark(b, kUnitEnd);
    mbar_wait(b.waiter, Wait::kPartial, false, &b.shared->candidates_ready, b.num_lm_heads++ & 1);
  }
  mark(b, Mark::kEnd, take_tile_clocks(b));
  if (!all_well(b)) return false;
  for (int row = b.thread; row < rows; row += kConsumerThreads) {
    u64 best = 0;
    for (int i = 0; i < kAdderWarps * (kUnitRows / 2) && sampling; i++) {
      const u64 k = b.shared->candidates[i / (kUnitRows / 2)][row * (kUnitRows / 2) + i % (kUnitRows / 2)];
      best = k > best ? k : best;
    }
    fence_async_global();  // the KV rule: this block's pages, written before the barrier above, are visible before its word is
    fence_gpu();
    const u32 at = shape().off_best + ((b.params->rank * shape().num_blocks + b.index) * shape().max_rows + row) * 2;
    for (u32 r = 0; r < shape().world_size; r++) store_words(words_of(b, r, at), (u32)(best >> 32), (u32)best, epoch);
  }
  return true;
}

}  // namespace imex
