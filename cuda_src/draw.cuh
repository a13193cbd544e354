// Drawing: the next token of rows that are not plainly greedy. Their logits leave lm_head as words of the own rank; every block owns a
// part of the rank's vocabulary, takes those logits, applies penalties, the mask of min_tokens and temperature, finds with all others
// what min_p, top_k and top_p leave (search.cuh), adds noise, and puts the largest in the place of its greedy candidate. From there on
// the row is like any other: `sample` takes the best of all blocks. With noise of Gumbel's distribution the largest is a draw from the
// softmax; the noise of a token depends on the request's seed, the token's index and its id only (philox.cuh).
#pragma once
#include "philox.cuh"
#include "search.cuh"

namespace imex {

// Scales the block's logits of every drawn row, and leaves each warp's largest key, and inverted its smallest, for the search.
DEV bool scale_rows(Block& b) {
  const Shared& s = *b.shared;
  fetch_logits(b, s.num_drawn, [&](int d) { return (int)s.drawn[d]; });
  if (!all_well(b)) return false;
  ROLLED for (u32 d = 0; d < s.num_drawn; d++) {
    const int row = s.drawn[d];
    DrawRow& r = draw_row(b, row);
    const Sampling& p = r.sampling;
    const bool masks = token_index(p, s.rows[row].position) < p.min_tokens, counted = penalizes(p);
    const uint4* counts = token_counts(b, s.rows[row].slot);
    u32 largest = 0, smallest = 0;
    each_quad(b, row, [&](int quad, u32 id, const float(&v)[4]) {
      const uint4 c = counted ? counts[quad] : make_uint4(0, 0, 0, 0);
      const u32 of_token[4] = {c.x, c.y, c.z, c.w};
      float x[4];
      UNROLL for (int i = 0; i < 4; i++) {
        x[i] = scale_logit(p, v[i], of_token[i], id + i, masks);
        const u32 key = order_key(x[i]);
        if (key <= kNeverKey) continue;
        largest = larger(largest, key);
        smallest = larger(smallest, ~key);
      }
      scaled_logits(b, row)[quad] = make_float4(x[0], x[1], x[2], x[3]);
    });
    const u32 of_warp[2] = {(u32)warp_max((u64)largest), (u32)warp_max((u64)smallest)};
    if (b.lane) continue;
    r.part_counts[b.warp][0] = of_warp[0];
    r.part_counts[b.warp][1] = of_warp[1];
    if (b.warp == 0) r.search.lo = kNeverKey;
  }
  consumer_sync();
  return true;
}

// This thread's best of what is left of a row.
DEV u64 best_of_row(const Block& b, int row) {
  const DrawRow& r = draw_row(b, row);
  const Sampling& p = r.sampling;
  const u32 index = token_index(p, b.shared->rows[row].position);
  u64 best = 0;
  each_quad(b, row, [&](int, u32 id, const float(&values)[4]) {
    u32 noise[4] = {id / 4, index, 0, 0};
    if (p.temperature > 0.f) philox(noise, p.seed[0], p.seed[1]);
    UNROLL for (int i = 0; i < 4; i++) {
      if (order_key(values[i]) <= r.search.lo) continue;
      const u64 key = candidate_key(p.temperature > 0.f ? values[i] + gumbel(noise[i]) : values[i], id + i);
      best = key > best ? key : best;
    }
  });
  return best;
}

// Puts the block's best of every drawn row where the adders have put its greedy candidates.
DEV void replace_candidates(Block& b) {
  Shared& s = *b.shared;
  ROLLED for (u32 d = 0; d < s.num_drawn; d++) {
    const u64 best = warp_max(best_of_row(b, s.drawn[d]));
    if (b.lane == 0) s.best[d][b.warp] = best;
  }
  consumer_sync();
  constexpr int kOfRow = kUnitRows / 2;
  ROLLED for (u32 i = b.thread; i < s.num_drawn * kAdderWarps * kOfRow; i += kConsumerThreads) {
    const u32 d = i / (kAdderWarps * kOfRow), cell = i % (kAdderWarps * kOfRow);
    u64 best = 0;
    ROLLED for (int w = 0; w < kConsumerWarps && cell == 0; w++) best = s.best[d][w] > best ? s.best[d][w] : best;
    s.candidates[cell / kOfRow][s.drawn[d] * kOfRow + cell % kOfRow] = best;
  }
  consumer_sync();
}

DEV bool draw(Block& b) {
  const Shared& s = *b.shared;
  if (!fetch_sampling(b)) return false;
  ROLLED for (u32 d = 0; d < s.num_drawing; d++) count_token(b, s.drawing[d]);
  if (!s.num_drawn) return true;
  if (!scale_rows(b)) return false;
  bool limited = false;
  ROLLED for (u32 d = 0; d < s.num_drawn; d++) {
    const Sampling& p = draw_row(b, s.drawn[d]).sampling;
    limited |= p.temperature > 0.f && (p.min_p | p.top_k | p.top_p);
  }
  if (limited && !search(b)) return false;
  replace_candidates(b);
  return true;
}

// All consumers, after the adders have brought their candidates; false when the block must leave. Off the greedy path, so a call: its
// code and registers are its own. It takes plain numbers and makes its own Block: the caller's never needs an address.
DEV Block called_block(int index, u32 step) {
  Block b = make_block(((Shared*)shared_memory())->params, index);
  b.step = step;
  b.waiter.layer = shape().num_layers;
  b.waiter.phase = Phase::kSample;
  return b;
}
DEV_CALL bool draw_rows(int index, u32 step) {
  Block b = called_block(index, step);
  return draw(b);
}

}  // namespace imex
