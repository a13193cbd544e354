// SEMAPHORE: the exchange as it is usually written, to set the tagged words beside it. Partial sums are plain stores into every rank's
// memory; then a fence, and a signal for the unit; whoever adds waits for all signals, fences, and reads plainly.
//
// Ordering. A unit's values are stored by the lanes of one warp; warp_sync makes them happen before its lane 0's fence, and that before
// its signal. A consumer that has seen the signal fences, and the barrier after it hands what it has seen to the whole block. So the
// values happen before the block's plain loads of them. Reuse: the same chain backwards. A block's plain loads of layer l happen before
// its signals of the next exchange (barriers, the adders' mbarriers, a fence), which every block waits for before it stores again. After
// a step without logits, whose last exchange is o_proj's, it is the words of `sample` that do, with fences of the system on both sides.
// The values lie where the other strategies keep tagged words, so a kernel must not use both: planner.py sees to it.
#pragma once
#include "norm.cuh"
#include "words.cuh"

namespace imex {

// A buffer of partial sums, `part` words from the start of a rank's symmetric memory, [sources, max_rows, hidden] of 8 bytes each:
// the first half holds the values, float [sources, max_rows, hidden]; then follow the signals, words [sources, hidden / 8].
DEV float* plain_values(const Block& b, u32 rank, u32 part, u32 source, int row) {
  return (float*)words_of(b, rank, part) + ((u64)source * shape().max_rows + row) * shape().hidden_size;
}
DEV u64* unit_signals(const Block& b, u32 rank, u32 part, u32 sources) {
  return words_of(b, rank, part) + sources * shape().max_rows * shape().hidden_size / 2;
}

// All lanes of the warp that stored the unit's values, after it has.
DEV void raise_signals(const Block& b, u32 part, u32 sources, u32 source, int unit, u32 epoch) {
  warp_sync();
  if (b.lane) return;
  fence_sys();
  const u32 at = source * (shape().hidden_size / kUnitRows) + unit;
  for (u32 r = 0; r < shape().world_size; r++) store_word(unit_signals(b, r, part, sources) + at, 0, epoch);
}

// All consumers; a barrier. False when the block must leave.
DEV bool await_signals(Block& b, u32 part, u32 sources, u32 epoch) {
  const int units = shape().hidden_size / kUnitRows, pairs = sources * units / 2;  // a multiple of 4 units: hidden is one of 32
  const u64* signals = unit_signals(b, b.params->rank, part, sources);
  const u32 per_rank = sources / shape().world_size;
  auto pair_of = [&](int i) { return (int)smaller(b.thread + i * kConsumerThreads, pairs - 1); };
  gather(
      b, epoch, divide_up(pairs, kConsumerThreads), [&](int i) { return signals + 2 * pair_of(i); },
      [&](int i) { return (u32)(2 * pair_of(i) / units) / per_rank; }, [](int, u32, u32) {});
  fence_sys();
  return all_well(b);
}

// Adds every source's values to the replicated residual, and returns the squares, as receive_whole does.
DEV float add_plain_values(Block& b, const Norm& norm, u32 part, u32 sources) {
  const int quads = shape().hidden_size / 4, per_row = quads_per_thread(quads);
  float squares = 0.f;
  for (int row = 0; row < num_rows(b); row++)
    for (int i = 0; i < per_row; i++) {
      const int quad = quad_of(b, i);
      if (!is_quad(quad, quads)) continue;
      float4 sum = {0.f, 0.f, 0.f, 0.f};
      for (u32 s = 0; s < sources; s++) {
        const float4 v = load_global((const float4*)plain_values(b, b.params->rank, part, s, row) + quad);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      squares += add_to_residual(b, norm, row, i, sum, true);
    }
  return squares;
}

}  // namespace imex
