// The tensor-core primitives when every lane is a fiber. Each lane reads its own part of the operands, at its own time, as a GPU's lane
// does, and results meet in one warp collective; fragments are not imitated, since nothing outside these functions may know them.
#pragma once

namespace imex {

DEV float bf16_at(const char* p, int i) {
  u16 v;
  memcpy(&v, p + 2 * i, 2);
  return bits_float((u32)v << 16);
}

struct Accum {
  float c[kMaxRows];  // this lane's output row and quarter of every chunk, per row of the step
  float result[4];    // after the warp has met: rows lane / 4 and lane / 4 + 8, columns 2 * (lane % 4) and the next
};
DEV void accum_zero(Accum& acc) {
  for (float& v : acc.c) v = 0.f;
}
// `count` chunks: of each this lane's 16 bytes of weights at w + j * w_stride, and the rows' activations, bf16 [max_rows, 32], at x +
// j * x_stride; rows: how many of max_rows are live.
DEV void accum_chunks(Accum& acc, const char* w, size_t w_stride, const char* x, size_t x_stride, int count, int rows) {
  const int quarter = lane_index() % 4;
  for (int j = 0; j < count; j++, w += w_stride, x += x_stride)
    for (int r = 0; r < rows; r++)
      for (int i = 0; i < 8; i++) acc.c[r] += bf16_at(w, i) * bf16_at(x + (r * 4 + quarter) * 16, i);
}
// part: float [max_rows, 8] in shared memory. A GPU's lanes need no meeting here; the fibers' do, as their sums are elsewhere.
DEV void accum_store(const Accum& acc, float* part, int rows) {
  Accum mine = acc;
  sim::collective(&mine, [](void** lane) {
    for (int i = 0; i < LANES; i++)
      for (int j = 0; j < 4; j++) {
        const int row = i / 4 + j / 2 * 8, column = i % 4 * 2 + j % 2;
        float s[4];
        for (int q = 0; q < 4; q++) s[q] = ((Accum*)lane[column * 4 + q])->c[row];
        ((Accum*)lane[i])->result[j] = (s[0] + s[1]) + (s[2] + s[3]);
      }
  });
  const int row = lane_index() / 4, column = 2 * (lane_index() % 4);
  for (int j = 0; j < 4; j++)
    if (row + j / 2 * 8 < rows) part[(row + j / 2 * 8) * kUnitRows + column + j % 2] = mine.result[j];
}

// One warp's running softmax over the chunks it has seen, for up to 16 query heads of one KV head. Every lane keeps maximum and sum;
// values of dims lane, lane + 32, …
struct Flash {
  float max[kMaxRows], sum[kMaxRows];
  float out[kMaxRows][kMaxHeadDim / LANES];
};
DEV void flash_zero(Flash& f) {
  for (float& v : f.max) v = kMinusInfinity;
  for (float& v : f.sum) v = 0.f;
  memset(f.out, 0, sizeof f.out);
}
// As on a GPU. q: bf16 [head_dim / 32, queries, 32]; chunk: 32 positions, as chunk.cuh has them.
template <bool kFirst>
DEV void flash_chunk(Flash& f, const char* q, const char* chunk, int queries, int heads, int valid, float scale) {
  if (kFirst) flash_zero(f);
  const int dim = (int)shape().head_dim, segments = dim / 32, p = lane_index();
  struct Part {
    float score[kMaxRows];
    Flash* flash;
    const float* met;  // [queries, 32] weights of the positions, then [queries] what is kept of earlier sums
  } part{};
  part.flash = &f;
  for (int h = 0; h < queries; h++) part.score[h] = kMinusInfinity;
  for (int h = 0; h < queries; h++) {
    if (p >= valid + h / heads) continue;
    float dot = 0.f;
    for (int s = 0; s < segments; s++)
      for (int i = 0; i < 32; i++)
        dot += bf16_at(q, (s * queries + h) * 32 + i) * bf16_at(chunk, key_offset(p, s * 32 + i) / 2);
    part.score[h] = dot * scale;
  }
  sim::Warp* warp = sim::machine.current->warp;
  sim::collective(&part, [&](void** lane) {
    float* met = warp->scratch[warp->turn];  // its last readers have met since, in the collective that used the other half
    for (int h = 0; h < queries; h++) {
      float m = f.max[h], sum = 0.f;
      for (int i = 0; i < LANES; i++) {
        const float s = ((Part*)lane[i])->score[h];
        m = s > m || s != s ? s : m;
      }
      for (int i = 0; i < LANES; i++) {
        const float e = fast_exp(((Part*)lane[i])->score[h] - m);
        sum += e;
        met[h * kChunk + i] = bits_float(round_bf16(e) << 16);
      }
      const float keep = fast_exp(f.max[h] - m), total = f.sum[h] * keep + sum;
      met[kMaxRows * kChunk + h] = keep;
      for (int i = 0; i < LANES; i++) ((Part*)lane[i])->flash->max[h] = m, ((Part*)lane[i])->flash->sum[h] = total;
    }
    for (int i = 0; i < LANES; i++) ((Part*)lane[i])->met = met;
  });
  for (int s = 0; s < segments; s++)
    for (int h = 0; h < queries; h++) {
      float sum = 0.f;
      for (int i = 0; i < kChunk; i++) sum += part.met[h * kChunk + i] * bf16_at(chunk, value_offset(i, s * 32 + p) / 2);
      f.out[h][s] = f.out[h][s] * part.met[kMaxRows * kChunk + h] + sum;
    }
}
// merge: float [queries, merge_width()] of this warp in shared memory: values, then maximum and sum.
DEV void flash_store(const Flash& f, float* merge, int queries) {
  const int dim = (int)shape().head_dim, lane = lane_index();
  for (int h = 0; h < queries; h++) {
    float* to = merge + h * merge_width();
    for (int s = 0; s < dim / 32; s++) to[s * 32 + lane] = f.out[h][s];
    if (lane == 0) to[dim] = f.max[h], to[dim + 1] = f.sum[h];
  }
}

}  // namespace imex
