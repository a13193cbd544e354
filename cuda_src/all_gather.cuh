// All-gather: every block has a part of a vector of bf16 pairs, and every block of every rank ends with the whole of it as activations.
// Words go straight to all ranks, so one hop; nothing is added, so each rank has the same bits.
//
// Two buffers, used in turn, are enough where every block of every rank sends at least one word each time. A block stores into a
// buffer again after it took in the other one, for which it had a word of every block; and each sent that word after all its
// consumers had read the first: gather_activations ends in a barrier.
#pragma once
#include "words.cuh"

namespace imex {

// Pair `index` of the vector, [rows, hidden / 2], in the buffer `offset` words from the start of symmetric memory.
DEV void share_pair(const Block& b, u32 offset, int index, u32 pair, u32 epoch) {
  for (u32 r = 0; r < shape().world_size; r++) store_word(words_of(b, r, offset) + index, pair, epoch);
}
// All consumers; false when the block must leave.
DEV bool take_all_pairs(Block& b, u32 offset, u32 epoch) {
  const int count = shape().hidden_size / 2;
  return gather_activations(b, epoch, own_words(b, offset), count, count);
}

}  // namespace imex
