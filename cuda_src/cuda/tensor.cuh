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

// One warp's running softmax over the chunks it has seen, for up to 16 queries of one KV head: maximum, sum, weighted values. A chunk's keys and
// values are the m = 16 operand, in pieces (chunk.cuh); eight queries, or their weights of the positions, are the n = 8 operand. A lane's two
// columns are queries 2 * quarter and the next, and the eight after them where an item has more.
constexpr int kMaxEights = shape().attention_rows * shape().num_heads > 8 * shape().num_kv_heads ? 2 : 1;
struct Flash {
  float max[kMaxEights][2], sum[kMaxEights][2];  // `sum` holds this lane's positions only
  float out[kMaxEights][kMaxHeadDim / 16][4];
};
DEV void flash_zero(Flash& f) {
  UNROLL for (int e = 0; e < kMaxEights; e++) {
    UNROLL for (int j = 0; j < 2; j++) f.max[e][j] = kMinusInfinity, f.sum[e][j] = 0.f;
    UNROLL for (int i = 0; i < kMaxHeadDim / 16; i++) UNROLL for (int j = 0; j < 4; j++) f.out[e][i][j] = 0.f;
  }
}
template <bool kFirst, int kEights>
DEV void flash_eights(Flash& f, const char* q, const char* chunk, int queries, int heads, int valid, float scale) {
  constexpr int kDim = shape().head_dim;
  const int lane = not_before(lane_index()), row = lane / 4, quarter = lane % 4;
  const uint4* pieces = (const uint4*)chunk + lane;
  float s[kEights][2][4];  // of unit 2 * g: position 8 * (row / 2) + row % 2 + 4 * g, two queries; then of the unit after it
  UNROLL for (int e = 0; e < kEights; e++) UNROLL for (int g = 0; g < 2; g++) UNROLL for (int j = 0; j < 4; j++) s[e][g][j] = 0.f;
  UNROLL for (int c = 0; c < kDim / 32; c++) {
    uint4 x[kEights];  // a query beyond the last is computed and not stored
    UNROLL for (int e = 0; e < kEights; e++) x[e] = ((const uint4*)q)[(c * queries + min(8 * e + row, queries - 1)) * 4 + quarter];
    UNROLL for (int g = 0; g < 2; g++) {
      const uint4 k0 = pieces[(g * (kDim / 32) + c) * 64], k1 = pieces[(g * (kDim / 32) + c) * 64 + 32];
      UNROLL for (int e = 0; e < kEights; e++) {
        mma_bf16(s[e][g], k0.x, k0.y, k0.z, k0.w, x[e].x, x[e].y);
        mma_bf16(s[e][g], k1.x, k1.y, k1.z, k1.w, x[e].z, x[e].w);
      }
    }
  }
  u32 p[kEights][4];  // weights of a unit's positions 8 * quarter + 2 * unit and the next, of query `row`
  UNROLL for (int e = 0; e < kEights; e++) {
    float keep[2];
    UNROLL for (int j = 0; j < 2; j++) {
      const int query = min(8 * e + 2 * quarter + j, queries - 1), seen = shape().attention_rows > 1 ? valid + query / heads : valid;
      float m = kFirst ? kMinusInfinity : f.max[e][j], sum = 0.f;
      UNROLL for (int u = 0; u < 4; u++) {
        float& v = s[e][u / 2][u % 2 * 2 + j];
        v = row / 2 * 8 + row % 2 + 2 * u < seen ? v * scale : kMinusInfinity;
        m = fmaxf(m, v);
      }
      UNROLL for (int lanes = 4; lanes < LANES; lanes *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, lanes));
      UNROLL for (int u = 0; u < 4; u++) {
        float& v = s[e][u / 2][u % 2 * 2 + j];
        v = __expf(v - m);
        sum += v;
      }
      keep[j] = kFirst ? 0.f : __expf(f.max[e][j] - m);
      f.max[e][j] = m;
      f.sum[e][j] = kFirst ? sum : f.sum[e][j] * keep[j] + sum;
    }
    UNROLL for (int u = 0; u < 4; u++) p[e][u] = transpose_matrix(pack_bf16(s[e][u / 2][u % 2 * 2], s[e][u / 2][u % 2 * 2 + 1]));
    UNROLL for (int i = 0; i < kDim / 16; i++) UNROLL for (int j = 0; j < 4; j++) f.out[e][i][j] = kFirst ? 0.f : f.out[e][i][j] * keep[j % 2];
  }
  pieces += 4 * kDim;
  UNROLL for (int i = 0; i < kDim / 16; i++) {
    const uint4 v0 = pieces[i * 64], v1 = pieces[i * 64 + 32];
    UNROLL for (int e = 0; e < kEights; e++) {
      mma_bf16(f.out[e][i], v0.x, v0.y, v0.z, v0.w, p[e][0], p[e][1]);
      mma_bf16(f.out[e][i], v1.x, v1.y, v1.z, v1.w, p[e][2], p[e][3]);
    }
  }
}
// Attends to a chunk's 32 positions, kFirst: the first that the warp has seen. Query i, of row i / heads, sees the first `valid` + i / heads. q: bf16
// [head_dim / 32, queries, 32] in shared memory.
template <bool kFirst>
DEV void flash_chunk(Flash& f, const char* q, const char* chunk, int queries, int heads, int valid, float scale) {
  if (kMaxEights == 1 || queries <= 8) flash_eights<kFirst, 1>(f, q, chunk, queries, heads, valid, scale);
  else flash_eights<kFirst, kMaxEights>(f, q, chunk, queries, heads, valid, scale);
}
// merge: float [queries, merge_width()] of this warp in shared memory: values, then maximum and sum.
DEV void flash_store(const Flash& f, float* merge, int queries) {
  constexpr int kDim = shape().head_dim;
  const int lane = not_before(lane_index()), row = lane / 4;
  UNROLL for (int e = 0; e < kMaxEights; e++) UNROLL for (int j = 0; j < 2; j++) {
    if (8 * e >= queries) break;
    float sum = f.sum[e][j];
    UNROLL for (int lanes = 4; lanes < LANES; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    const int query = 8 * e + 2 * (lane % 4) + j;
    if (query >= queries) continue;
    float* to = merge + query * merge_width();
    UNROLL for (int i = 0; i < kDim / 16; i++) {
      to[16 * i + row] = f.out[e][i][j];
      to[16 * i + row + 8] = f.out[e][i][j + 2];
    }
    if (row == 0) *(float2*)(to + kDim) = make_float2(f.max[e][j], sum);
  }
}

}  // namespace imex
