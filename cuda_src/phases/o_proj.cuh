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
          b.step / 2};
}

// Sends off a unit of a projection that ends in an exchange.
DEV void emit_partial(Block& b, Exchange x, u32 slice, int unit, int slot) {
  send_unit(b, x, num_rows(b), slice, unit, layer_epoch(b.step, b.waiter.layer), [&](int row, int pair) {
    const float2 sum = unit_sums(b, slot, row, pair);
    const int n = slice * shape().hidden_size + unit * kUnitRows + 2 * pair;
    tap(b, b.waiter.phase, row, n, sum.x);
    tap(b, b.waiter.phase, row, n + 1, sum.y);
    return sum;
  });
}

}  // namespace imex
