// Tracing: when each block did what. Compiled out unless Shape.trace is set; observe/spans.py reads it.
// A block has kTraceWriters rings, each with one writer that never waits: thread 0 of its consumers, then one lane of each adder.
#pragma once
#include "block.cuh"

namespace imex {

DEV bool traced(u32 step) { return shape().trace && step % shape().trace_every == 0; }
DEV u32 mark_of(Mark what, Phase phase, u32 layer) { return (u32)what | (u32)phase << 8 | layer << 16; }
DEV void put_event(Block& b, int writer, u32 clock, u32 what, u32 value, u32 step) {
  TraceEvent* ring = (TraceEvent*)b.params->trace + ((u64)b.index * kTraceWriters + writer) * shape().trace;
  store_event(&ring[b.num_events++ & (shape().trace - 1)], clock, what, value, step + 1);
}

#ifdef IMEX_PLANTED_DELAY  // tests only, {rank, block, phase, layer, ns}: one block that is late once a step
DEV void planted_delay(const Block& b) {
  constexpr u32 kDelay[5] = IMEX_PLANTED_DELAY;
  if (b.params->rank == kDelay[0] && b.index == (int)kDelay[1] && (u32)b.waiter.phase == kDelay[2] &&
      b.waiter.layer == kDelay[3])
    stand_still(kDelay[4]);
}
#else
DEV void planted_delay(const Block&) {}
#endif

DEV void mark(Block& b, Mark what, u32 value = 0) {
  if (!shape().trace || b.thread) return;
  if (!traced(b.step)) return;
  put_event(b, 0, clock_low(), mark_of(what, b.waiter.phase, b.waiter.layer), value, b.step);
  if (what == Mark::kReady) planted_delay(b);
}
// Pairs the SM's clock with the GPU's timer, whose higher bits take the place of phase and layer.
DEV void mark_clock(Block& b, u64 now) {
  if (!shape().trace || b.thread) return;
  if (!traced(b.step)) return;
  put_event(b, 0, clock_low(), (u32)Mark::kClock | (u32)(now >> 32) << 8, (u32)now, b.step);
}
// When an adder sent off its last unit of a phase: known, so written, when the next phase's first comes.
struct Sent {
  u32 clock, what, unit, step;
};
DEV void mark_sent(Block& b, int adder, Sent& last, const UnitNote& note, bool sent) {
  if (!shape().trace || b.lane) return;
  const u32 what = mark_of(Mark::kSent, note.phase, note.layer);
  if (last.what && (last.what != what || last.step != note.step)) {
    if (traced(last.step)) put_event(b, 1 + adder, last.clock, last.what, last.unit, last.step);
    last.what = 0;
  }
  if (sent) last = {clock_low(), what, (u32)note.unit, note.step};
}
// Clocks that the marking thread waited for words since the last call.
DEV u32 take_word_clocks(Block& b) {
  if (!shape().trace) return 0;
  const u32 clocks = b.waiter.word_clocks;
  b.waiter.word_clocks = 0;
  return clocks;
}
// Clocks that the marking thread waited for tiles since the last call.
DEV u32 take_tile_clocks(Block& b) {
  const u32 clocks = b.tile_clocks;
  b.tile_clocks = 0;
  return clocks;
}

}  // namespace imex
