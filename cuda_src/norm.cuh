// RMSNorm that nobody waits for. (x / rms(x) ∘ w) W is (x ∘ w) W / rms(x): consumers multiply with x ∘ w as soon as x is there, and the
// adders divide the results by rms(x), whose sum of squares has arrived by then. The weights w come through the ring like any other.
#pragma once
#include "stream.cuh"

namespace imex {

// Which values of a row are a thread's: quads (four neighbours) thread, thread + kConsumerThreads, …, the same for every row whatever
// the other rows are, so that a row's sum of squares, and with it its bits, does not depend on its company.
DEV int quads_per_thread() { return divide_up(shape().hidden_size / 4, kConsumerThreads); }
DEV float quad_squares(u64 quad) {
  const float v0 = bf16_low((u32)quad), v1 = bf16_high((u32)quad), v2 = bf16_low((u32)(quad >> 32)),
              v3 = bf16_high((u32)(quad >> 32));
  return v0 * v0 + v1 * v1 + (v2 * v2 + v3 * v3);
}

constexpr int kStageQuads = kStageBytes / 8;
DEV int norm_stages() { return divide_up(shape().hidden_size / 4, kStageQuads); }

// Waits for the norm's weights, at the cursor; they stay until `close_norm`. Whole warps; false when the block must leave.
DEV bool open_norm(Block& b) {
  const RingCursor begin = b.ring;
  bool here = true;
  ROLLED for (int i = 0; i < norm_stages() && here; i++, b.ring = ahead(b.ring, 1)) here = wait_stage(b);
  b.ring = begin;
  return here;
}
DEV void close_norm(Block& b) {
  ROLLED for (int i = 0; i < norm_stages(); i++) release_stage(b);
}
// The row's quad times its weights, rounded to bf16.
DEV u64 weigh(const Block& b, int quad, u64 v) {
  int stage = b.ring.stage + quad / kStageQuads;
  if (stage >= (int)shape().ring_stages) stage -= shape().ring_stages;
  const u64 w = ((const u64*)ring_stage(b, stage))[quad % kStageQuads];
  const u32 low = pack_bf16(bf16_low((u32)v) * bf16_low((u32)w), bf16_high((u32)v) * bf16_high((u32)w));
  const u32 high = pack_bf16(bf16_low((u32)(v >> 32)) * bf16_low((u32)(w >> 32)), bf16_high((u32)(v >> 32)) * bf16_high((u32)(w >> 32)));
  return (u64)high << 32 | low;
}
// Puts a quad of the rounded residual where the product takes its activations.
DEV void put_quad(Block& b, int row, int quad, u64 v, bool weighs) {
  *(u64*)(activations(b) + activation_offset(row, 4 * quad)) = weighs ? weigh(b, quad, v) : v;
}

// Adds to a quad of the replicated residual and puts it, rounded, where the product takes it; returns its squares.
DEV float add_to_residual(Block& b, int row, int quad, float4 sum, bool weighs) {
  float4* r = (float4*)(residual(b) + row * shape().hidden_size) + quad;
  const float4 old = *r, now = make_float4(old.x + sum.x, old.y + sum.y, old.z + sum.z, old.w + sum.w);
  *r = now;
  const u64 v = (u64)pack_bf16(now.z, now.w) << 32 | pack_bf16(now.x, now.y);
  put_quad(b, row, quad, v, weighs);
  return quad_squares(v);
}

// Sums of squares are kept twice, in turn for the norms of a layer. Those of QKV (or the LM head) are read by this block's adders until
// its last word of QKV is sent; they are overwritten by the next layer's exchange, which waits for words of every o_proj unit, and those
// for attention, and that for all words of QKV (of the LM head: for `sample`, which waits for this block's candidates). In the same way
// gate_up's are read before down_proj's words exist.
DEV int norm_turn(Phase phase) { return phase == Phase::kGateUp; }
// A warp's share of a row's sum of squares; every lane calls it, before it hands over a unit of the phase.
DEV void put_row_sum(Block& b, Phase phase, int row, float sum) {
  sum = warp_sum(sum);
  if (b.lane == 0) b.shared->norm_sums[norm_turn(phase)][row][b.warp] = sum;
}
// An adder's part: 1 / rms of every row, once a phase, after a unit of it was handed over by all warps.
DEV void put_row_scales(Block& b, int adder, Phase phase, int rows) {
  for (int row = b.lane; row < rows; row += LANES) {
    float sum = 0.f;
    UNROLL for (int w = 0; w < kConsumerWarps; w++) sum += b.shared->norm_sums[norm_turn(phase)][row][w];
    b.shared->row_scales[adder][row] = reciprocal_sqrt(sum / (float)shape().norm_size + shape().rms_eps);
  }
  warp_sync();
}
DEV float row_scale(const Block& b, int row) { return b.shared->row_scales[b.warp - kConsumerWarps][row]; }

}  // namespace imex
