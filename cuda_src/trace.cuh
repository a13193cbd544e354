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
DEV void mark_clock(Block& b, Mark what) {
  if (!shape().trace || b.thread) return;
  if (!traced(b.step)) return;
  const u64 now = timer_ns();
  put_event(b, 0, clock_low(), (u32)what | (u32)(now >> 32) << 8, (u32)now, b.step);
}
// When an adder sent off its last unit of a phase: known, so written, when the next phase's first comes.
struct Sent {
  u32 first, last, what, step;
};
DEV void mark_sent(Block& b, int adder, Sent& words, const UnitNote& note, bool sent) {
  if (!shape().trace) return;
  warp_sync();  // all lanes' words have left
  if (b.lane) return;
  const u32 what = mark_of(Mark::kSent, note.phase, note.layer);
  if (words.what && (words.what != what || words.step != note.step)) {
    if (traced(words.step)) put_event(b, 1 + adder, words.last, words.what, words.last - words.first, words.step);
    words.what = 0;
  }
  if (!sent) return;
  const u32 now = clock_low();
  words = {words.what ? words.first : now, now, what, note.step};
}

// ---------------------------------------------------------------------------------------------- one axis for all clocks
// Every SM has a clock of its own, which is read in few cycles but does not keep its rate; every GPU has a timer. `mark_clock` pairs them,
// once a layer. What timers of different GPUs are to each other, words tell: before some steps rank 0's block 0 asks the block 0 of every
// other rank for its clock, a word there and a word back, kAlignRounds times. The answer's clock was read between question and reply, so
// the middle of the shortest round trip is off by half of it at most, whatever each way costs. Each rank's block 0 asks the other blocks
// of its rank too: that shows how well the timer places them. observe/clocks.py makes the axis of it. All partners are asked at once, a
// thread each; the other consumers wait.
// Words: each partner's question in its own memory, its answer in the asker's, epochs by round. One buffer each is enough: a question
// is asked when the one before has been answered, and an answer given when the question, which follows the answer before, is there.
DEV int num_partners() { return shape().num_blocks + shape().world_size; }  // blocks of the own rank, then ranks
DEV u64* align_word(const Block& b, u32 rank, int partner, bool answer) {
  return words_of(b, rank, shape().off_align + ((answer ? num_partners() : 0) + partner) * 4);
}
DEV u32 align_epoch(const Block& b, u32 round) { return b.num_aligns * kAlignRounds + round + 1; }

DEV void ask_clock(Block& b, int partner, u32 rank) {
  u32 asked = 0, shortest = ~0u, answer = 0;
  for (u32 round = 0; round < kAlignRounds; round++) {
    const u32 began = clock_low();
    store_words(align_word(b, rank, partner, false), 0, 0, align_epoch(b, round));
    u32 theirs;
    const u32 took =
        wait_word_clock(b.waiter, align_epoch(b, round), align_word(b, b.params->rank, partner, true), rank, theirs) - began;
    if (took < shortest) asked = began, shortest = took, answer = theirs;
  }
  if (b.waiter.failed) return;
  TraceEvent* events = (TraceEvent*)b.params->trace + (u64)shape().num_blocks * kTraceWriters * shape().trace;
  store_event(&events[b.num_aligns % kAlignSlots * num_partners() + partner], asked, shortest, answer, b.step + 1);
}
DEV void tell_clock(Block& b, int partner, u32 asker) {
  for (u32 round = 0; round < kAlignRounds; round++) {
    u32 unused;
    const u32 clock =
        wait_word_clock(b.waiter, align_epoch(b, round), align_word(b, b.params->rank, partner, false), asker, unused);
    store_words(align_word(b, asker, partner, true), clock, 0, align_epoch(b, round));
  }
}
// All consumers, at the begin of a step whose plan asks for it; false when the block must leave.
DEV bool align_clocks(Block& b) {
  if (!shape().trace || !(b.shared->plan[1] & kPlanAligns)) return true;
  constexpr int kAskers = kConsumerThreads - LANES;  // the last warp tells
  const int blocks = shape().num_blocks, rank = b.params->rank;
  if (b.index == 0 && b.thread < kAskers)
    for (int p = b.thread + 1; p < (rank ? blocks : num_partners()); p += kAskers)
      if (p != blocks) ask_clock(b, p, p < blocks ? rank : p - blocks);  // number `blocks` would be rank 0 itself
  if (b.thread == kAskers && (b.index || rank)) tell_clock(b, b.index ? b.index : blocks + rank, b.index ? rank : 0);
  b.num_aligns++;
  return all_well(b);
}
// Rank 0's mailbox, for the plan of `step`: whether clocks are aligned before it. They are after the kernel was idle, since an SM's clock
// wraps in 2 s, and then every kAlignEvery traced steps.
DEV bool plan_aligns(u32 step, bool idle, u32& next) {
  if (idle) next = step;
  if (!traced(step) || step < next) return false;
  next = step + kAlignEvery * shape().trace_every;
  return true;
}

// Clocks that the marking thread's warp waited for words since the last call.
DEV u32 take_word_clocks(Block& b) {
  if (!shape().trace) return 0;
  const u32 clocks = b.waiter.word_clocks;
  b.waiter.word_clocks = 0;
  return clocks;
}
// Clocks that the marking thread waited for tiles since the last call.
DEV u32 take_tile_clocks(Block& b) {
  if (!shape().trace) return 0;
  const u32 clocks = b.tile_clocks;
  b.tile_clocks = 0;
  return clocks;
}

}  // namespace imex
