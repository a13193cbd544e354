// embed: token -> residual. Every block reads the rows' embeddings itself: nothing crosses.
#pragma once
#include "../exchange.cuh"
#include "../tap.cuh"

namespace imex {

DEV bool embed(Block& b) {
  b.waiter.phase = Phase::kEmbed;
  const int hidden = shape().hidden_size, rows = num_rows(b);
  const Norm norm = load_norm(b, runs(Phase::kQkv) && first_layer() == 0);
  float squares = 0.f;
  for (int row = 0; row < rows; row++) {
    const u32 token = b.shared->rows[row].token;
    // The table is in tile order like the LM head, which it is where embeddings are tied: 64-byte runs of 32 values.
    const char* from =
        (const char*)b.params->embed + ((u64)(token / kUnitRows) * (hidden / 32) * kUnitRows + token % kUnitRows) * 64;
    for (int i = 0; i < quads_per_thread(hidden / 4); i++) {
      const int n = 4 * quad_of(b, i);
      if (!is_quad(n / 4, hidden / 4)) continue;
      // A phase alone starts from a residual of zero.
      const u64 v = runs(Phase::kEmbed) ? load_const((const u64*)(from + n / 32 * (kUnitRows * 64) + n % 32 * 2)) : 0;
      const float values[4] = {bf16_low((u32)v), bf16_high((u32)v), bf16_low((u32)(v >> 32)), bf16_high((u32)(v >> 32))};
      set_residual(b, row, n, values);
      squares += put_residual(b, norm, row, i, v, true);
      for (int j = 0; j < 4; j++) tap(b, Phase::kEmbed, row, n + j, values[j]);
    }
  }
  const bool well = end_residual(b, norm, squares);
  mark(b, Mark::kEnd, rows);
  return well;
}

}  // namespace imex
