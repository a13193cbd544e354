// embed: token -> residual. Every block reads the rows' embeddings itself: nothing crosses.
#pragma once
#include "../exchange.cuh"
#include "../tap.cuh"

namespace imex {

DEV bool embed(Block& b) {
  b.waiter.phase = Phase::kEmbed;
  if (!runs(Phase::kEmbed)) {  // a phase alone: starts from a residual of zero
    for (int row = 0; row < num_rows(b); row++)
      for (int n = 4 * b.thread; n < (int)shape().hidden_size; n += 4 * kConsumerThreads) set_residual(b, row, n, {0.f, 0.f, 0.f, 0.f});
    return all_well(b);
  }
  const int hidden = shape().hidden_size, rows = num_rows(b);
  for (int row = 0; row < rows; row++) {
    const u32 token = b.shared->rows[row].token;
    // The table is in tile order like the LM head, which it is where embeddings are tied: 64-byte runs of 32 values.
    const char* from = (const char*)b.params->embed + ((u64)(token / kUnitRows) * (hidden / 32) * kUnitRows + token % kUnitRows) * 64;
    for (int n = 4 * b.thread; n < hidden; n += 4 * kConsumerThreads) {
      const u64 v = load_const((const u64*)(from + n / 32 * (kUnitRows * 64) + n % 32 * 2));
      const float values[4] = {bf16_low((u32)v), bf16_high((u32)v), bf16_low((u32)(v >> 32)), bf16_high((u32)(v >> 32))};
      set_residual(b, row, n, values);
      *(u64*)(activations(b) + activation_offset(row, n)) = v;
      for (int i = 0; i < 4; i++) tap(b, Phase::kEmbed, row, n + i, values[i]);
    }
  }
  return all_well(b);
}

}  // namespace imex
