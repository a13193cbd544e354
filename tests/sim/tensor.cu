// The tensor-core primitives of one warp. Shape.only_phase 0: a unit, tile bf16 [hidden_size / 32, 8, 32] (RankParams.qkv) times
// x bf16 [hidden_size / 32, max_rows, 32] (o_proj); tap: float [max_rows, 8]. 1: attention of num_heads heads over num_layers positions
// in chunks (kv), q bf16 [head_dim / 32, heads, 32] (o_proj); tap: float [heads, merge_width()]. 2: fast_exp, 3: natural_log of
// float [num_layers] (qkv).
#include "litmus.cuh"

KERNEL decode(const GRID_CONSTANT imex::LaunchParams p) {
  using namespace imex;
  Me me = who(p);
  if (warp_index() != 0) return;
  const Shape& s = shape();
  char* x = shared_memory();
  float* part = (float*)(shared_memory() + 65536);
  const u32 x_words = s.only_phase == 0 ? s.hidden_size * s.max_rows / 2 : s.head_dim * s.num_heads / 2;
  for (u32 i = lane_index(); i < x_words && s.only_phase < 2; i += LANES)
    ((u32*)x)[i] = load_const((const u32*)me.params->o_proj + i);
  warp_sync();
  u32 results = 0;
  if (s.only_phase == 0) {
    Accum acc;
    accum_zero(acc);
    const int chunks = s.hidden_size / 32;
    Share share;
    Operand<0> operand;
    for (int w = 0; w < kConsumerWarps; w++)
      for (int t = 0; t < (chunks + 31) / 32; t++) {
        share_weights(share, (const char*)me.params->qkv + (size_t)t * kStageBytes, x, t, chunks, w);
        share_activations(share, operand, x, t, chunks, w, s.max_rows);
        accum_multiply(acc, share, operand, t, s.max_rows);
      }
    accum_store(acc, part, s.max_rows);
    results = s.max_rows * 8;
  } else if (s.only_phase == 1) {
    Flash f;
    for (int at = 0; at < (int)s.num_layers; at += kChunk) {
      const int valid = (int)s.num_layers - at < kChunk ? (int)s.num_layers - at : kChunk;
      (at ? flash_chunk<false> : flash_chunk<true>)(f, x, (const char*)me.params->kv + (size_t)at * s.head_dim * 4, s.num_heads,
                                                    s.num_heads, valid, s.attn_scale);
    }
    flash_store(f, part, s.num_heads);
    results = s.num_heads * merge_width();
  } else {
    for (u32 i = lane_index(); i < s.num_layers; i += LANES)
      part[i] = (s.only_phase == 2 ? fast_exp : natural_log)(bits_float(load_const((const u32*)me.params->qkv + i)));
    results = s.num_layers;
  }
  warp_sync();
  for (u32 i = lane_index(); i < results; i += LANES) me.result[i] = part[i];
}
