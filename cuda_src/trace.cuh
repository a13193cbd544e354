// Tracing: when each block did what, by one of its consumer threads. Compiled out unless Shape.trace is set.
#pragma once
#include "block.cuh"

namespace imex {

DEV void mark(Block& b, Mark what, u32 value = 0) {
  if (!shape().trace || b.thread) return;
  TraceEvent* ring = (TraceEvent*)b.params->trace + (u64)b.index * shape().trace;
  store_event(&ring[b.num_events++ & (shape().trace - 1)], clock_low(), (u32)what | (u32)b.waiter.phase << 8 | b.waiter.layer << 16, value,
              b.step + 1);
}
// Clocks that the marking thread waited for tiles since the last call.
DEV u32 take_tile_clocks(Block& b) {
  const u32 clocks = b.tile_clocks;
  b.tile_clocks = 0;
  return clocks;
}

}  // namespace imex
