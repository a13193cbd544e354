// qkv: residual -> q, k, v of every row. RMSNorm, the product, RoPE. q and k rows come in RoPE pairs (packing.py), so whoever adds a
// unit holds both halves of a pair and rotates it.
#pragma once
#include "../exchange.cuh"
#include "../kv.cuh"
#include "../norm.cuh"
#include "../tap.cuh"

namespace imex {

DEV int qkv_units() { return 2 * qkv_width() / kUnitRows; }

DEV void stream_qkv(Block& b, Producer& p) {
  if (!runs(Phase::kQkv)) return;
  push_norm(b, p, 2 * b.waiter.layer);
  const char* matrix = (const char*)b.params->qkv + (u64)b.waiter.layer * qkv_units() * kUnitRows * shape().hidden_size * 2;
  push_units(b, p, matrix, shape().hidden_size,
             {claim_counter(b, b.waiter.layer, 0), b.step / 2, qkv_units(), b.index, (int)shape().num_blocks});
}

DEV void emit_qkv(Block& b, int unit, int slot) {
  const int dim = shape().head_dim, rotated = (shape().num_heads + shape().num_kv_heads) * dim;
  const u32 epoch = layer_epoch(b.step, b.waiter.layer);
  for (int i = b.lane; i < num_rows(b) * (kUnitRows / 2); i += LANES) {
    const int row = i / (kUnitRows / 2), pair = i % (kUnitRows / 2), n = unit * kUnitRows + 2 * pair;
    float2 v = unit_sums(b, slot, row, pair);
    if (n < rotated) {
      const float2 turn = rope_rows(b)[row * (dim / 2) + n % dim / 2];  // cos, sin
      v = make_float2(v.x * turn.x - v.y * turn.y, v.y * turn.x + v.x * turn.y);
    }
    store_word(own_words(b, shape().off_qkv + row * qkv_width() + n / 2), pack_bf16(v.x, v.y), epoch);
    tap(b, Phase::kQkv, row, n, v.x);
    tap(b, Phase::kQkv, row, n + 1, v.y);
  }
}

DEV bool qkv(Block& b) {
  if (!runs(Phase::kQkv)) return true;
  b.waiter.phase = Phase::kQkv;
  mark(b, Mark::kBegin);
  const u32 epoch = layer_epoch(b.step, b.waiter.layer);
  if (b.waiter.layer > 0 && !receive(b, down_exchange(), epoch - 1)) return false;
  mark(b, Mark::kInput);
  normalize(b);
  mark(b, Mark::kReady);
  multiply_units<Phase::kQkv>(b);
  mark(b, Mark::kEnd, take_tile_clocks(b));
  return true;
}

}  // namespace imex
