// RMSNorm of the activations in place. Its weights come through the ring like any other weight, so nobody waits for them.
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
// A warp's share of a row's sum of squares; every lane calls it, before a consumer barrier and `normalize`.
DEV void put_row_sum(Block& b, int row, float sum) {
  sum = warp_sum(sum);
  if (b.lane == 0) b.shared->norm_sums[row][b.warp] = sum;
}

// Takes the activations (the residual rounded to bf16) to bf16(x / rms(x) * weight). All consumers; ends in a barrier.
DEV void normalize(Block& b) {
  const int rows = num_rows(b), quads = shape().hidden_size / 4;
  constexpr int kTileQuads = kStageBytes / 8;
  for (int begin = 0; begin < quads; begin += kTileQuads) {
    wait_stage(b);
    const u64* weights = (const u64*)ring_stage(b, b.ring.stage);
    for (int row = 0; row < rows && !b.waiter.failed; row++) {
      float sum = 0.f;
  UNROLL for (int w = 0; w < kConsumerWarps; w++) sum += b.shared->norm_sums[row][w];
      const float scale = reciprocal_sqrt(sum / (float)shape().norm_size + shape().rms_eps);
      for (int q = begin + b.thread; q < (int)smaller(begin + kTileQuads, quads); q += kConsumerThreads) {
        u64* at = (u64*)(activations(b) + activation_offset(row, 4 * q));
        const u64 v = *at, w = weights[q - begin];
        const u32 low = pack_bf16(bf16_low((u32)v) * scale * bf16_low((u32)w), bf16_high((u32)v) * scale * bf16_high((u32)w));
        const u32 high = pack_bf16(bf16_low((u32)(v >> 32)) * scale * bf16_low((u32)(w >> 32)),
                                   bf16_high((u32)(v >> 32)) * scale * bf16_high((u32)(w >> 32)));
        *at = (u64)high << 32 | low;
      }
    }
    release_stage(b);
  }
  consumer_sync();
}

}  // namespace imex
