// What every litmus kernel needs besides its own few lines: who it is, and a give_up that records the fault like faults.cuh.
#pragma once

#include "primitives.cuh"

namespace imex {

DEV bool give_up(const RankParams* params, Phase, u32, Wait kind, bool idle, u32 source, u32 expected, u32 seen, u64 began_ns) {
  auto abort_of = [&](u32 rank) { return (u32*)((u64*)params->peers[rank] + shape().off_abort); };
  if (load_relaxed_sys(abort_of(params->rank))) return true;
  const u64 waited_us = (timer_ns() - began_ns) / 1000;
  if (idle || waited_us < params->deadline_us) return false;
  FaultRecord* fault = (FaultRecord*)params->fault;
  if (!atomic_exchange_sys(&fault->valid, 1)) {
    fault->rank = params->rank, fault->block = grid_block() % shape().num_blocks, fault->wait = (u32)kind;
    fault->expected = expected, fault->seen = seen, fault->source = source, fault->waited_us = (u32)waited_us;
  }
  for (u32 r = 0; r < shape().world_size; r++) store_relaxed_sys(abort_of(r), 1);
  return true;
}

struct Me {
  const RankParams* params;
  u32 block;      // of the rank
  u64* words;     // own symmetric memory
  float* result;  // RankParams.tap
  Waiter waiter;
};
DEV Me who(const LaunchParams& p) {
  Me me{};
  me.params = &p.ranks[grid_block() / shape().num_blocks];
  me.block = grid_block() % shape().num_blocks;
  me.words = (u64*)me.params->peers[me.params->rank];
  me.result = (float*)me.params->tap;
  me.waiter = Waiter{me.params, 0, Phase::kEmbed, false};
  return me;
}
DEV u32 wait_one(Waiter& w, const u64* pair, u32 epoch, u32 source = 0,
                 bool idle = false) {  // the left payload of a pair of words
  u32 out[1][2];
  wait_words<1>(w, Wait::kWords, idle, epoch, 1, [&](int) { return pair; }, [&](int) { return source; }, out);
  return out[0][0];
}

}  // namespace imex
