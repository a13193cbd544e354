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

struct Accum {
  f32x16 c[kMaxRows][kUnitRows];
};
DEV void accum_zero(Accum& acc) {
  const int rows = (int)shape().max_rows;
  for (int r = 0; r < rows; r++)
    for (int n = 0; n < kUnitRows; n++) acc.c[r][n] = f32x16{};
}

// One row: all eight outputs in registers, each weight used once.
DEV void multiply_row(f32x16 (&c)[kUnitRows], const char* tile, const char* x, size_t x_stride, int first, int step, int chunks) {
  f32x16 s[kUnitRows];
  for (int n = 0; n < kUnitRows; n++) s[n] = c[n];
  for (int k = first; k < chunks; k += step) {
    const Wide a = widen(x + k * x_stride);
    const char* w = tile + k * 512;
#pragma GCC unroll 8
    for (int n = 0; n < kUnitRows; n++) {
      const Wide b = widen(w + n * 64);
      s[n] = b.even * a.even + s[n];
      s[n] = b.odd * a.odd + s[n];
    }
  }
  for (int n = 0; n < kUnitRows; n++) c[n] = s[n];
}

// R rows: activations widened once for a group of chunks, two outputs at a time, each widened weight used R times.
template <int R>
DEV __attribute__((noinline)) void multiply_rows(f32x16 (*c)[kUnitRows], const char* tile, const char* x, size_t x_stride, int first,
                                                 int step, int chunks) {
  constexpr int kGroup = 4;
  Wide a[kGroup][R];
  for (int from = first; from < chunks; from += kGroup * step) {
    int count = 0;
    for (int k = from; k < chunks && count < kGroup; k += step, count++)
      for (int r = 0; r < R; r++) a[count][r] = widen(x + k * x_stride + r * 64);
    for (int n = 0; n < kUnitRows; n += 2) {
      f32x16 s[R][2];
      for (int r = 0; r < R; r++) s[r][0] = c[r][n], s[r][1] = c[r][n + 1];
      for (int i = 0; i < count; i++) {
        const char* w = tile + (size_t)(from + i * step) * 512 + n * 64;
        const Wide b0 = widen(w), b1 = widen(w + 64);
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

// tile: bf16 [chunks, 8, 32]; x: bf16 [chunks, max_rows, 32]; rows: how many of max_rows are live.
DEV void accum_multiply(Accum& acc, const char* tile, const char* x, int first, int step, int chunks, int rows) {
  const size_t stride = shape().max_rows * 64;
  int r = 0;
  for (; rows - r >= 8; r += 8) multiply_rows<8>(acc.c + r, tile, x + r * 64, stride, first, step, chunks);
  if (rows - r >= 4) multiply_rows<4>(acc.c + r, tile, x + r * 64, stride, first, step, chunks), r += 4;
  if (rows - r >= 2) multiply_rows<2>(acc.c + r, tile, x + r * 64, stride, first, step, chunks), r += 2;
  if (rows - r >= 1) multiply_row(acc.c[r], tile, x + r * 64, stride, first, step, chunks);
}
// part: float [max_rows, 8] in shared memory.
DEV void accum_store(const Accum& acc, float* part, int rows) {
  for (int r = 0; r < rows; r++)
    for (int n = 0; n < kUnitRows; n++) part[r * kUnitRows + n] = sum16(acc.c[r][n]);
}

// One warp's running softmax over the chunks it has seen, for up to 16 query heads of one KV head.
struct Flash {
  float max[kMaxRows], sum[kMaxRows];
  float out[kMaxRows][kMaxHeadDim];
};
DEV void flash_zero(Flash& f) {
  for (int h = 0; h < kMaxRows; h++) f.max[h] = kMinusInfinity, f.sum[h] = 0.f;
  memset(f.out, 0, sizeof f.out);
}
// q: bf16 [head_dim / 32, heads, 32]; chunk: 32 positions, K then V in the order of packing.py.
DEV void flash_chunk(Flash& f, const char* q, const char* chunk, int heads, int valid, float scale) {
  const int dim = (int)shape().head_dim, segments = dim / 32;
  float score[kMaxRows][kChunk];
  for (int p = 0; p < valid; p++) {
    const int unit = p % 8 / 2, n = p / 8 * 2 + p % 2;  // where packing.py puts position p of K
    Wide k[kMaxHeadDim / 32];
    for (int s = 0; s < segments; s++) k[s] = widen(chunk + ((size_t)(unit * segments + s) * 8 + n) * 64);
    for (int h = 0; h < heads; h++) {
      f32x16 dot{};
      for (int s = 0; s < segments; s++) {
        const Wide a = widen(q + (size_t)(s * heads + h) * 64);
        dot = k[s].even * a.even + dot;
        dot = k[s].odd * a.odd + dot;
      }
      score[h][p] = sum16(dot) * scale;
    }
  }
  Wide weight[kMaxRows];  // what the softmax gives each position, rounded to bf16 like the GPU's operand
  for (int h = 0; h < heads; h++) {
    float m = f.max[h], sum = 0.f, even[16], odd[16];
    for (int p = valid; p < kChunk; p++) score[h][p] = kMinusInfinity;
    for (int p = 0; p < kChunk; p++) m = score[h][p] > m || score[h][p] != score[h][p] ? score[h][p] : m;
    for (int p = 0; p < kChunk; p++) score[h][p] = fast_exp(score[h][p] - m);
    for (int p = 0; p < kChunk; p++) sum += score[h][p];
    for (int p = 0; p < kChunk; p++) (p % 2 ? odd : even)[p / 2] = bits_float(round_bf16(score[h][p]) << 16);
    memcpy(&weight[h].even, even, 64);
    memcpy(&weight[h].odd, odd, 64);
    const float keep = fast_exp(f.max[h] - m);
    f.max[h] = m;
    f.sum[h] = f.sum[h] * keep + sum;
    for (int d = 0; d < dim; d++) f.out[h][d] *= keep;
  }
  const char* values = chunk + 64 * dim;
  for (int d = 0; d < dim; d++) {
    const Wide v = widen(values + d * 64);
    for (int h = 0; h < heads; h++) f.out[h][d] += sum16(v.odd * weight[h].odd + v.even * weight[h].even);
  }
}
// merge: float [heads, head_dim + 2] of this warp in shared memory: values, then maximum and sum.
DEV void flash_store(const Flash& f, float* merge, int heads) {
  const int dim = (int)shape().head_dim;
  for (int h = 0; h < heads; h++) {
    float* to = merge + h * (dim + 2);
    for (int d = 0; d < dim; d++) to[d] = f.out[h][d];
    to[dim] = f.max[h], to[dim + 1] = f.sum[h];
  }
}

}  // namespace imex
