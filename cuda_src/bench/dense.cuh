// ONE_SHOT and ONE_SHOT_LOCAL with dense words, to be measured beside those with tagged words (words.cuh): 128-bit scalars of three payloads
// and an epoch, so that a block reads a quarter less for the same values. Two units of partial sums, 16 fp32 values, are six of them;
// 16 sums in bf16 are three. Ordering and reuse of the buffers are as in exchange.cuh: a dense word, too, is either whole or not there.
#pragma once
#include "../exchange.cuh"

namespace imex {

constexpr int kRun = 16;  // values that an owner's slice is a multiple of
DEV int num_runs() { return shape().hidden_size / kRun; }
DEV int owned_runs() { return divide_up(num_runs(), shape().num_blocks); }

// Dense word k of a unit's partial sums, [sources, max_rows, 3, hidden / 8]: values 3k .. 3k + 2, the last has two. A warp that reads 32 units
// finds each of their three words in 512 bytes in a row.
DEV u32 dense_part(Exchange x, u32 source, int row, int k, int unit) {
  return x.part_offset + 2 * (((source * shape().max_rows + row) * 3 + k) * (shape().hidden_size / kUnitRows) + unit);
}
// Dense word k of 16 sums, [max_rows, 3, hidden / 16]: bf16 pairs 3k .. 3k + 2.
DEV u32 dense_sum(Exchange x, int row, int k, int run) { return x.sum_offset + 2 * ((row * 3 + k) * num_runs() + run); }

template <class Sum>
DEV void send_dense_unit(const Block& b, Exchange x, int rows, u32 slice, int unit, u32 epoch, Sum sum) {
  const u32 source = b.params->rank * x.slices + slice;
  for (int i = b.lane; i < rows * 3; i += LANES) {
    const int row = i / 3, k = i % 3, pair = 3 * k / 2;  // values 0 1 2, 3 4 5, 6 7 are in pairs 0 1, 1 2, 3
    const float2 first = sum(row, pair), second = k < 2 ? sum(row, pair + 1) : float2{0.f, 0.f};
    const float v0 = k == 1 ? first.y : first.x, v1 = k == 1 ? second.x : first.y, v2 = k == 1 ? second.y : second.x;
    const u32 at = dense_part(x, source, row, k, unit);
    for (u32 r = 0; r < shape().world_size; r++)
      store_dense(words_of(b, r, at), float_bits(v0), float_bits(v1), float_bits(v2), epoch);
  }
}

// Hands dense words to use(i, k, words), i ascending; k is i % 3, a constant once unrolled. Every thread of a warp asks for the same count.
template <class Address, class Source, class Use>
DEV void gather_dense(Block& b, u32 epoch, int count, Address address, Source source, Use use) {
  constexpr int kBatch = 12;
  ROLLED for (int base = 0; base < count; base += kBatch) {
    u32 words[kBatch][3];
    const int left = count - base;
    wait_dense<kBatch>(
        b.waiter, Wait::kWords, epoch, left < kBatch ? left : kBatch, [&](int i) { return address(base + i); },
        [&](int i) { return source(base + i); }, words);
    UNROLL for (int i = 0; i < kBatch; i++)
      if (i < left) use(base + i, i % 3, words[i]);
  }
}

// Adds all sources' partial sums of units first .. first + count - 1 of every row, as far as they exist; add(row, unit, sums) takes a unit's
// eight. `count` is a constant: what is not costs a division for every word.
template <class Add>
DEV void add_dense_units(Block& b, Exchange x, u32 epoch, int first, int count, Add add) {
  const int loads = 3 * num_sources(x), total = num_rows(b) * count;
  auto item_of = [&](int i) { return b.thread + i / loads * kConsumerThreads; };
  auto held = [&](int i) { return (int)smaller(item_of(i), total - 1); };
  auto unit_of = [&](int i) { return first + held(i) % count; };
  const int units = shape().hidden_size / kUnitRows;
  float sum[kUnitRows];
  gather_dense(
      b, epoch, divide_up(total, kConsumerThreads) * loads,
      [&](int i) { return own_words(b, dense_part(x, i % loads / 3, held(i) / count, i % 3, smaller(unit_of(i), units - 1))); },
      [&](int i) { return (u32)(i % loads / 3) / x.slices; },
      [&](int i, int k, const u32 (&words)[3]) {
        const bool start = i % loads < 3;
        UNROLL for (int j = 0; j < 3; j++)
          if (3 * k + j < kUnitRows) sum[3 * k + j] = (start ? 0.f : sum[3 * k + j]) + bits_float(words[j]);
        if (i % loads == loads - 1 && item_of(i) < total && unit_of(i) < units) add(held(i) / count, unit_of(i), sum);
      });
}

DEV void put_dense_unit(Block& b, int row, int unit, const float (&v)[kUnitRows]) {
  for (int q = 0; q < 2; q++)
    put_quad(b, row, 2 * unit + q, (u64)pack_bf16(v[4 * q + 2], v[4 * q + 3]) << 32 | pack_bf16(v[4 * q], v[4 * q + 1]));
}

// As `receive`: all consumers; false when the block must leave.
DEV bool receive_dense_whole(Block& b, Exchange x, u32 epoch) {
  consumer_sync();
  add_dense_units(b, x, epoch, 0, shape().hidden_size / kUnitRows, [&](int row, int unit, float (&sum)[kUnitRows]) {
    float* r = residual(b) + row * shape().hidden_size + unit * kUnitRows;
    UNROLL for (int i = 0; i < kUnitRows; i++) r[i] = sum[i] = r[i] + sum[i];
    put_dense_unit(b, row, unit, sum);
  });
  return all_well(b);
}
DEV bool receive_dense_local(Block& b, Exchange x, u32 epoch) {
  consumer_sync();
  const int rows = num_rows(b), begin = b.index * owned_runs();
  if (begin < num_runs())
    add_dense_units(b, x, epoch, 2 * begin, 2 * owned_runs(), [&](int row, int unit, float (&sum)[kUnitRows]) {
      float* r = residual(b) + row * owned_runs() * kRun + (unit - 2 * begin) * kUnitRows;
      UNROLL for (int i = 0; i < kUnitRows; i++) r[i] = sum[i] = r[i] + sum[i];
      put_dense_unit(b, row, unit, sum);  // where the gather below will put the same again
    });
  if (!all_well(b)) return false;
  for (int i = b.thread; i < rows * owned_runs() * 3; i += kConsumerThreads) {
    const int row = i / 3 / owned_runs(), run = begin + i / 3 % owned_runs(), k = i % 3;
    if (run >= num_runs()) continue;
    const u32* pairs = (const u32*)(activations(b) + activation_offset(row, run * kRun)) + 3 * k;
    store_dense(own_words(b, dense_sum(x, row, k, run)), pairs[0], pairs[1], k < 2 ? pairs[2] : 0, epoch);
  }
  const int total = rows * num_runs();
  auto item_of = [&](int i) { return b.thread + i / 3 * kConsumerThreads; };
  auto held = [&](int i) { return (int)smaller(item_of(i), total - 1); };
  u32 pairs[kRun / 2];
  gather_dense(
      b, epoch, divide_up(total, kConsumerThreads) * 3,
      [&](int i) { return own_words(b, dense_sum(x, held(i) / num_runs(), i % 3, held(i) % num_runs())); },
      [&](int) { return b.params->rank; },
      [&](int i, int k, const u32 (&words)[3]) {
        UNROLL for (int j = 0; j < 3; j++)
          if (3 * k + j < kRun / 2) pairs[3 * k + j] = words[j];
        if (k < 2 || item_of(i) >= total) return;
        const int row = held(i) / num_runs(), quad = held(i) % num_runs() * (kRun / 4);
        UNROLL for (int q = 0; q < kRun / 4; q++) put_quad(b, row, quad + q, (u64)pairs[2 * q + 1] << 32 | pairs[2 * q]);
      });
  return all_well(b);
}

}  // namespace imex
