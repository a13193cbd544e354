// The stream: weight tiles and KV pages flow through a ring of shared-memory stages and never wait for activations.
//
// The producer warp fills stages in a fixed order; all consumer warps walk the same order. A stage is handed over by two mbarriers, full
// and empty. A consumer warp waits for every stage in turn, also those it has no use for: parity cannot tell laps apart, so nobody may
// be more than one lap ahead, and waiting for each stage's `full` keeps it so. Tiles of a unit go in groups of two on both sides: what
// a tile costs in instructions would otherwise be as much as what it costs in memory.
#pragma once
#include "trace.cuh"

namespace imex {

constexpr int kGroup = 2;
// Of consumers: with more rows a tile costs more arithmetic than instructions around it, and two would not fit the registers.
DEV int group_tiles() { return shape().max_rows <= 4 ? kGroup : 1; }

// ---------------------------------------------------------------------------------------------- producer
// Kept by every lane of the producer warp; lane i of a group looks after its tile i.
struct Producer {
  RingCursor ring;                                // the stage to fill next
  RingCursor trailing;                            // the oldest that was not seen to be full: `window` stages behind, once so many are filled
  u32 num_filled = 0;                             // stages filled so far, counted up to `window`
  u32 num_lm_head_even = 0, num_lm_head_odd = 0;  // uses of the LM head's two claim counters: not every step has one
  u32 leaving, num_sampling;  // of this step's plan, read at its begin: later the next step's may stand there
};

// Takes the next `count` stages (at most kGroup): waits until the consumers have left them, and until at most `window` copies will be in
// flight. More in flight is only a queue in front of everybody's words (docs/performance.md); depth is for buffering while consumers
// wait. False when the block must leave: then nothing was taken, so that what drain_copies waits for is exactly what was filled.
DEV bool take_stages(Block& b, Producer& p, int count, int unit) {
  for (int i = b.lane; i < count; i += LANES) {
    const RingCursor at = ahead(p.ring, i);
    mbar_wait(b.waiter, Wait::kStage, true, &b.shared->empty[at.stage], at.parity ^ 1);
    const int landed = (int)(p.num_filled + i) - (int)shape().window;  // which copy, from `trailing` on, must have arrived
    if (landed >= 0) {
      const RingCursor old = ahead(p.trailing, landed);
      mbar_wait(b.waiter, Wait::kTile, false, &b.shared->full[old.stage], old.parity);
    }
    if (!b.waiter.failed) b.shared->unit[at.stage] = unit;  // released to the consumers by the arrival on `full`
  }
  return !(b.waiter.failed = warp_any(b.waiter.failed));
}
DEV void pass_stages(Producer& p, int count) {
  p.ring = ahead(p.ring, count);
  const u32 filled = p.num_filled + count;
  p.num_filled = smaller(filled, shape().window);
  p.trailing = ahead(p.trailing, filled - p.num_filled);
}
// Streams `bytes` from memory through as many stages as they take.
DEV void push_tiles(Block& b, Producer& p, int unit, const char* from, u32 bytes) {
  ROLLED for (u32 at = 0; at < bytes; at += kGroup * kStageBytes) {
    const int count = smaller(kGroup, divide_up(bytes - at, kStageBytes));
    if (!take_stages(b, p, count, unit)) return;
    for (int i = b.lane; i < count; i += LANES) {
      const u32 begin = at + i * kStageBytes, size = smaller(kStageBytes, bytes - begin);
      const int stage = ahead(p.ring, i).stage;
      mbar_arrive_expect(&b.shared->full[stage], size);
      bulk_copy(ring_stage(b, stage), from + begin, size, &b.shared->full[stage]);
    }
    pass_stages(p, count);
  }
}
DEV void push_mark(Block& b, Producer& p, int unit) {
  if (!take_stages(b, p, 1, unit)) return;
  if (b.lane == 0) mbar_arrive(&b.shared->full[p.ring.stage]);
  pass_stages(p, 1);
}
// Nothing may land in shared memory once the block is gone: waits for the copies still in flight.
DEV void drain_copies(Block& b, Producer& p) {
  for (int i = b.lane; i < (int)p.num_filled; i += LANES) {
    const RingCursor at = ahead(p.trailing, i);
    mbar_drain(&b.shared->full[at.stage], at.parity);
  }
}

// Units of a matrix, dealt to `num_blocks` blocks of which this is number `index`. Most are dealt in rounds, since a claim's round trip
// is longer than a unit's time in the stream; the last two or three of a long phase are claimed from a counter, since SMs do not run
// at one speed. The first unit is always the block's own, so that every block has a word in o_proj and down_proj (condition C,
// exchange.cuh). A block has kClaims claims under way and stops at the first that fails, so each use of a counter takes a number of
// claims that is known (`claims_per_use`), and the counter is never reset.
constexpr int kClaims = 3;
struct Matrix {
  const char* weights;    // of this layer; of this block's slice of K
  int k, units;           // inputs, units of 8 outputs
  int index, num_blocks;  // among so many blocks units are dealt, and this one is number `index`
  u32* counter;           // of claims
  u32 uses;               // of the counter before this one
  int norm;               // number of the RMSNorm before it, -1: none
};
DEV int dealt_rounds(const Matrix& m) {
  const int rounds = m.units / m.num_blocks;
  return rounds < 4 ? rounds + 1 : rounds - 2;
}
DEV u32 claims_per_use(const Matrix& m) {
  const int claimed = m.units - dealt_rounds(m) * m.num_blocks;
  return claimed <= 0 ? 0 : claimed + kClaims * m.num_blocks;
}
// The block's last unit of a phase is known before it is pushed, and marked: an empty stage behind it would be one less for tiles.
DEV void push_units(Block& b, Producer& p, const Matrix& m) {
  const u32 per_use = claims_per_use(m), bytes = kUnitRows * m.k * 2;
  const int rounds = dealt_rounds(m);
  u32 claim[kClaims] = {};  // lane 0's
  for (int i = 0; i < kClaims && per_use && b.lane == 0; i++) claim[i] = atomic_add_gpu(m.counter, 1);
  int unit = m.index;
  if (unit >= m.units) return push_mark(b, p, kUnitEnd);
  ROLLED for (int r = 1; unit < m.units && !b.waiter.failed; r++) {
    int next = r < rounds ? unit + m.num_blocks : m.units;
    if (r >= rounds && per_use) {
      next = rounds * m.num_blocks + (int)(shuffle(claim[0], 0) - m.uses * per_use);
      UNROLL for (int i = 1; i < kClaims; i++) claim[i - 1] = claim[i];
      if (next < m.units && b.lane == 0) claim[kClaims - 1] = atomic_add_gpu(m.counter, 1);
    }
    push_tiles(b, p, next < m.units ? unit : unit | kLastUnit, m.weights + (u64)unit * bytes, bytes);
    unit = next;
  }
}
DEV void push_norm(Block& b, Producer& p, u32 index) {  // weights of RMSNorm number `index` of the model
  const u32 bytes = shape().hidden_size * 2;
  push_tiles(b, p, kUnitNorm, (const char*)b.params->norms + (u64)index * bytes, bytes);
}

// Counters of this step: [step parity][layer][qkv, o_proj, gate_up, down_proj's slices] and the LM head's.
// Two parities suffice: a producer claims for step s + 2 only after its consumers began step s + 1, so after they passed `sample` of
// step s, which waits for a word of every block of the rank, and each block wrote that word after its last mark of step s.
DEV u32* claim_counter(const Block& b, u32 layer, u32 which) {
  const u32 per_layer = 3 + shape().down_slices, per_step = shape().num_layers * per_layer + 1;
  return (u32*)b.params->claims + (b.step & 1) * per_step + layer * per_layer + which;
}

// ---------------------------------------------------------------------------------------------- consumers
// Waits, all lanes together, for the `count` (1 or 2) stages at the cursor; false when the block must leave.
DEV bool wait_stages(Block& b, int count) {
  const RingCursor second = ahead(b.ring, count - 1);
  u64 *full = &b.shared->full[b.ring.stage], *full2 = &b.shared->full[second.stage];
  const bool late = shape().trace && !mbar_test_now(full2, second.parity);  // a wait is timed only if its first poll fails
  const u32 began = late ? clock_low() : 0;
  const bool here = mbar_wait_warp(b.waiter, Wait::kTile, full, b.ring.parity, full2, second.parity);
  if (late) b.tile_clocks += clock_low() - began;
  return here;
}
// The warp has read the stages, or has loads of them under way whose values it has used.
DEV void release_stages(Block& b, int count) {
  warp_sync();
  for (int i = b.lane; i < count; i += LANES) mbar_arrive(&b.shared->empty[ahead(b.ring, i).stage]);
  b.ring = ahead(b.ring, count);
}
DEV bool wait_stage(Block& b) { return wait_stages(b, 1); }
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

// Hands a unit, or a mark, to the adders: `store` leaves this warp's partial sums in the slot. All lanes; false when the block must leave.
template <class Store>
DEV bool hand_over(Block& b, int unit, Store store) {
  const int slot = b.num_units % kPartSlots;
  u64* free = &b.shared->free[slot];
  const u32 parity = (b.num_units / kPartSlots & 1) ^ 1;
  if (!mbar_wait_warp(b.waiter, Wait::kPartial, free, parity, free, parity)) return false;
  store(slot);
  if (b.thread == 0) b.shared->notes[slot] = {unit, b.waiter.phase, b.waiter.layer, b.step};
  warp_sync();
  if (b.lane == 0) mbar_arrive(&b.shared->done[slot]);
  b.num_units++;
  return true;
}
DEV void hand_over_mark(Block& b, int mark) {  // to each adder
  for (int i = 0; i < kAdderWarps; i++) hand_over(b, mark, [](int) {});
}

// Multiplies the activations (K wide) with every unit the producer sends, and hands the sums to the adders, which send the results off
// while these warps go on: no barrier of the block, and nobody waits for anybody's addition. All warps work on the same tiles, so what
// one of them waits for, all do; hence each takes its share of the next group into registers before it multiplies the last one's.
DEV void multiply_units(Block& b, int k) {
  const int rows = num_rows(b), tiles = divide_up(k, kTileK), groups = divide_up(tiles, group_tiles());
  Share share[2][kGroup];  // in turn; the indices are constants
  int unit = kUnitEnd;
  auto size = [&](int group) { return (int)smaller(group_tiles(), tiles - group * group_tiles()); };
  auto take = [&](Share (&to)[kGroup], int group) {  // the stages at the cursor, which hold this group of a unit
    if (!wait_stages(b, size(group))) return false;
    UNROLL for (int i = 0; i < kGroup; i++) {
      const int tile = group * group_tiles() + i;
      if (i < group_tiles() && tile < tiles)
        share_load(to[i], ring_stage(b, ahead(b.ring, i).stage), activations(b) + activation_offset(0, tile * kTileK), k / 32 - tile * (kTileK / 32),
                   b.warp, rows);
    }
    if (group == 0) unit = b.shared->unit[b.ring.stage];
    return true;
  };
  if (!wait_stage(b)) return;
  if (b.shared->unit[b.ring.stage] == kUnitEnd) return release_stage(b);
  if (!take(share[0], 0)) return;
  release_stages(b, size(0));
  for (bool last = false; !last;) {
    const int now = unit & ~kLastUnit;
    last = unit & kLastUnit;
    Accum acc;
    accum_zero(acc);
    ROLLED for (int base = 0; base < groups; base += 2) {
      UNROLL for (int odd = 0; odd < 2; odd++) {
        const int group = base + odd, next = group + 1 < groups ? group + 1 : 0;
        if (group >= groups) break;
        const bool more = next || !last;
        if (more && !take(share[odd ^ 1], next)) return;
        UNROLL for (int i = 0; i < kGroup; i++)
          if (i < group_tiles() && group * group_tiles() + i < tiles) accum_multiply(acc, share[odd][i], rows);
        if (more) release_stages(b, size(next));  // its loads have had the time of a multiplication to arrive
      }
    }
    if (groups % 2) UNROLL for (int i = 0; i < kGroup; i++) share[0][i] = share[1][i];
    if (!hand_over(b, now, [&](int slot) { accum_store(acc, partial_sums(b, slot, b.warp), rows); })) return;
  }
}

// Walks over the stages of a matrix K wide without multiplying: what the producer prefetched for a step that never came.
DEV void skip_units(Block& b, int k) {
  for (int tile = 1; wait_stage(b);) {
    const int unit = b.shared->unit[b.ring.stage];
    release_stage(b);
    if (unit == kUnitNorm) continue;
    if (unit == kUnitEnd || (tile++ % divide_up(k, kTileK) == 0 && unit & kLastUnit)) return;
  }
}

}  // namespace imex
