// down_proj: the widest activations -> partial sums of the hidden vector. With many rows K is split into slices: a block serves one,
// so that it holds a part of the activations only, and the slices add up in the exchange like extra ranks.
#pragma once
#include "o_proj.cuh"

namespace imex {

DEV u32 slice_of(const Block& b) { return b.index % shape().down_slices; }

DEV void stream_down_proj(Block& b, Producer& p) {
  if (!runs(Phase::kDownProj)) return;
  const u32 slices = shape().down_slices, slice = slice_of(b);
  const int k = matrix_k(Phase::kDownProj), units = shape().hidden_size / kUnitRows, peers = divide_up(shape().num_blocks - slice, slices);
  const char* matrix = (const char*)b.params->down_proj + ((u64)b.waiter.layer * slices + slice) * shape().hidden_size * k * 2;
  push_units(b, p, matrix, k, {claim_counter(b, b.waiter.layer, 3 + slice), b.step / 2, units, b.index / (int)slices, peers});
}

DEV bool down_proj(Block& b) {
  if (!runs(Phase::kDownProj)) return true;
  b.waiter.phase = Phase::kDownProj;
  mark(b, Mark::kBegin);
  const u32 epoch = layer_epoch(b.step, b.waiter.layer), slice = slice_of(b);
  const int k = matrix_k(Phase::kDownProj);
  if (!gather_activations(b, epoch, own_words(b, shape().off_gate + slice * k / 2), shape().intermediate_size / 2, k / 2)) return false;
  mark(b, Mark::kReady);
  multiply_units<Phase::kDownProj>(b);
  mark(b, Mark::kEnd, take_tile_clocks(b));
  return true;
}

}  // namespace imex
