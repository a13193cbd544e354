// down_proj: the widest activations -> partial sums of the hidden vector. K may be split into slices: a block serves one, so that it
// holds a part of the activations only, and the slices add up in the exchange like extra ranks.
#pragma once
#include "o_proj.cuh"

namespace imex {

DEV u32 slice_of(const Block& b) { return b.index % shape().down_slices; }

DEV Matrix down_proj_matrix(const Block& b, u32 uses) {
  const u32 slices = shape().down_slices, slice = slice_of(b);
  const int units = shape().hidden_size / kUnitRows, k = matrix_k(Phase::kDownProj);
  return {(const char*)b.params->down_proj + ((u64)b.waiter.layer * slices + slice) * shape().hidden_size * k * 2,
          k,
          units,
          b.index / (int)slices,
          (int)divide_up(shape().num_blocks - slice, slices),
          claim_counter(b, b.waiter.layer, 3 + slice),
          uses};
}

}  // namespace imex
