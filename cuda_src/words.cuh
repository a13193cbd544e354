// Tagged words: how activations cross blocks and ranks. A value and its epoch are one 64-bit store, so whoever sees the epoch it
// expects has the value: no fence, no flag. Nothing else becomes visible by it; what is not in the word needs a fence (kv.cuh).
#pragma once
#include "trace.cuh"

namespace imex {

// Hands `count` pairs of words to use(i, first, second), i ascending; address(i) is the pair's, source(i) the rank that owes it.
// A thread has up to kBatch pairs in flight. Every thread of a warp must ask for the same count.
template <int kBatch = 8, class Address, class Source, class Use>
DEV void gather(Block& b, u32 epoch, int count, Address address, Source source, Use use) {
  ROLLED for (int base = 0; base < count; base += kBatch) {
    u32 words[kBatch][2];
    const int left = count - base;
    wait_words<kBatch>(
        b.waiter, Wait::kWords, false, epoch, left < kBatch ? left : kBatch, [&](int i) { return address(base + i); },
        [&](int i) { return source(base + i); }, words);
  UNROLL for (int i = 0; i < kBatch; i++)
      if (i < left) use(base + i, words[i][0], words[i][1]);
  }
}

// All consumers together copy `count` words of bf16 pairs of each row, from `row_stride` words a row, into the activations,
// and meet at a barrier. False when the block must leave.
DEV bool gather_activations(Block& b, u32 epoch, const u64* words, int row_stride, int count) {
  const int pairs = count / 2, rows = num_rows(b);
  const int total = rows * pairs, mine = divide_up(total, kConsumerThreads);
  consumer_sync();  // the phase before has read what stood there
  mark(b, Mark::kMet);
  gather(
      b, epoch, mine,
      [&](int i) {
        const int at = smaller(b.thread + i * kConsumerThreads, total - 1);  // the last threads read a pair twice
        return words + (at / pairs) * row_stride + at % pairs * 2;
      },
      [&](int) { return b.params->rank; },
      [&](int i, u32 first, u32 second) {
        const int at = b.thread + i * kConsumerThreads;
        if (at < total) *(u64*)(activations(b) + activation_offset(at / pairs, at % pairs * 4)) = (u64)second << 32 | first;
      });
  return all_well(b);
}

}  // namespace imex
