// qkv: residual -> q, k, v of every row. RMSNorm, the product, RoPE. q and k rows come in RoPE pairs (packing.py), so whoever adds a
// unit holds both halves of a pair and rotates it.
#pragma once
#include "../kv.cuh"
#include "../norm.cuh"
#include "../tap.cuh"

namespace imex {

DEV Matrix qkv_matrix(const Block& b) {
  const int units = 2 * qkv_width() / kUnitRows, hidden = shape().hidden_size;
  return {(const char*)b.params->qkv + (u64)b.waiter.layer * units * kUnitRows * hidden * 2,
          hidden,
          units,
          b.index,
          (int)shape().num_blocks,
          claim_counter(b, b.waiter.layer, 0),
          b.step / 2};
}

DEV void emit_qkv(Block& b, int unit, int slot) {
  const int dim = shape().head_dim, rotated = (shape().num_heads + shape().num_kv_heads) * dim, rows = num_rows(b);
  const u32 epoch = layer_epoch(b.step, b.waiter.layer);
  for (int i = b.lane; i < rows * (kUnitRows / 2); i += LANES) {
    const int row = i / (kUnitRows / 2), pair = i % (kUnitRows / 2), n = unit * kUnitRows + 2 * pair;
    const float scale = row_scale(b, row);
    float2 v = unit_sums(b, slot, row, pair);
    v = make_float2(v.x * scale, v.y * scale);
    if (n < rotated) {
      const float2 turn = rope_rows(b)[row * (dim / 2) + n % dim / 2];  // cos, sin
      v = make_float2(v.x * turn.x - v.y * turn.y, v.y * turn.x + v.x * turn.y);
    }
    store_word(own_words(b, shape().off_qkv + row * qkv_width() + n / 2), pack_bf16(v.x, v.y), epoch);
    tap(b, Phase::kQkv, row, n, v.x);
    tap(b, Phase::kQkv, row, n + 1, v.y);
  }
}

}  // namespace imex
