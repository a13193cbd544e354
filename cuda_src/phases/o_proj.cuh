// o_proj: head outputs -> partial sums of the hidden vector, pushed to whoever adds them as each unit finishes.
#pragma once
#include "../exchange.cuh"
#include "../stream.cuh"
#include "../tap.cuh"

namespace imex {

DEV void stream_o_proj(Block& b, Producer& p) {
  if (!runs(Phase::kOProj)) return;
  const int k = matrix_k(Phase::kOProj), units = shape().hidden_size / kUnitRows;
  const char* matrix = (const char*)b.params->o_proj + (u64)b.waiter.layer * shape().hidden_size * k * 2;
  push_units(b, p, matrix, k, {claim_counter(b, b.waiter.layer, 1), b.step / 2, units, b.index, (int)shape().num_blocks});
}

// Sends off a unit of a projection that ends in an exchange.
DEV void emit_partial(Block& b, Exchange x, u32 slice, int unit, int slot) {
  for (int i = b.lane; i < num_rows(b) * (kUnitRows / 2); i += LANES) {
    const int row = i / (kUnitRows / 2), pair = i % (kUnitRows / 2), n = unit * kUnitRows + 2 * pair;
    const float2 sum = unit_sums(b, slot, row, pair);
    push_partial(b, x, slice, row, n, sum, layer_epoch(b.step, b.waiter.layer));
    tap(b, b.waiter.phase, row, slice * shape().hidden_size + n, sum.x);
    tap(b, b.waiter.phase, row, slice * shape().hidden_size + n + 1, sum.y);
  }
}

DEV bool o_proj(Block& b) {
  if (!runs(Phase::kOProj)) return true;
  b.waiter.phase = Phase::kOProj;
  mark(b, Mark::kBegin);
  const u32 epoch = layer_epoch(b.step, b.waiter.layer);
  const int k = matrix_k(Phase::kOProj);
  if (!gather_activations(b, epoch, own_words(b, shape().off_attn), k / 2, k / 2)) return false;
  mark(b, Mark::kReady);
  multiply_units<Phase::kOProj>(b);
  mark(b, Mark::kEnd, take_tile_clocks(b));
  return true;
}

}  // namespace imex
