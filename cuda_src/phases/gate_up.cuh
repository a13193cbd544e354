// gate_up: residual -> SiLU(gate) * up. Takes in o_proj's exchange; gate and up rows alternate, so a pair of outputs is one value.
#pragma once
#include "../bare.cuh"
#include "../norm.cuh"
#include "../tap.cuh"

namespace imex {

DEV Matrix gate_up_matrix(const Block& b, u32 uses) {
  const int units = 2 * shape().intermediate_size / kUnitRows, hidden = shape().hidden_size;
  return {(const char*)b.params->gate_up + (u64)b.waiter.layer * units * kUnitRows * hidden * 2,
          hidden,
          units,
          b.index,
          (int)shape().num_blocks,
          claim_counter(b, b.waiter.layer, 2),
          uses};
}

DEV float silu(float x) { return fast_divide(x, 1.f + fast_exp(-x)); }

DEV void emit_gate_up(Block& b, int unit, int slot) {
  const int rows = num_rows(b);
  for (int i = b.lane; i < rows * 2; i += LANES) {  // a word is two values, four of the unit's outputs
    const int row = i / 2, half = i % 2, word = unit * 2 + half;
    const float2 first = unit_sums(b, slot, row, 2 * half), second = unit_sums(b, slot, row, 2 * half + 1);
    const float scale = row_scale(b, row);
    const float v0 = silu(first.x * scale) * (first.y * scale), v1 = silu(second.x * scale) * (second.y * scale);
    store_bare(own_bare_words(b, shape().off_gate, b.waiter.layer, row) + word, pack_bf16(v0, v1));
    tap(b, Phase::kGateUp, row, 2 * word, v0);
    tap(b, Phase::kGateUp, row, 2 * word + 1, v1);
  }
}

}  // namespace imex
