// The tensor-core primitives on a CPU: a unit's product and a chunk's attention by LANES, and what a warp takes of a tile.
#pragma once

#if SIM_LANES == 1
#include "tensor_warp.cuh"
#else
#include "tensor_lanes.cuh"
#endif

namespace imex {
constexpr int kHiddenK = 0, kHeadsK = 0, kDownK = 0;
constexpr int kShareChunks = kTileK / 32 / kConsumerWarps;
constexpr int kShareBytes = 512 / LANES;  // of a chunk, a fiber's part
DEV int group_tiles() { return shape().max_rows <= 4 ? 2 : 1; }
template <int K>
struct Operand {};
template <int K>
DEV void operand_load(Operand<K>&, const char*, int, int) {}
// What one warp multiplies of a tile. The weights are read when they are taken, as on a GPU; the activations stay where they are.
struct Share {
  char w[kShareChunks][kShareBytes];
  const char* x;
  int count;
};
DEV void share_weights(Share& share, const char* tile, const char* x, int t, int chunks, int warp) {
  share.count = 0;
  share.x = x + (t * (kTileK / 32) + warp) * 64 * shape().max_rows;
  for (int c = warp; t * (kTileK / 32) + c < chunks && c < kTileK / 32; c += kConsumerWarps)
    memcpy(share.w[share.count++], tile + c * 512 + lane_index() * kShareBytes, kShareBytes);
}
template <int K>
DEV void share_activations(Share&, const Operand<K>&, const char*, int, int, int, int) {}
template <int K>
DEV void accum_multiply(Accum& acc, const Share& share, const Operand<K>&, int, int rows) {
  accum_chunks(acc, share.w[0], kShareBytes, share.x, kConsumerWarps * 64 * shape().max_rows, share.count, rows);
}
}  // namespace imex
