// Giving up: a wait that has lasted too long writes down who waited for what and makes every rank's kernel return.
#pragma once
#include "block.cuh"

namespace imex {

// Every rank polls its own abort word only, in its own memory; whoever gives up stores to all of them. Relaxed is enough: the
// word itself is the news, and the record is for the host, which reads it after the kernel has returned.
DEV void raise_abort(const RankParams* params) {
  for (u32 r = 0; r < shape().world_size; r++) store_relaxed_sys(abort_word(params, r), 1);
}

DEV bool give_up(const RankParams* params, u32 block, u32 layer, Phase phase, Wait kind, bool idle, u32 source, u32 expected,
                      u32 seen, u64 began_ns) {
  if (load_relaxed_sys(abort_word(params, params->rank))) return true;
  const u64 waited_us = (timer_ns() - began_ns) / 1000;
  if (idle || waited_us < params->deadline_us) return false;
  if (atomic_exchange_sys(abort_word(params, params->rank), 1) == 0) {  // the first of the rank tells
    FaultRecord* fault = (FaultRecord*)params->fault;
    store_relaxed_sys(&fault->rank, params->rank);
    store_relaxed_sys(&fault->block, block);
    store_relaxed_sys(&fault->phase, (u32)phase);
    store_relaxed_sys(&fault->layer, layer);
    store_relaxed_sys(&fault->wait, (u32)kind);
    store_relaxed_sys(&fault->expected, expected);
    store_relaxed_sys(&fault->seen, seen);
    store_relaxed_sys(&fault->waited_us, (u32)waited_us);
    store_relaxed_sys(&fault->source, source);
    store_release_sys(&fault->valid, 1);
  }
  raise_abort(params);
  return true;
}

}  // namespace imex
