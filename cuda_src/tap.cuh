// The tap: every phase's output as fp32 in one buffer, for tests. Compiled out unless Shape.tap is set.
// float [num_layers][qkv | attn | o_proj | gate_up | down_proj][max_rows][their width], then embed [max_rows][hidden] and the
// logits [max_rows][vocab_rows]; imex_persist/tap.py computes the same offsets.
#pragma once
#include "block.cuh"

namespace imex {

DEV u32 tap_width(Phase phase) {
  const u32 heads = shape().num_heads, dim = shape().head_dim;
  switch (phase) {
    case Phase::kQkv: return (heads + 2 * shape().num_kv_heads) * dim;
    case Phase::kAttention: return heads * dim;
    case Phase::kOProj: return shape().hidden_size;
    case Phase::kGateUp: return shape().intermediate_size;
    case Phase::kDownProj: return shape().hidden_size * shape().down_slices;
    case Phase::kEmbed: return shape().hidden_size;
    default: return shape().vocab_rows;
  }
}
DEV u64 tap_layer_size() {
  u64 size = 0;
  for (u32 p = (u32)Phase::kQkv; p <= (u32)Phase::kDownProj; p++) size += (u64)shape().max_rows * tap_width((Phase)p);
  return size;
}
DEV u64 tap_offset(Phase phase, u32 layer) {
  const u64 layers = shape().num_layers * tap_layer_size();
  if (phase == Phase::kEmbed) return layers;
  if (phase == Phase::kLmHead) return layers + (u64)shape().max_rows * shape().hidden_size;
  u64 at = layer * tap_layer_size();
  for (u32 p = (u32)Phase::kQkv; p < (u32)phase; p++) at += (u64)shape().max_rows * tap_width((Phase)p);
  return at;
}
DEV void tap(const Block& b, Phase phase, int row, int n, float value) {
  if (!shape().tap) return;
  ((float*)b.params->tap)[tap_offset(phase, b.waiter.layer) + (u64)row * tap_width(phase) + n] = value;
}

}  // namespace imex
