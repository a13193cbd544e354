// The stream: weight tiles and KV pages flow through a ring of shared-memory stages and never wait for activations.
//
// The producer (one thread) fills stages in a fixed order; all consumer warps walk the same order. A stage is handed over by two
// mbarriers, full and empty. A consumer warp waits for every stage in turn, also those it has no use for: parity cannot tell laps
// apart, so nobody may be more than one lap ahead, and waiting for each stage's `full` keeps it so.
#pragma once
#include "trace.cuh"

namespace imex {

// ---------------------------------------------------------------------------------------------- producer
struct Producer {
  RingCursor ring;      // the stage to fill next
  RingCursor trailing;  // `window` stages behind it
  int num_filled = 0;   // stages filled so far, counted up to `window`
  u32 num_lm_head_even = 0, num_lm_head_odd = 0;  // uses of the LM head's two claim counters: not every step has one
};

// Takes the next stage: waits until the consumers have left it, and until at most window - 1 copies are in flight. More in flight
// is only a queue in front of everybody's words (docs/performance.md); depth is for buffering while consumers wait.
DEV void take_stage(Block& b, Producer& p, int unit) {
  mbar_wait(b.waiter, Wait::kStage, true, &b.shared->empty[p.ring.stage], p.ring.parity ^ 1);
  if (p.num_filled == (int)shape().window) {
    mbar_wait(b.waiter, Wait::kTile, false, &b.shared->full[p.trailing.stage], p.trailing.parity);
    advance(p.trailing);
  } else {
    p.num_filled++;
  }
  b.shared->unit[p.ring.stage] = unit;  // released to the consumers by the arrival on `full`
}
DEV void push_tile(Block& b, Producer& p, int unit, const char* from, u32 bytes) {
  take_stage(b, p, unit);
  if (b.waiter.failed) return;
  u64* full = &b.shared->full[p.ring.stage];
  mbar_arrive_expect(full, bytes);
  bulk_copy(ring_stage(b, p.ring.stage), from, bytes, full);
  advance(p.ring);
}
DEV void push_mark(Block& b, Producer& p, int unit) {
  take_stage(b, p, unit);
  if (b.waiter.failed) return;
  mbar_arrive(&b.shared->full[p.ring.stage]);
  advance(p.ring);
}
// Nothing may land in shared memory once the block is gone: waits for the copies still in flight.
DEV void drain_copies(Block& b, Producer& p) {
  for (; p.num_filled; p.num_filled--) {
    mbar_drain(&b.shared->full[p.trailing.stage], p.trailing.parity);
    advance(p.trailing);
  }
}

// Units of a matrix, dealt to `num_blocks` blocks of which this is number `index`: the first is the block's own (so that every
// block has a word in o_proj and down_proj: condition C, exchange.cuh), the rest are claimed from a counter, since SMs do not run
// at one speed. Each use takes exactly `units` claims in all (every block with a unit of its own fails once), so `base`, where a
// use begins, is known without ever resetting the counter.
struct Deal {
  u32* counter;
  u32 uses;  // of the counter before this one
  int units, index, num_blocks;
};
DEV void push_units(Block& b, Producer& p, const char* matrix, int k, Deal deal) {
  const u32 unit_bytes = kUnitRows * k * 2, base = deal.uses * deal.units;
  int unit = deal.index;
  while (unit < deal.units && !b.waiter.failed) {
    const u32 claim = atomic_add_gpu(deal.counter, 1);  // one ahead: its latency hides behind the tiles
    for (u32 at = 0; at < unit_bytes; at += kStageBytes)
      push_tile(b, p, unit, matrix + (u64)unit * unit_bytes + at, smaller(kStageBytes, unit_bytes - at));
    unit = deal.num_blocks + (int)(claim - base);
  }
  push_mark(b, p, kUnitEnd);
}
DEV void push_norm(Block& b, Producer& p, u32 index) {  // weights of RMSNorm number `index` of the model
  const u32 bytes = shape().hidden_size * 2;
  const char* from = (const char*)b.params->norms + (u64)index * bytes;
  for (u32 at = 0; at < bytes; at += kStageBytes) push_tile(b, p, kUnitNorm, from + at, smaller(kStageBytes, bytes - at));
}

// Counters of this step: [step parity][layer][qkv, o_proj, gate_up, down_proj's slices] and the LM head's.
// Two parities suffice: a producer claims for step s + 2 only after its consumers began step s + 1, so after they passed `sample` of
// step s, which waits for a word of every block of the rank, and each block wrote that word after its last mark of step s.
DEV u32* claim_counter(const Block& b, u32 layer, u32 which) {
  const u32 per_layer = 3 + shape().down_slices, per_step = shape().num_layers * per_layer + 1;
  return (u32*)b.params->claims + (b.step & 1) * per_step + layer * per_layer + which;
}

// ---------------------------------------------------------------------------------------------- consumers
DEV void wait_full(Block& b) {
  u64* full = &b.shared->full[b.ring.stage];
  if (shape().trace && mbar_test(full, b.ring.parity)) return;  // a wait is timed only if its first poll fails
  const u32 began = shape().trace ? clock_low() : 0;
  mbar_wait(b.waiter, Wait::kTile, false, full, b.ring.parity);
  if (shape().trace) b.tile_clocks += clock_low() - began;
}
// Waits for the stage at the cursor; returns what it holds.
DEV int wait_stage(Block& b) {
  wait_full(b);
  return b.shared->unit[b.ring.stage];
}
DEV void release_stage(Block& b) {
  warp_sync();  // every lane has read it
  if (b.lane == 0) mbar_arrive(&b.shared->empty[b.ring.stage]);
  advance(b.ring);
}

// The unit's sums over K of two neighbouring output rows, added over the warps in a fixed order.
DEV float2 unit_sums(const Block& b, int slot, int row, int pair) {
  float2 sum = {0.f, 0.f};
  UNROLL for (int w = 0; w < kConsumerWarps; w++) {
    const float2 part = *(const float2*)(partial_sums(b, slot, w) + row * kUnitRows + 2 * pair);
    sum.x += part.x;
    sum.y += part.y;
  }
  return sum;
}

// Hands a unit, or a mark, to the adders: `store` leaves this warp's partial sums in the slot.
template <class Store>
DEV void hand_over(Block& b, int unit, Store store) {
  const int slot = b.num_units % kPartSlots;
  mbar_wait(b.waiter, Wait::kPartial, false, &b.shared->free[slot], (b.num_units / kPartSlots & 1) ^ 1);
  if (b.waiter.failed) return;
  store(slot);
  if (b.thread == 0) b.shared->notes[slot] = {unit, b.waiter.phase, b.waiter.layer, b.step};
  warp_sync();
  if (b.lane == 0) mbar_arrive(&b.shared->done[slot]);
  b.num_units++;
}
DEV void hand_over_mark(Block& b, int mark) {  // to each adder
  for (int i = 0; i < kAdderWarps; i++) hand_over(b, mark, [](int) {});
}

// Multiplies the activations with every unit the producer sends until its mark, and hands the sums to the adders, which send the
// results off while these warps go on: no barrier of the block, and nobody waits for anybody's addition.
template <Phase kPhase>
DEV void multiply_units(Block& b) {
  const int rows = num_rows(b), tiles = divide_up(matrix_k(kPhase), kTileK);
  Operand<kPhase> operand;
  operand_load(operand, activations(b), b.warp, rows);
  while (!b.waiter.failed) {
    Accum acc;
    accum_zero(acc);
    int unit = kUnitEnd;
    UNROLL for (int t = 0; t < tiles; t++) {
      wait_full(b);
      if (b.waiter.failed) return;
      accum_multiply(acc, ring_stage(b, b.ring.stage), operand, t, b.warp, rows);  // of a mark too, for nothing: it saves a round
      unit = b.shared->unit[b.ring.stage];
      release_stage(b);
      if (unit == kUnitEnd) return;
    }
    hand_over(b, unit, [&](int slot) { accum_store(acc, partial_sums(b, slot, b.warp), rows); });
  }
}

// Walks over a phase's stages without multiplying: what the producer prefetched for a step that never came.
DEV void skip_units(Block& b) {
  int unit;
  do {
    unit = wait_stage(b);
    if (b.waiter.failed) return;
    release_stage(b);
  } while (unit != kUnitEnd);
}

}  // namespace imex
