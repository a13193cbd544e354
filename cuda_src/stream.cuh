// The stream: weight tiles and KV pages flow through a ring of shared-memory stages and never wait for activations.
//
// The producer (one thread) fills stages in a fixed order; all consumer warps walk the same order. A stage is handed over by two
// mbarriers, full and empty. A consumer warp waits for every stage, in turn or several at once, also those it has no use for: parity cannot tell laps
// apart, so nobody may be more than one lap ahead, and waiting for each stage's `full` keeps it so.
#pragma once
#include "trace.cuh"

namespace imex {

// What a tile costs in instructions is as much as what it costs in memory, so both sides test several barriers at once, off any loop, and
// have as few branches as can be (docs/performance.md).

// ---------------------------------------------------------------------------------------------- producer
struct Producer {
  RingCursor ring;     // the stage to fill next
  u32 num_filled = 0;  // stages filled so far, counted up to `window`
  u32 num_logits_even = 0,
      num_logits_odd = 0;             // steps with logits, by parity: uses of the claim counters that others leave alone
  u32 leaving = 0, num_sampling = 0;  // of this step's plan, read at its begin: later the next step's may stand there
};

// Takes the next stage: waits until the consumers have left it, and until at most window - 1 copies are in flight. More in flight
// is only a queue in front of everybody's words (docs/performance.md); depth is for buffering while consumers wait. False when the
// block must leave: then nothing was taken, so that what drain_copies waits for is exactly what was filled.
DEV bool take_stage(Block& b, Producer& p, int unit) {
  const RingCursor old = behind(p.ring, shape().window);
  const Pending left = {&b.shared->empty[p.ring.stage], p.ring.parity ^ 1};
  const Pending landed = p.num_filled == shape().window ? Pending{&b.shared->full[old.stage], old.parity} : left;
  if (!mbar_wait(b.waiter, Wait::kStage, true, left, landed)) return false;
  b.shared->unit[p.ring.stage] = unit;  // released to the consumers by the arrival on `full`
  return true;
}
DEV void pass_stage(Producer& p) {
  p.ring = ahead(p.ring, 1);
  p.num_filled = smaller(p.num_filled + 1, shape().window);
}
DEV void push_tile(Block& b, Producer& p, int unit, const char* from, u32 bytes) {
  if (!take_stage(b, p, unit)) return;
  u64* full = &b.shared->full[p.ring.stage];
  mbar_arrive_expect(full, bytes);
  bulk_copy(ring_stage(b, p.ring.stage), from, bytes, full);
  pass_stage(p);
}
DEV void push_mark(Block& b, Producer& p, int unit) {
  if (!take_stage(b, p, unit)) return;
  mbar_arrive(&b.shared->full[p.ring.stage]);
  pass_stage(p);
}
// Nothing may land in shared memory once the block is gone: waits for the copies still in flight.
DEV void drain_copies(Block& b, Producer& p) {
  for (; p.num_filled; p.num_filled--) {
    const RingCursor at = behind(p.ring, p.num_filled);
    mbar_drain({&b.shared->full[at.stage], at.parity});
  }
}

// Units of a matrix, dealt to `num_blocks` blocks of which this is number `index`. The first half of a long phase, and all of a short one,
// is dealt in rounds, since a claim's first round trip is not hidden; the rest is claimed from a counter, since SMs do not run at one speed.
// The first unit is always the block's own, so that every block has a word in o_proj and down_proj (condition C, exchange.cuh). A block has
// kClaims claims under way and stops at the first that fails, so each use of a counter takes a number of claims that is known
// (`claims_per_use`), and the counter is never reset.
constexpr int kClaims = 3;
struct Matrix {
  const char* weights;    // of this layer; of this block's slice of K
  int k, units;           // inputs, units of 8 outputs
  int index, num_blocks;  // among so many blocks units are dealt, and this one is number `index`
  u32* counter;           // of claims
  u32 uses;               // of the counter before this one
};
DEV int dealt_rounds(const Matrix& m) {
  const int rounds = m.units / m.num_blocks;
  return rounds < 4 ? rounds + 1 : rounds / 2;
}
DEV u32 claims_per_use(const Matrix& m) {
  const int claimed = m.units - dealt_rounds(m) * m.num_blocks;
  return claimed <= 0 ? 0 : claimed + kClaims * m.num_blocks;
}
DEV void push_unit(Block& b, Producer& p, const Matrix& m, int unit, int mark) {
  const u32 bytes = kUnitRows * m.k * 2;
  ROLLED for (u32 at = 0; at < bytes; at += kStageBytes)
    push_tile(b, p, unit | mark, m.weights + (u64)unit * bytes + at, smaller(kStageBytes, bytes - at));
}
// The block's last unit of a phase is known before it is pushed, and marked: an empty stage behind it would be one less for tiles.
DEV void push_units(Block& b, Producer& p, const Matrix& m) {
  const u32 per_use = claims_per_use(m);
  const int rounds = dealt_rounds(m);
  u32 claim[kClaims] = {};
  for (int i = 0; i < kClaims && per_use; i++) claim[i] = atomic_add_gpu(m.counter, 1);
  int unit = m.index;
  if (unit >= m.units) return push_mark(b, p, kUnitEnd);
  ROLLED for (int r = 1; unit < m.units && !b.waiter.failed; r++) {
    int next = r < rounds ? unit + m.num_blocks : m.units;
    if (r >= rounds && per_use) {
      next = rounds * m.num_blocks + (int)(claim[0] - m.uses * per_use);
      UNROLL for (int i = 1; i < kClaims; i++) claim[i - 1] = claim[i];
      if (next < m.units) claim[kClaims - 1] = atomic_add_gpu(m.counter, 1);
    }
    push_unit(b, p, m, unit, next < m.units ? 0 : kLastUnit);
    unit = next;
  }
}

// Counters of this step: [step parity][layer][qkv, o_proj, gate_up, down_proj's slices] and the LM head's.
// Two parities suffice: a producer claims for step s + 2 only after its consumers began step s + 1, so after they passed `sample` of
// step s, which waits for a word of every block of the rank, and each block wrote that word after its last mark of step s.
DEV u32* claim_counter(const Block& b, u32 layer, u32 which) {
  const u32 per_layer = 3 + shape().down_slices, per_step = shape().num_layers * per_layer + 1;
  return (u32*)b.params->claims + (b.step & 1) * per_step + layer * per_layer + which;
}

// ---------------------------------------------------------------------------------------------- consumers
constexpr int kStagesAtOnce = LANES / kWarpArrivals;  // a lane each: on a GPU all, and what is no loop has no branch back
// Waits, all lanes together, for the `count` (1 or 2) stages at the cursor, and perhaps for something else; false when the block must leave.
template <class... Also>
DEV bool wait_stages(Block& b, int count, Also... also) {
  const RingCursor second = ahead(b.ring, 1);
  const Pending full = {&b.shared->full[b.ring.stage], b.ring.parity}, full2 = {&b.shared->full[second.stage], second.parity};
  // A wait is timed only if its first poll fails, and by the warp that reports it alone: the poll costs as much as the wait's own.
  const bool late = traced(b.step) && b.warp == 0 && !mbar_test_now(count > 1 ? full2 : full);
  const u32 began = late ? clock_low() : 0;
  const bool here = count > 1 ? mbar_wait_warp(b.waiter, Wait::kTile, false, full, full2, also...) : mbar_wait_warp(b.waiter, Wait::kTile, false, full, also...);
  if (late) b.tile_clocks += clock_low() - began;
  return here;
}
// The warp has read the stages, or has asked for all it wants of them: the arrival releases, so those loads come before it.
DEV void release_stages(Block& b, int count) {
  warp_sync();
  for (int i = b.lane / kWarpArrivals; i < count; i = kStagesAtOnce > kMaxStages ? count : i + kStagesAtOnce)
    mbar_arrive(&b.shared->empty[ahead(b.ring, i).stage]);
  b.ring = ahead(b.ring, count);
}
DEV bool wait_stage(Block& b) { return wait_stages(b, 1); }
// The same for any number of stages, at once: each lane asks for one of its own, and warp_sync tells the others what it has seen.
DEV bool wait_run(Block& b, int count) {
  bool here = true;
  for (int base = 0; base < count && here; base += kStagesAtOnce) {
    const RingCursor at = ahead(b.ring, smaller(base + b.lane / kWarpArrivals, count - 1));
    const Pending full = {&b.shared->full[at.stage], at.parity};
    const bool late = traced(b.step) && b.warp == 0 && !warp_all(mbar_test_now(full));
    const u32 began = late ? clock_low() : 0;
    here = mbar_wait_warp(b.waiter, Wait::kTile, false, full);
    if (late) b.tile_clocks += clock_low() - began;
  }
  warp_sync();
  return here;
}
DEV void release_stage(Block& b) { release_stages(b, 1); }

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

// The part slot that this warp's unit number `n` goes to, once its last user's sums have been read.
DEV Pending free_slot(const Block& b, u32 n) { return {&b.shared->free[n % kPartSlots], (n / kPartSlots & 1) ^ 1}; }
// Hands a unit to the adders: `store` leaves this warp's partial sums in the slot, which is free. All lanes.
template <class Store>
DEV void hand_over(Block& b, int unit, Store store) {
  const int slot = b.num_units % kPartSlots;
  store(slot);
  if (b.thread == 0) b.shared->notes[slot] = {unit, b.waiter.phase, b.waiter.layer, b.step};
  warp_arrive(b, &b.shared->done[slot]);
  b.num_units++;
}
DEV void hand_over_mark(Block& b, int mark) {  // to each adder
  for (int i = 0; i < kAdderWarps; i++) {
    if (b.waiter.failed) return;  // who gave up owes units: its marks must not stand for them. Adders leave by the abort word
    if (!mbar_wait_warp(b.waiter, Wait::kPartial, false, free_slot(b, b.num_units))) return;
    hand_over(b, mark, [](int) {});
  }
}

// Multiplies the activations (K wide; known when the kernel is built, or 0) with every unit the producer sends, and hands the sums to the
// adders, which send the results off while these warps go on: no barrier of the block, and nobody waits for anybody's addition. All
// warps work on the same tiles, so what one of them waits for, all do; hence tiles go in groups of two, and a warp has its share of the
// group after the one that it multiplies in registers.
constexpr int kGroup = 2;
struct Group {
  Share share[kGroup];
  int unit = kUnitEnd;  // that it is of; kUnitEnd: nothing was taken
};
struct Groups {  // in turn
  Group even, odd;
};
DEV int tiles_of_unit(int k) { return divide_up(k, kTileK); }
DEV int tiles_of_group(int k) { return smaller(tiles_of_unit(k), group_tiles()); }  // the last may be smaller
DEV int groups_of_unit(int k) { return divide_up(tiles_of_unit(k), tiles_of_group(k)); }
DEV int tiles_in(int k, int group) { return smaller(tiles_of_group(k), tiles_of_unit(k) - group * tiles_of_group(k)); }
// The weights of a group, whose stages begin at `at`.
DEV void take_weights(const Block& b, Group& to, RingCursor at, int k, int group) {
  UNROLL for (int i = 0; i < kGroup; i++)
    if (i < tiles_in(k, group)) {
      const char* tile = ring_stage(b, ahead(at, i).stage);
      share_weights(to.share[i], tile, activations(b), group * tiles_of_group(k) + i, k / 32, b.warp);
    }
}
// The phase's first two groups, taken while the activations are still on their way: weights need not wait for them, and the stream may go on
// by as many stages. The second only if it is here already, and nothing when a wait gives up.
DEV void take_ahead(Block& b, Groups& taken) {
  const int k = matrix_k(b.waiter.phase), next = groups_of_unit(k) > 1, first = tiles_in(k, 0), both = first + tiles_in(k, next);
  auto here = [&](int i) {
    const RingCursor at = ahead(b.ring, i);
    return Pending{&b.shared->full[at.stage], at.parity};
  };
  // This is on the way of whoever is late: mostly all is here, and one question does. A ring has four stages at least.
  const bool all = warp_all(mbar_test_now(here(0), here(smaller(1, both - 1)), here(smaller(2, both - 1)), here(both - 1)));
  if (!all && !wait_stage(b)) return;
  const int unit = b.shared->unit[b.ring.stage];
  if (unit == kUnitEnd || (!all && !wait_stages(b, first))) return;  // behind the mark nothing may come
  take_weights(b, taken.even, b.ring, k, 0);
  taken.even.unit = unit;
  const bool second = (next || !(unit & kLastUnit)) && (all || warp_all(mbar_test_now(here(first), here(both - 1))));
  if (second) {
    const RingCursor at = ahead(b.ring, first);
    take_weights(b, taken.odd, at, k, next);
    taken.odd.unit = next ? unit : b.shared->unit[at.stage];
  }
  release_stages(b, second ? both : first);
}
template <int K>
DEV void multiply_units(Block& b, Groups& taken) {
  const int k = K ? K : matrix_k(b.waiter.phase), rows = num_rows(b), groups = groups_of_unit(k);
  Operand<K> operand;
  operand_load(operand, activations(b), b.warp, rows);
  u32 units = b.num_units;  // the number of the next unit to be taken
  int pending = 0;          // stages at the cursor of which loads are under way
  auto add_activations = [&](Group& to, int group) {
    UNROLL for (int i = 0; i < kGroup; i++)
      if (i < tiles_in(k, group)) share_activations(to.share[i], operand, activations(b), group * tiles_of_group(k) + i, k / 32, b.warp, rows);
  };
  auto take_here = [&](Group& to, int group, int unit) {
    take_weights(b, to, b.ring, k, group);
    add_activations(to, group);
    to.unit = unit;
    pending = tiles_in(k, group);
    return true;
  };
  // Both take a group, whose stages come next: a new unit's first, or another of `unit`. False when the block must leave.
  auto begin = [&](Group& to) {
    return wait_stages(b, tiles_in(k, 0), free_slot(b, units++)) && take_here(to, 0, b.shared->unit[b.ring.stage]);
  };
  auto go_on = [&](Group& to, int group, int unit) { return wait_stages(b, tiles_in(k, group)) && take_here(to, group, unit); };
  auto none = [](Group& to) {
    to.unit = kUnitEnd;
    return true;
  };
  if (taken.even.unit == kUnitEnd) {
    if (!b.waiter.failed) release_stage(b);  // the mark of a phase without a unit
    return;
  }
  if (!mbar_wait_warp(b.waiter, Wait::kPartial, false, free_slot(b, units++))) return;
  add_activations(taken.even, 0);
  if (taken.odd.unit != kUnitEnd) {
    if (groups == 1 && !mbar_wait_warp(b.waiter, Wait::kPartial, false, free_slot(b, units++))) return;
    add_activations(taken.odd, groups > 1);
  } else if (groups > 1 ? !go_on(taken.odd, 1, taken.even.unit) : !(taken.even.unit & kLastUnit) && !begin(taken.odd)) {
    return;
  }
  // A unit, whose first group is in `even` and the one after it in `odd`; false when the block must leave. Each group is multiplied and
  // makes room for the one after the next, so what is known when the kernel is built, the unit's end above all, is no branch.
  auto run = [&](Group& even, Group& odd) {
    Accum acc;
    accum_zero(acc);
    auto multiply = [&](Group& of, int group) {
      UNROLL for (int i = 0; i < kGroup; i++)
        if (i < tiles_in(k, group)) accum_multiply(acc, of.share[i], operand, group * tiles_of_group(k) + i, rows);
      release_stages(b, pending);  // of the group after: its loads have had the time of a multiplication to arrive
      pending = 0;
    };
    auto inner = [&](Group& of, Group& after, int group) {
      multiply(of, group);
      return go_on(of, group + 2, after.unit);
    };
    auto last_but_one = [&](Group& of, Group& after) {
      multiply(of, groups - 2);
      return after.unit & kLastUnit ? none(of) : begin(of);
    };
    auto last = [&](Group& of, Group& after) {
      multiply(of, groups - 1);
      hand_over(b, of.unit & ~kLastUnit, [&](int slot) { accum_store(acc, partial_sums(b, slot, b.warp), rows); });
      if (groups > 1) return after.unit == kUnitEnd ? none(of) : go_on(of, 1, after.unit);
      return after.unit & kLastUnit ? none(of) : begin(of);  // kUnitEnd has all bits
    };
    ROLLED for (int group = 0; group + 3 < groups; group += 2)
      if (!inner(even, odd, group) || !inner(odd, even, group + 1)) return false;
    if (groups == 1) return last(even, odd);
    if (groups % 2 == 0) return last_but_one(even, odd) && last(odd, even);
    return inner(even, odd, groups - 3) && last_but_one(odd, even) && last(even, odd);
  };
  while (taken.even.unit != kUnitEnd && run(taken.even, taken.odd))
    if (groups % 2 && (taken.odd.unit == kUnitEnd || !run(taken.odd, taken.even))) return;
}

// Walks over the stages of a matrix K wide without multiplying: what the producer prefetched for a step that never came.
DEV void skip_units(Block& b, int k) {
  for (int tile = 1; wait_stage(b);) {
    const int unit = b.shared->unit[b.ring.stage];
    release_stage(b);
    if (unit == kUnitEnd || (tile++ % divide_up(k, kTileK) == 0 && unit & kLastUnit)) return;
  }
}

}  // namespace imex
