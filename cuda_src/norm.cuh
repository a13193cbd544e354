// RMSNorm that nobody waits for. (x / rms(x) ∘ w) W is (x ∘ w) W / rms(x): consumers multiply with x ∘ w as soon as x is there, and the
// adders divide the results by rms(x), whose sum of squares has arrived by then. The weights w are asked for before x is awaited.
#pragma once
#include "stream.cuh"
#include "words.cuh"

namespace imex {

DEV float quad_squares(u64 quad) {
  const float v0 = bf16_low((u32)quad), v1 = bf16_high((u32)quad), v2 = bf16_low((u32)(quad >> 32)),
              v3 = bf16_high((u32)(quad >> 32));
  return v0 * v0 + v1 * v1 + (v2 * v2 + v3 * v3);
}

// The weights of an RMSNorm, bf16, for this thread's quads of a row (quad_of).
struct Norm {
  EarlyQuads weights;
  bool weighs;  // false: the residual goes on as it is, since no product follows
};
DEV bool has_norm(Phase phase) { return phase == Phase::kQkv || phase == Phase::kGateUp || phase == Phase::kLmHead; }
DEV const u64* norm_here(const Block& b) {  // before the phase that the block is in
  const u64 index = 2 * b.waiter.layer + (b.waiter.phase == Phase::kGateUp);
  return (const u64*)b.params->norms + index * (shape().hidden_size / 4);
}
// The producer's part, a ring ahead of the consumers: they shall not wait for memory. Each block asks for some of the lines.
DEV void prefetch_norm(const Block& b) {
  constexpr u32 kLineBytes = 128;
  for (u32 at = b.index * kLineBytes; at < shape().hidden_size * 2; at += shape().num_blocks * kLineBytes)
    prefetch_global((const char*)norm_here(b) + at);
}
// Asks for the weights; they come while the thread waits for words. Without, they stay undefined: where two values meet the compiler copies
// registers, and that would wait for them here.
DEV Norm load_norm(const Block& b, bool weighs) {
  const int quads = shape().hidden_size / 4;
  Norm norm;
  if (weighs) UNROLL for (int i = 0; i < quads_per_thread(quads); i++) ask_early(norm.weights, i, norm_here(b) + held_quad(quad_of(b, i), quads));
  norm.weighs = weighs;
  return norm;
}
// A quad times its weights, rounded.
DEV u64 weigh(u64 v, u64 weights) {
  return (u64)multiply_bf16((u32)(v >> 32), (u32)(weights >> 32)) << 32 | multiply_bf16((u32)v, (u32)weights);
}

// A kernel of one row that exchanges ONE_SHOT, whose norms are on the critical path, weighs a quad while it is in registers. With more rows that
// would be much code for each quad, all of it fetched in every layer: a second pass, `weigh_rows`, is shorter.
DEV bool weighs_at_once() { return shape().max_rows == 1 && replicated(1); }

// Puts the thread's quad number `i` of the rounded residual, if it is `live`, among the activations. In a kernel that weighs at once, returns
// its squares.
DEV float put_residual(Block& b, const Norm& norm, int row, int i, u64 v, bool live) {
  const bool weighs = weighs_at_once() && norm.weighs;
  if (live) put_quad(b, row, quad_of(b, i), weighs ? weigh(v, early_quad(norm.weights, i)) : v);
  return weighs_at_once() && live ? quad_squares(v) : 0.f;
}
// The same after it was added to the replicated residual.
DEV float add_to_residual(Block& b, const Norm& norm, int row, int i, float4 sum, bool live) {
  float4* r = (float4*)(residual(b) + row * shape().hidden_size) + quad_of(b, i);
  float4 now = make_float4(0.f, 0.f, 0.f, 0.f);
  if (live) now = *r;
  now = make_float4(now.x + sum.x, now.y + sum.y, now.z + sum.z, now.w + sum.w);
  if (live) *r = now;
  return put_residual(b, norm, row, i, (u64)pack_bf16(now.z, now.w) << 32 | pack_bf16(now.x, now.y), live);
}

// One set of sums of squares is enough. An adder reads a phase's before it sends its first word of that phase; a warp puts new ones only
// after words that cannot be there before:
//   - gate_up's over QKV's: its block has gathered for o_proj, hence has every attention word of the rank, and those need every QKV word;
//   - QKV's or the LM head's over gate_up's: the warp has words of down_proj's exchange that are, or are summed from, those of all sources.
//     The rank's own slices gathered all of its gate words between them. A block alone gathers but its slice's: so no sum is put earlier;
//   - `embed`'s over the LM head's: publish_best waited for candidates_ready, to which every adder comes after its last unit. Without an LM
//     head the last sums were QKV's, and o_proj was gathered for since.
// A warp that gave up waits for nothing. Its block then leaves without its word of `sample`, so no token comes of what an adder read.
//
// A warp's share of a row's sum of squares; every lane calls it, before it hands over a unit of the phase. Which lane adds what is the same
// for every row (quad_of), so that a row's bits do not depend on its company.
DEV void put_row_sum(Block& b, int row, float sum) {
  sum = warp_sum(sum);
  if (b.lane == 0) b.shared->norm_sums[row][b.warp] = sum;
}
// Weighs the activations, which are the rounded residual, each thread its quads, and sums up their squares. Four
// rows at a time, their loads before the stores: the compiler cannot know that a store leaves what is loaded next alone.
DEV void weigh_rows(Block& b, const Norm& norm) {
  constexpr int kAtOnce = 4;
  const int quads = shape().hidden_size / 4, rows = num_rows(b);
  ROLLED for (int first = 0; first < rows; first += kAtOnce) {
    auto row = [&](int i) { return (int)smaller(first + i, rows - 1); };  // beyond the last the last again, in vain
    float squares[kAtOnce] = {};
    ROLLED for (int i = 0; i < quads_per_thread(quads); i++) {
      const int quad = quad_of(b, i);
      if (!is_quad(quad, quads)) continue;
      u64 v[kAtOnce];
      UNROLL for (int j = 0; j < kAtOnce; j++) v[j] = *quad_at(b, row(j), quad);
      UNROLL for (int j = 0; j < kAtOnce; j++) {
        squares[j] += quad_squares(v[j]);
        v[j] = weigh(v[j], early_quad(norm.weights, i));
      }
      UNROLL for (int j = 0; j < kAtOnce; j++) *quad_at(b, row(j), quad) = v[j];
    }
    UNROLL for (int j = 0; j < kAtOnce; j++) put_row_sum(b, row(j), squares[j]);
  }
}
// The end of a residual's way into the activations, which is a barrier: `squares` are this thread's of a row that was weighed at once. Of one
// row the sum comes after the barrier, since no other warp needs to wait for it. False when the block must leave.
DEV bool end_residual(Block& b, const Norm& norm, float squares) {
  if (norm.weighs && !weighs_at_once()) weigh_rows(b, norm);
  if (!all_well(b)) return false;
  if (norm.weighs && weighs_at_once()) put_row_sum(b, 0, squares);
  return true;
}
// An adder's part: 1 / rms of every row, once a phase, after a unit of it was handed over by all warps.
DEV void put_row_scales(Block& b, int adder, int rows) {
  for (int row = b.lane; row < rows; row += LANES) {
    float sum = 0.f;
    UNROLL for (int w = 0; w < kConsumerWarps; w++) sum += b.shared->norm_sums[row][w];
    b.shared->row_scales[adder][row] = reciprocal_sqrt(sum / (float)shape().norm_size + shape().rms_eps);
  }
  warp_sync();
}
DEV float row_scale(const Block& b, int row) { return b.shared->row_scales[b.warp - kConsumerWarps][row]; }

}  // namespace imex
