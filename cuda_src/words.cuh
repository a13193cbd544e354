// Tagged words: how partial sums, queries, keys and values, plans and tokens cross blocks and ranks. A value and its epoch are one 64-bit
// store, so whoever sees the epoch it expects has the value: no fence, no flag. Nothing else becomes visible by it; what is not in the word needs a fence (kv.cuh).
//
// A tagged word has 32 bits of payload and the epoch. A wide word has 48, and of the epoch the last 16: enough while epochs begin again before
// they have counted so far (renew_steps), since a word that nobody wrote for so long would else look new. A bare word has no epoch (bare.cuh).
#pragma once
#include "trace.cuh"

namespace imex {

// Two partial sums in a wide word: fp32 without the last 8 bits of its fraction, rounded to nearest, 256 times finer than bf16. What is no
// number stays none.
DEV u32 to_float24(float v) { return v != v ? 0x7fffff : (float_bits(v) + 0x80) >> 8; }
DEV u64 pack_float24(float first, float second) { return (u64)to_float24(second) << 24 | to_float24(first); }
DEV float2 unpack_float24(u64 pair) { return {bits_float((u32)pair << 8), bits_float((u32)(pair >> 16) & ~0xffu)}; }

// Waits for `count` pairs of words; address(i) is a pair's, source(i) the rank that owes it. A thread has up to kBatch pairs in flight, and
// use(i, live, first, second) is called for whole batches, i ascending: beyond `count` the words are 0 and `live` is false. What that guards
// should be so little that it takes a predicate and no branch, which costs as much as ten other instructions. Every thread of a warp must
// ask for the same count.
template <int kBatch = 8, class Payload = u32, class Address, class Source, class Use>
DEV void gather_batches(Block& b, u32 epoch, int count, Address address, Source source, Use use) {
  ROLLED for (int batch = 0; batch * kBatch < count; batch++) {
    const int base = batch * kBatch, left = count - base;
    Payload words[kBatch][2];
    wait_words<kBatch, true>(
        b.waiter, Wait::kWords, false, epoch, left < kBatch ? left : kBatch, [&](int i) { return address(base + i); },
        [&](int i) { return source(base + i); }, words);
    UNROLL for (int i = 0; i < kBatch; i++) use(base + i, i < left, words[i][0], words[i][1]);
  }
}
// The same, use(i, first, second) only for the `count` pairs there are.
template <int kBatch = 8, class Address, class Source, class Use>
DEV void gather(Block& b, u32 epoch, int count, Address address, Source source, Use use) {
  gather_batches<kBatch>(b, epoch, count, address, source, [&](int i, bool live, u32 first, u32 second) {
    if (live) use(i, first, second);
  });
}

// Which quads (four neighbours) of a row are a thread's: quads thread, thread + kConsumerThreads, …, the same for every row whatever the
// other rows are. The last may not exist.
DEV int quads_per_thread(int quads) { return divide_up(quads, kConsumerThreads); }
DEV int quad_of(const Block& b, int i) { return b.thread + i * kConsumerThreads; }
DEV bool is_quad(int quad, int quads) { return quads % kConsumerThreads == 0 || quad < quads; }
DEV int held_quad(int quad, int quads) { return is_quad(quad, quads) ? quad : quads - 1; }  // threads without one read another's

DEV u64* quad_at(const Block& b, int row, int quad) { return (u64*)(activations(b) + activation_offset(row, 4 * quad)); }
DEV void put_quad(Block& b, int row, int quad, u64 v) { *quad_at(b, row, quad) = v; }

}  // namespace imex
