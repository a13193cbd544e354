// Giving up: a wait that has lasted too long leaves a note in its block; the block's consumers vote to leave, write down for the host
// who waited for what, and make every rank's kernel return.
#pragma once
#include "block.cuh"

namespace imex {

// Every thread polls its own rank's abort word only, in its own memory; whoever gives up stores to all ranks'. Relaxed is enough: the
// word itself is the news, and the record is for the host, which reads it after the kernel has returned.
DEV void raise_abort(const RankParams* params) {
  for (u32 r = 0; r < shape().world_size; r++) store_relaxed_sys(abort_word(params, r), 1);
}

DEV bool aborted(const RankParams* params) { return load_relaxed_sys(abort_word(params, params->rank)); }

// The slow path of a wait for words, kept short: it stands inline in each. Own rank at once, so that waits without a deadline end too.
DEV bool give_up(const RankParams* params, Phase phase, u32 layer, Wait kind, bool idle, u32 source, u32 expected, u32 seen,
                 u64 began_ns) {
  if (aborted(params)) return true;
  const u64 waited_ns = timer_ns() - began_ns;
  if (idle || waited_ns < (u64)params->deadline_us * 1000) return false;
  ((Shared*)shared_memory())->fault = {1, (u32)phase, layer, (u32)kind, expected, seen, (u32)(waited_ns / 1000), source};
  store_relaxed_sys(abort_word(params, params->rank), 1);
  return true;
}

// The block's consumers, once they leave. The first block of a rank with a note tells the host.
DEV void report_fault(const Block& b) {
  const FaultNote& note = b.shared->fault;
  if (b.thread || !note.set) return;
  raise_abort(b.params);
  if (atomic_exchange_sys(abort_word(b.params, b.params->rank) + 1, 1)) return;
  FaultRecord* fault = (FaultRecord*)b.params->fault;
  store_relaxed_sys(&fault->rank, b.params->rank);
  store_relaxed_sys(&fault->block, b.index);
  store_relaxed_sys(&fault->phase, note.phase);
  store_relaxed_sys(&fault->layer, note.layer);
  store_relaxed_sys(&fault->wait, note.wait);
  store_relaxed_sys(&fault->expected, note.expected);
  store_relaxed_sys(&fault->seen, note.seen);
  store_relaxed_sys(&fault->waited_us, note.waited_us);
  store_relaxed_sys(&fault->source, note.source);
  store_release_sys(&fault->valid, 1);
}

}  // namespace imex
