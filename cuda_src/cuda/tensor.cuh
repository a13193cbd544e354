// Tensor-core primitives on a GPU: a unit's product, a chunk's attention. Who holds what of a fragment is known in this file only; the
// instruction itself is in primitives.cuh.
#pragma once

namespace imex {

// Weights are the m = 16 operand, eight rows of them: rows 0-7 of the fragment are one half of a chunk's k, rows 8-15 the other half. So a
// lane's 16 bytes of a chunk are its whole fragment. The step's rows are the n = 8 operand. Up to four rows take half of the columns each
// for the two halves of k, and one instruction multiplies a chunk; more rows take an instruction for each half, and half of what it
// computes is not used.
constexpr int kStepRows = shape().max_rows;
constexpr bool kFew = kStepRows <= kFewRows;
constexpr int kShareChunks =
    kTileK / 32 / kConsumerWarps;  // of a full tile, a warp's: the chunks warp, warp + CONSUMER_WARPS, …
constexpr bool kWholeTiles =       // no unit's last tile is short
    (shape().hidden_size | shape().num_heads * shape().head_dim | shape().intermediate_size / shape().down_slices) % kTileK ==
    0;

// K of the matrices, for what is unrolled; the simulator learns them when it runs, and has 0 here.
constexpr int kHiddenK = shape().hidden_size, kHeadsK = shape().num_heads * shape().head_dim,
              kDownK = shape().intermediate_size / shape().down_slices;
DEV int group_tiles() {
  return kFew ? 2 : 1;
}  // tiles that are loaded together: with more rows two would not fit the registers

// The activations that a warp's shares of a row's tiles meet, where they fit registers: every unit of the phase needs the same.
// Few rows: lane (column, quarter) has of row column % 4 the k pairs 0 and 2 (columns 0-3) or 1 and 3 of its quarter of a chunk. Else all four
// of row `column`, and of row column + 8.
constexpr int kPairs = kFew ? 2 : kStepRows <= 8 ? 4 : 8;
constexpr int kMaxHeldK = 4 * kTileK;
template <int K>
struct Operand {
  static constexpr bool kHeld = kFew && K <= kMaxHeldK;
  u32 x[kHeld ? (K + kTileK - 1) / kTileK : 1][kShareChunks][kPairs];
};
// What one warp multiplies of a tile, in registers.
struct Share {
  uint4 w[kShareChunks];        // lane (n, quarter) of a chunk: k pairs 0-3 of output row n, at k = 8 * quarter
  u32 x[kShareChunks][kPairs];  // where the operand is not held
};
// x: bf16 [chunks, max_rows, 32]; rows: how many of max_rows are live. A lane beyond them takes the last one's activations again: no
// branch, no bank conflict, and its sums are not stored. What lies beyond the last of `chunks` is zero.
DEV void load_pairs(u32 (&to)[kPairs], const char* x, int c, int chunks, int rows) {
  const int column = lane_index() / 4, quarter = lane_index() % 4;
  const int low = min(kFew ? column % 4 : column, rows - 1), high = min(column + 8, rows - 1);
  const bool here = kWholeTiles || c < chunks;
  const uint4 zero = {0, 0, 0, 0};
  const char* from = x + (c * kStepRows + low) * 64 + quarter * 16;
  if (kFew) {
    from += column / 4 * 4;
    to[0] = here ? *(const u32*)from : 0;
    to[1] = here ? *(const u32*)(from + 8) : 0;
  } else {
    *(uint4*)to = here ? *(const uint4*)from : zero;
    if (kStepRows > 8) *(uint4*)(to + 4) = here ? *(const uint4*)(x + (c * kStepRows + high) * 64 + quarter * 16) : zero;
  }
}
template <int K>
DEV void operand_load(Operand<K>& operand, const char* x, int warp, int rows) {
  if (Operand<K>::kHeld) UNROLL for (int t = 0; t < (K + kTileK - 1) / kTileK; t++) UNROLL for (int j = 0; j < kShareChunks; j++)
      load_pairs(operand.x[t][j], x, t * (kTileK / 32) + warp + j * kConsumerWarps, K / 32, rows);
}
// The warp's share of tile number `t` of a unit of `chunks` chunks. tile: bf16 [chunks, 8, 32], of which at most TILE_K / 32 are here. The
// weights can be loaded before the activations are there, and before it is known how wide they are.
DEV void share_weights(Share& share, const char* tile, const char*, int t, int chunks, int warp) {
  UNROLL for (int j = 0; j < kShareChunks; j++) {
    const int c = warp + j * kConsumerWarps;
    const uint4 zero = {0, 0, 0, 0};
    const bool here = kWholeTiles || t * (kTileK / 32) + c < chunks;  // a unit's last tile may be short
    share.w[j] = here ? ((const uint4*)tile)[c * 32 + lane_index()] : zero;
  }
}
template <int K>
DEV void share_activations(Share& share, const Operand<K>&, const char* x, int t, int chunks, int warp, int rows) {
  if (!Operand<K>::kHeld)
    UNROLL for (int j = 0; j < kShareChunks; j++) load_pairs(share.x[j], x, t * (kTileK / 32) + warp + j * kConsumerWarps, chunks, rows);
}

// What one warp has summed of a unit: [8 output rows, rows of the step] over its share of K.
struct Accum {
  float c[4][4];  // four chains, so that a product need not wait for the one before
};
DEV void accum_zero(Accum& acc) {
  UNROLL for (int i = 0; i < 4; i++) UNROLL for (int j = 0; j < 4; j++) acc.c[i][j] = 0.f;
}
// `t`: the tile's number in its unit; a constant where the operand is held.
template <int K>
DEV void accum_multiply(Accum& acc, const Share& share, const Operand<K>& operand, int t, int) {
  UNROLL for (int j = 0; j < kShareChunks; j++) {
    const uint4 w = share.w[j];
    const u32* x = Operand<K>::kHeld ? operand.x[t][j] : share.x[j];
    if (kFew) {
      mma_bf16(acc.c[j % 4], w.x, w.y, w.z, w.w, x[0], x[1]);
    } else if (kStepRows <= 8) {
      mma_bf16(acc.c[j % 2 * 2], w.x, w.y, w.z, w.w, x[0], x[2]);
      mma_bf16(acc.c[j % 2 * 2 + 1], w.x, w.y, w.z, w.w, x[1], x[3]);
    } else {
      UNROLL for (int i = 0; i < 2; i++) {
        mma_bf16(acc.c[2 * i], w.x, w.y, w.z, w.w, x[4 * i], x[4 * i + 2]);
        mma_bf16(acc.c[2 * i + 1], w.x, w.y, w.z, w.w, x[4 * i + 1], x[4 * i + 3]);
      }
    }
  }
}
// part: float [max_rows, 8] in shared memory.
DEV void accum_store(const Accum& acc, float* part, int rows) {
  const int output = lane_index() / 4, row = 2 * (lane_index() % 4);
  auto put = [&](int at, float first, float second) {
    if (at < rows) part[at * 8 + output] = first;
    if (at + 1 < rows) part[(at + 1) * 8 + output] = second;
  };
  if (kFew) {
    float s[4];
    UNROLL for (int j = 0; j < 4; j++) s[j] = (acc.c[0][j] + acc.c[1][j]) + (acc.c[2][j] + acc.c[3][j]);
    s[2] = __shfl_down_sync(~0u, s[2], 2);  // the other half of k is two columns on
    s[3] = __shfl_down_sync(~0u, s[3], 2);
    put(row, s[0] + s[2], s[1] + s[3]);  // rows <= 4
  } else if (kStepRows <= 8) {
    put(row, (acc.c[0][0] + acc.c[2][0]) + (acc.c[1][2] + acc.c[3][2]), (acc.c[0][1] + acc.c[2][1]) + (acc.c[1][3] + acc.c[3][3]));
  } else {
    UNROLL for (int i = 0; i < 2; i++) put(row + 8 * i, acc.c[2 * i][0] + acc.c[2 * i + 1][2], acc.c[2 * i][1] + acc.c[2 * i + 1][3]);
  }
}

// One warp's running softmax over the chunks it has seen, for up to 16 queries of one KV head: maximum, sum, weighted values. Where an item
// has at most 8 queries, the other half of the operand is zero and nobody looks at what becomes of it.
constexpr int kHalves = shape().attention_rows * shape().num_heads > 8 * shape().num_kv_heads ? 2 : 1;
struct Flash {
  float max[2], sum[2];      // queries lane / 4 and lane / 4 + 8; `sum` holds this lane's positions only
  float out[kMaxHeadDim / 8][4];
};
DEV void flash_zero(Flash& f) {
  f.max[0] = f.max[1] = kMinusInfinity;
  f.sum[0] = f.sum[1] = 0.f;
  UNROLL for (int i = 0; i < kMaxHeadDim / 8; i++) UNROLL for (int j = 0; j < 4; j++) f.out[i][j] = 0.f;
}
// Attends to a chunk's 32 positions: query i, of row i / heads, to the first `valid` + i / heads. q: bf16 [head_dim / 32, queries, 32] in
// shared memory; chunk: K then V in the order of packing.py: lane (n, quarter) finds 8 consecutive dims of a K row, or 8 consecutive
// positions of a V dim, in one 16-byte load, and the scores of its four K units are exactly the operand it needs for V: no shared memory in
// between.
DEV void flash_chunk(Flash& f, const char* q, const char* chunk, int queries, int heads, int valid, float scale) {
  constexpr int kDim = shape().head_dim;
  const int lane = lane_index(), quarter = lane % 4, mine[2] = {min(lane / 4, queries - 1), min(lane / 4 + 8, queries - 1)};
  float s[4][4];
  UNROLL for (int u = 0; u < 4; u++) UNROLL for (int j = 0; j < 4; j++) s[u][j] = 0.f;
  UNROLL for (int c = 0; c < kDim / 32; c++) {
    const uint4 low = ((const uint4*)q)[(c * queries + mine[0]) * 4 + quarter];  // one beyond the last is computed and not stored
    const uint4 high = kHalves > 1 ? ((const uint4*)q)[(c * queries + mine[1]) * 4 + quarter] : make_uint4(0, 0, 0, 0);
    UNROLL for (int u = 0; u < 4; u++) {
      const uint4 b = ((const uint4*)chunk)[(u * (kDim / 32) + c) * 32 + lane];
      mma_bf16(s[u], low.x, high.x, low.y, high.y, b.x, b.y);
      mma_bf16(s[u], low.z, high.z, low.w, high.w, b.z, b.w);
    }
  }
  u32 p[2][4] = {};
  UNROLL for (int h = 0; h < kHalves; h++) {
    float m = f.max[h];
    const int seen = shape().attention_rows > 1 ? valid + mine[h] / heads : valid;
    UNROLL for (int u = 0; u < 4; u++) UNROLL for (int j = 0; j < 2; j++) {
      float& v = s[u][2 * h + j];  // position 8 * quarter + 2 * u + j
      v = 8 * quarter + 2 * u + j < seen ? v * scale : kMinusInfinity;
      m = fmaxf(m, v);
    }
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
    const float keep = __expf(f.max[h] - m);
    f.max[h] = m;
    float sum = 0.f;
    UNROLL for (int u = 0; u < 4; u++) {
      const float e0 = __expf(s[u][2 * h] - m), e1 = __expf(s[u][2 * h + 1] - m);
      sum += e0 + e1;
      p[h][u] = pack_bf16(e0, e1);
    }
    f.sum[h] = f.sum[h] * keep + sum;
    UNROLL for (int i = 0; i < kDim / 8; i++) {
      f.out[i][2 * h] *= keep;
      f.out[i][2 * h + 1] *= keep;
    }
  }
  const uint4* v = (const uint4*)(chunk + 64 * kDim);
  UNROLL for (int i = 0; i < kDim / 8; i++) {
    const uint4 b = v[i * 32 + lane];
    mma_bf16(f.out[i], p[0][0], p[1][0], p[0][1], p[1][1], b.x, b.y);
    mma_bf16(f.out[i], p[0][2], p[1][2], p[0][3], p[1][3], b.z, b.w);
  }
}
// merge: float [queries, head_dim + 2] of this warp in shared memory: values, then maximum and sum.
DEV void flash_store(const Flash& f, float* merge, int queries) {
  constexpr int kDim = shape().head_dim;
  const int lane = lane_index(), row = lane / 4, quarter = lane % 4;
  UNROLL for (int h = 0; h < kHalves; h++) {
    float sum = f.sum[h];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int query = row + 8 * h;
    if (query >= queries) continue;
    float* to = merge + query * (kDim + 2);
    UNROLL for (int i = 0; i < kDim / 8; i++) *(float2*)(to + 8 * i + 2 * quarter) = make_float2(f.out[i][2 * h], f.out[i][2 * h + 1]);
    if (quarter == 0) *(float2*)(to + kDim) = make_float2(f.max[h], sum);
  }
}

}  // namespace imex
