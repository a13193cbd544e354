// All-gather: every block has a part of a vector of bf16 pairs, and every block of every rank ends with the whole of it as activations.
// Bare words go straight to all ranks, so one hop; nothing is added, so each rank has the same bits. Every block of every rank sends one word at
// least each time, after all its consumers had read what the time before brought (gather_activations ends in a barrier): so clear_set (bare.cuh)
// may follow.
#pragma once
#include "bare.cuh"

namespace imex {

// Pair number `index` of a row.
DEV void share_pair(const Block& b, int row, int index, u32 pair) {
  for (u32 r = 0; r < shape().world_size; r++)
    store_bare(bare_words(b, r, shape().off_o_sum, b.waiter.layer, row) + index, pair);
}
// All consumers; false when the block must leave.
DEV bool take_all_pairs(Block& b) { return gather_activations(b, shape().off_o_sum, 0, shape().hidden_size); }

}  // namespace imex
