// Bare words: pairs of bf16 without an epoch, half the bytes of tagged ones and half the instructions to take them in. What all blocks of a
// rank gather travels so: attention's output, gate_up's, and slice owners' sums. A place that nobody has written since it was cleared
// is zero, and a pair that is zero is sent with one zero negative, which adds the same to every sum. So what is not zero is there.
//
// A place must be cleared between two uses, and whoever polls it for the second must not find the first. Hence sets of places: layer l of step
// s is use u = s * num_layers + l and uses set u mod (num_layers + 1). A block clears its share of the set of use u - 1 in use u, when it has
// taken in o_proj's exchange (clear_set). Why that is enough:
//   - nobody reads or writes set u - 1 then. The block has, directly or through owners who did, an o_part word of use u of every block of every
//     rank (condition C, exchange.cuh), and each sent it after its consumers had read whatever they read of use u - 1. What was written there
//     somebody of the rank has read, so no store is still on its way: attention's words and the sums all blocks read, gate words those of the slice
//     of down_proj, and each slice has a block. In a step without logits the last layer writes no gate words and no down sums;
//   - the set is used again in use u + num_layers, which is of the next step. Between the two lies the end of this one: the zeros, a consumer
//     barrier, fence.acq_rel, the block's word of `sample`; every block's word, fence.acq_rel, barriers, whatever comes next (the KV rule's way,
//     kv.cuh). So the zeros happen before every poll and every store of the next use. At the GPU's scope, since a rank's words of a set are stored
//     and polled by its own blocks; in TWO_SHOT, where owners store to all ranks, at the system's (fence_step).
// Memory is zero at launch. Renewal (renew.cuh) does not touch the sets: they know no epochs.
#pragma once
#include "words.cuh"

namespace imex {

DEV u32 num_sets() { return shape().num_layers + 1; }
// Of use s * num_layers + l. Layers are counted from -1, the use before a step's first.
DEV u32 set_of(u32 step, int layer) {
  const u32 at = layer + num_sets() - step % num_sets();
  return at < num_sets() ? at : at - num_sets();
}
// A row's bare words from `offset` of a rank's symmetric memory on, which is Shape.off_attn or one of the three others, in the set of a layer. A
// set has the four kinds of a row beside each other, so those of the rows of a step are in one piece.
DEV u32* bare_words(const Block& b, u32 rank, u32 offset, int layer, int row) {
  return (u32*)words_of(b, rank, offset + (set_of(b.step, layer) * shape().max_rows + row) * shape().row_words);
}
DEV u32* own_bare_words(const Block& b, u32 offset, int layer, int row) {
  return bare_words(b, b.params->rank, offset, layer, row);
}

constexpr u32 kTwoZeros = 0x80000000u;  // as they are sent: the second is negative
DEV void store_bare(u32* p, u32 pair) { store_bare_word(p, pair ? pair : kTwoZeros); }

// Eight neighbours of a row, of which a thread gathers octs thread, thread + kConsumerThreads, …
struct alignas(16) Oct {
  u32 pairs[4];
};

// All consumers together copy `count` values of each row of a layer, from value `first` on, into the activations. There is no barrier before or
// after.
DEV void gather_bare(Block& b, u32 offset, int layer, int first, int count) {
  constexpr int kBatch = 8;
  const u32* words = own_bare_words(b, offset, layer, 0) + first / 2;
  const int octs = count / 8, per_row = divide_up(octs, kConsumerThreads), total = num_rows(b) * per_row;
  const int thread = not_before(b.thread);
  auto oct_of = [&](int i) { return thread + i % per_row * kConsumerThreads; };
  ROLLED for (int base = 0; base < total; base += kBatch) {
    const int left = total - base;
    u32 pairs[kBatch][4];
    wait_bare_words(
        b.waiter, layer_epoch(b.step, layer), left < kBatch ? left : kBatch,
        [&](int i) { return words + (base + i) / per_row * (2 * (int)shape().row_words) + 4 * smaller(oct_of(base + i), octs - 1); },
        b.params->rank, pairs);
    UNROLL for (int i = 0; i < kBatch; i++) {
      const int oct = oct_of(base + i);
      if (i >= left || oct >= octs) continue;
      *(Oct*)(activations(b) + activation_offset((base + i) / per_row, 8 * oct)) = {pairs[i][0], pairs[i][1], pairs[i][2], pairs[i][3]};
    }
  }
}
// The same, whole: after what stood there has been read, and until all have done it. False when the block must leave.
DEV bool gather_activations(Block& b, u32 offset, int first, int count) {
  consumer_sync();  // the phase before has read what stood there
  mark(b, Mark::kMet, take_tile_clocks(b));
  gather_bare(b, offset, b.waiter.layer, first, count);
  return all_well(b);
}

// All consumers, after o_proj's exchange: their share of what the rows had in the set of the use before.
DEV void clear_set(const Block& b) {
  if (shape().only_phase) return;  // then nothing says that others have read theirs
  const int rows = shape().max_rows == 1 ? 1 : b.waiter.layer ? b.shared->num_rows : b.shared->last_rows, chunks = rows * shape().row_words / 2;
  u32* set = own_bare_words(b, shape().off_attn, (int)b.waiter.layer - 1, 0);
  ROLLED for (int at = not_before(b.index * kConsumerThreads + b.thread); at < chunks; at += shape().num_blocks * kConsumerThreads)
    clear_bare_words(set + 4 * at);
}

}  // namespace imex
