// o_proj: head outputs -> partial sums of the hidden vector, pushed to whoever adds them as each unit finishes.
#pragma once
#include "../exchange.cuh"
#include "../tap.cuh"

namespace imex {

DEV Matrix o_proj_matrix(const Block& b) {
  const int units = shape().hidden_size / kUnitRows, k = matrix_k(Phase::kOProj);
  return {(const char*)b.params->o_proj + (u64)b.waiter.layer * shape().hidden_size * k * 2,
          k,
          units,
          b.index,
          (int)shape().num_blocks,
          claim_counter(b, b.waiter.layer, 1),
          b.step / 2,
          -1};
}

// Sends off a unit of a projection that ends in an exchange.
DEV void emit_partial(Block& b, Exchange x, u32 slice, int unit, int slot) {
  const int rows = num_rows(b);
  for (int i = b.lane; i < rows * (kUnitRows / 2); i += LANES) {
    const int row = i / (kUnitRows / 2), pair = i % (kUnitRows / 2), n = unit * kUnitRows + 2 * pair;
    const float2 sum = unit_sums(b, slot, row, pair);
    push_partial(b, x, rows, slice, row, n, sum, layer_epoch(b.step, b.waiter.layer));
    tap(b, b.waiter.phase, row, slice * shape().hidden_size + n, sum.x);
    tap(b, b.waiter.phase, row, slice * shape().hidden_size + n + 1, sum.y);
  }
}

}  // namespace imex
