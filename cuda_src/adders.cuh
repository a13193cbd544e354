// The adders: warps that sum what the consumer warps computed of a unit, each over its share of K, and send the result where the phase
// wants it. Consumers never wait for an addition; with one of them adding in turn, every unit waited for the one before.
#pragma once
#include "phases/down_proj.cuh"
#include "phases/gate_up.cuh"
#include "phases/lm_head.cuh"
#include "phases/o_proj.cuh"
#include "phases/qkv.cuh"

namespace imex {

// Units go to the adders in turn; the note in the slot says which phase, layer and step the unit is of.
DEV void add_units(Block& b, int adder) {
  Candidates candidates;
  clear(candidates);
  Sent sent = {};
  for (u32 n = adder;; n += kAdderWarps) {
    const int slot = n % kPartSlots;
    const Pending done = {&b.shared->done[slot], n / kPartSlots & 1};
    if (!mbar_wait_warp(b.waiter, Wait::kPartial, true, done)) return;
    const UnitNote note = b.shared->notes[slot];
    mark_sent(b, adder, sent, note, false);
    if (note.unit == kUnitExit) return;
    const bool begins = n < kAdderWarps || note.phase != b.waiter.phase || note.layer != b.waiter.layer || note.step != b.step;
    b.waiter.phase = note.phase;
    b.waiter.layer = note.layer;
    b.step = note.step;
    if (begins && note.phase != Phase::kOProj && note.phase != Phase::kDownProj) put_row_scales(b, adder, num_rows(b));
    switch (note.phase) {
      case Phase::kQkv: emit_qkv(b, note.unit, slot); break;
      case Phase::kOProj: emit_partial(b, o_exchange(), 0, note.unit, slot); break;
      case Phase::kGateUp: emit_gate_up(b, note.unit, slot); break;
      case Phase::kDownProj: emit_partial(b, down_exchange(), slice_of(b), note.unit, slot); break;
      default: note.unit == kUnitEnd ? put_candidates(b, candidates, adder) : keep_best(b, candidates, note.unit, slot);
    }
    mark_sent(b, adder, sent, note, note.phase != Phase::kLmHead);
    warp_arrive(b, &b.shared->free[slot]);
  }
}

}  // namespace imex
