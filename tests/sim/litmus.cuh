// What every small kernel here needs besides its own few lines: who it is, and a give_up that records the fault like faults.cuh.
// The litmus tests proper, whose rules docs/litmus.md argues, also compile for GPUs: message, reuse, kv, fence, poll, record.
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

DEV bool aborted(const RankParams* params) {
  return load_relaxed_sys((u32*)((u64*)params->peers[params->rank] + shape().off_abort));
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

// ---------------------------------------------------------------------------------------------- litmus tests
// Every block has a partner: the same block of the other rank, or with one rank the neighbouring block. RankParams.tap counts, u32.
constexpr u32 kLitmusThreads = kConsumerWarps * LANES;
enum Count { kWrong, kTorn, kGaveUp };
DEV u32* counts(const Me& me) { return (u32*)me.params->tap; }
DEV u32 partner_rank(const Me& me) { return shape().world_size == 2 ? me.params->rank ^ 1 : me.params->rank; }
DEV u32 partner_block(const Me& me) { return shape().world_size == 2 ? me.block : me.block ^ 1; }
DEV u64* words_at(const Me& me, u32 rank, u32 offset) { return (u64*)me.params->peers[rank] + offset; }
// What word `index` of a sender holds in a round: nothing that another word or round has too, as far as a test will see.
DEV u32 payload_of(u32 rank, u32 block, u32 index, u32 epoch) {
  u32 h = epoch * 0x9e3779b1u ^ (rank * 1024 + block) * 0x85ebca77u ^ index * 0xc2b2ae3du;
  h ^= h >> 15;
  return h * 0x27d4eb2fu;
}
// Looks again and again until `there()`, as the mailbox does; false when the deadline passes.
template <class There>
DEV bool look_until(Me& me, u32 expected, There there) {
  const u64 began = timer_ns();
  for (u32 polls = 1; !there(); polls++) {
    if (polls % kPollsPerCheck == 0 &&
        give_up(me.params, Phase::kEmbed, 0, Wait::kWords, false, partner_rank(me), expected, 0, began))
      return false;
    mailbox_pause();
  }
  return true;
}

}  // namespace imex
