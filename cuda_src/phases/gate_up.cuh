// gate_up: residual -> SiLU(gate) * up. Takes in o_proj's exchange; gate and up rows alternate, so a pair of outputs is one value.
#pragma once
#include "../exchange.cuh"
#include "../norm.cuh"
#include "../tap.cuh"

namespace imex {

DEV int gate_up_units() { return 2 * shape().intermediate_size / kUnitRows; }

DEV void stream_gate_up(Block& b, Producer& p) {
  if (!runs(Phase::kGateUp)) return;
  push_norm(b, p, 2 * b.waiter.layer + 1);
  const char* matrix = (const char*)b.params->gate_up + (u64)b.waiter.layer * gate_up_units() * kUnitRows * shape().hidden_size * 2;
  push_units(b, p, matrix, shape().hidden_size,
             {claim_counter(b, b.waiter.layer, 2), b.step / 2, gate_up_units(), b.index, (int)shape().num_blocks});
}

DEV float silu(float x) { return x / (1.f + fast_exp(-x)); }

DEV void emit_gate_up(Block& b, int unit, int slot) {
  const int width = shape().intermediate_size / 2;
  for (int i = b.lane; i < num_rows(b) * 2; i += LANES) {  // a word is two values, four of the unit's outputs
    const int row = i / 2, half = i % 2, word = unit * 2 + half;
    const float2 first = unit_sums(b, slot, row, 2 * half), second = unit_sums(b, slot, row, 2 * half + 1);
    const float v0 = silu(first.x) * first.y, v1 = silu(second.x) * second.y;
    store_word(own_words(b, shape().off_gate + row * width + word), pack_bf16(v0, v1), layer_epoch(b.step, b.waiter.layer));
    tap(b, Phase::kGateUp, row, 2 * word, v0);
    tap(b, Phase::kGateUp, row, 2 * word + 1, v1);
  }
}

DEV bool gate_up(Block& b) {
  if (!runs(Phase::kGateUp)) return true;
  b.waiter.phase = Phase::kGateUp;
  mark(b, Mark::kBegin);
  const u32 epoch = layer_epoch(b.step, b.waiter.layer);
  if (!receive(b, o_exchange(), epoch)) return false;
  mark(b, Mark::kInput);
  normalize(b);
  mark(b, Mark::kReady);
  multiply_units<Phase::kGateUp>(b);
  mark(b, Mark::kEnd, take_tile_clocks(b));
  return true;
}

}  // namespace imex
