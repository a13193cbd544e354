// The tensor-core primitives when a warp is one fiber: whole units in vector registers. bf16 becomes f32 by a shift; the even and the
// odd elements of 32 make two vectors of 16, the same way for both operands, so a chunk is two multiply-adds. Sums run in one order,
// whatever the number of rows: per row and output, chunk by chunk, then over the vector's 16 parts.
#pragma once

namespace imex {

typedef float f32x16 __attribute__((vector_size(64)));
typedef u32 u32x16 __attribute__((vector_size(64)));
struct Wide {  // 32 bf16 values as f32
  f32x16 even, odd;
};
DEV __attribute__((always_inline)) Wide widen(const void* p) {
  u32x16 pairs;
  memcpy(&pairs, p, 64);
  return {(f32x16)(pairs << 16), (f32x16)(pairs & 0xffff0000u)};
}
DEV __attribute__((always_inline)) float sum16(const f32x16& v) {
  float s[16];
  memcpy(s, &v, 64);
  for (int o = 8; o; o >>= 1)
    for (int i = 0; i < o; i++) s[i] += s[i + o];
  return s[0];
}

typedef float f32x8 __attribute__((vector_size(32)));
// The sums of eight vectors, each in the order of sum16, in one vector: two shuffles halve what is left of two vectors at once.
DEV __attribute__((always_inline)) f32x8 sum16_of_8(const f32x16* v) {
  f32x8 a[8];
  for (int i = 0; i < 8; i++)
    a[i] = __builtin_shufflevector(v[i], v[i], 0, 1, 2, 3, 4, 5, 6, 7) +
           __builtin_shufflevector(v[i], v[i], 8, 9, 10, 11, 12, 13, 14, 15);
  for (int i = 0; i < 4; i++)  // a[i]: 4 left of outputs i and i + 4
    a[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  for (int i = 0; i < 2; i++)  // 2 left of outputs i, i + 2, i + 4, i + 6
    a[i] = __builtin_shufflevector(a[i], a[i + 2], 0, 1, 8, 9, 4, 5, 12, 13) +
           __builtin_shufflevector(a[i], a[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(a[0], a[1], 0, 8, 2, 10, 4, 12, 6, 14) +
         __builtin_shufflevector(a[0], a[1], 1, 9, 3, 11, 5, 13, 7, 15);
}

struct Accum {
  f32x16 c[kMaxRows][kUnitRows];
  bool fresh;  // all zero, whatever c holds: rows that are not live cost nothing
};
DEV void accum_zero(Accum& acc) { acc.fresh = true; }

// One row: all eight outputs in registers, each weight used once.
DEV void multiply_row(f32x16 (*c)[kUnitRows], bool fresh, const char* w, size_t w_stride, const char* x, size_t x_stride,
                      int count) {
  f32x16 s[kUnitRows];
  for (int n = 0; n < kUnitRows; n++) s[n] = fresh ? f32x16{} : c[0][n];
  for (int j = 0; j < count; j++, w += w_stride, x += x_stride) {
    const Wide a = widen(x);
#pragma GCC unroll 8
    for (int n = 0; n < kUnitRows; n++) {
      const Wide b = widen(w + n * 64);
      s[n] = b.even * a.even + s[n];
      s[n] = b.odd * a.odd + s[n];
    }
  }
  for (int n = 0; n < kUnitRows; n++) c[0][n] = s[n];
}

// R rows: activations widened once for a group of chunks, two outputs at a time, each widened weight used R times.
template <int R>
DEV_CALL void multiply_rows(f32x16 (*c)[kUnitRows], bool fresh, const char* w, size_t w_stride, const char* x, size_t x_stride,
                            int count) {
  constexpr int kGroup = 4;
  Wide a[kGroup][R];
  for (int i = 0; i < R * kUnitRows && fresh; i++) c[i / kUnitRows][i % kUnitRows] = f32x16{};
  for (int from = 0; from < count; from += kGroup) {
    const int group = count - from < kGroup ? count - from : kGroup;
    for (int j = 0; j < group; j++)
      for (int r = 0; r < R; r++) a[j][r] = widen(x + (from + j) * x_stride + r * 64);
    for (int n = 0; n < kUnitRows; n += 2) {
      f32x16 s[R][2];
      for (int r = 0; r < R; r++) s[r][0] = c[r][n], s[r][1] = c[r][n + 1];
      for (int i = 0; i < group; i++) {
        const char* of = w + (from + i) * w_stride + n * 64;
        const Wide b0 = widen(of), b1 = widen(of + 64);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          s[r][0] = b0.even * a[i][r].even + s[r][0];
          s[r][1] = b1.even * a[i][r].even + s[r][1];
          s[r][0] = b0.odd * a[i][r].odd + s[r][0];
          s[r][1] = b1.odd * a[i][r].odd + s[r][1];
        }
      }
      for (int r = 0; r < R; r++) c[r][n] = s[r][0], c[r][n + 1] = s[r][1];
    }
  }
}

// `count` chunks: each bf16 [8, 32] of weights at w + j * w_stride, and the rows' activations, bf16 [max_rows, 32], at x +
// j * x_stride; rows: how many of max_rows are live.
DEV void accum_chunks(Accum& acc, const char* w, size_t w_stride, const char* x, size_t x_stride, int count, int rows) {
  int r = 0;
  auto part = [&](auto multiply, int n) {
    multiply(acc.c + r, acc.fresh, w, w_stride, x + r * 64, x_stride, count);
    r += n;
  };
  while (rows - r >= 8) part(multiply_rows<8>, 8);
  if (rows - r >= 4) part(multiply_rows<4>, 4);
  if (rows - r >= 2) part(multiply_rows<2>, 2);
  if (rows - r >= 1) part(multiply_row, 1);
  acc.fresh = false;
}
// part: float [max_rows, 8] in shared memory.
DEV void accum_store(const Accum& acc, float* part, int rows) {
  for (int r = 0; r < rows; r++) {
    const f32x8 sums = acc.fresh ? f32x8{} : sum16_of_8(acc.c[r]);
    memcpy(part + r * kUnitRows, &sums, sizeof sums);
  }
}

// One warp's running softmax over the chunks it has seen, for up to 16 queries of one KV head.
struct Flash {
  float max[kMaxRows], sum[kMaxRows];
  float out[kMaxRows][kMaxHeadDim];
};
DEV void flash_zero(Flash& f) {
  for (int h = 0; h < kMaxRows; h++) f.max[h] = kMinusInfinity, f.sum[h] = 0.f;
  memset(f.out, 0, sizeof f.out);
}
// As on a GPU. q: bf16 [head_dim / 32, queries, 32]; chunk: 32 positions, as chunk.cuh has them.
template <bool kFirst>
DEV void flash_chunk(Flash& f, const char* q, const char* chunk, int queries, int heads, int valid, float scale) {
  if (kFirst) flash_zero(f);
  const int dim = (int)shape().head_dim, segments = dim / 32;
  float score[kMaxRows][kChunk];
  for (int p = 0; p < kChunk && p < valid + (queries - 1) / heads; p++) {
    u16 key[kMaxHeadDim];
    for (int d = 0; d < dim; d++) memcpy(key + d, chunk + key_offset(p, d), 2);
    Wide k[kMaxHeadDim / 32];
    for (int s = 0; s < segments; s++) k[s] = widen(key + 32 * s);
    for (int h = 0; h < queries; h++) {
      f32x16 dot{};
      for (int s = 0; s < segments; s++) {
        const Wide a = widen(q + (size_t)(s * queries + h) * 64);
        dot = k[s].even * a.even + dot;
        dot = k[s].odd * a.odd + dot;
      }
      score[h][p] = sum16(dot) * scale;
    }
  }
  Wide weight[kMaxRows];  // what the softmax gives each position, rounded to bf16 like the GPU's operand
  for (int h = 0; h < queries; h++) {
    float m = f.max[h], sum = 0.f, even[16], odd[16];
    for (int p = valid + h / heads; p < kChunk; p++) score[h][p] = kMinusInfinity;
    for (int p = 0; p < kChunk; p++) m = score[h][p] > m || score[h][p] != score[h][p] ? score[h][p] : m;
    for (int p = 0; p < kChunk; p++) score[h][p] = fast_exp(score[h][p] - m);
    for (int p = 0; p < kChunk; p++) sum += score[h][p];
    for (int p = 0; p < kChunk; p += 2) {
      even[p / 2] = bits_float(round_bf16(score[h][p]) << 16);
      odd[p / 2] = bits_float(round_bf16(score[h][p + 1]) << 16);
    }
    memcpy(&weight[h].even, even, 64);
    memcpy(&weight[h].odd, odd, 64);
    const float keep = fast_exp(f.max[h] - m);
    f.max[h] = m;
    f.sum[h] = f.sum[h] * keep + sum;
    for (int d = 0; d < dim; d++) f.out[h][d] *= keep;
  }
  for (int d = 0; d < dim; d++) {
    u16 values[kChunk];
    for (int p = 0; p < kChunk; p++) memcpy(values + p, chunk + value_offset(p, d), 2);
    const Wide v = widen(values);
    for (int h = 0; h < queries; h++) f.out[h][d] += sum16(v.odd * weight[h].odd + v.even * weight[h].even);
  }
}
// merge: float [queries, merge_width()] of this warp in shared memory: values, then maximum and sum.
DEV void flash_store(const Flash& f, float* merge, int queries) {
  const int dim = (int)shape().head_dim;
  for (int h = 0; h < queries; h++) {
    float* to = merge + h * merge_width();
    for (int d = 0; d < dim; d++) to[d] = f.out[h][d];
    to[dim] = f.max[h], to[dim + 1] = f.sum[h];
  }
}

}  // namespace imex
