// Litmus: a record is announced by its sequence word, stored last and with release. Every thread writes records into its partner's memory
// and reads the partner's: when the sequence is the expected one, and after a fence, the other seven words are there.
// A record is written again when the reader has answered with a word. BUG_NO_RELEASE stores the sequence like the rest.
// Records: u32 [num_blocks, threads, 8] at 1 MB of symmetric memory.
#include "litmus.cuh"

namespace imex {

constexpr u32 kFirstRecord = 1 << 20;

DEV bool swap(Me& me, u32 round) {
  const u32 rank = partner_rank(me), block = partner_block(me), epoch = round + 1, thread = warp_index() * LANES + lane_index();
  auto record_of = [&](u32 r, u32 b) {
    return (u32*)((char*)me.params->peers[r] + kFirstRecord) + (b * kLitmusThreads + thread) * 8;
  };
  auto word_of = [&](u32 b) { return (b * kLitmusThreads + thread) * 2; };
  u32* theirs = record_of(rank, block);
  for (u32 i = 1; i < 8; i++) store_relaxed_sys(theirs + i, payload_of(me.params->rank, me.block, thread * 8 + i, epoch));
#ifdef BUG_NO_RELEASE
  store_relaxed_sys(theirs, epoch);
#else
  store_release_sys(theirs, epoch);
#endif
  const u32* mine = record_of(me.params->rank, me.block);
  if (!look_until(me, epoch, [&] { return load_relaxed_sys(mine) == epoch; })) return false;
  fence_sys();
  u32 wrong = 0;
  for (u32 i = 1; i < 8; i++) wrong += load_relaxed_sys(mine + i) != payload_of(rank, block, thread * 8 + i, epoch);
  if (wrong) atomic_add_gpu(counts(me) + kWrong, wrong);
  store_words(words_at(me, rank, word_of(block)), 0, 0, epoch);
  wait_one(me.waiter, me.words + word_of(me.block), epoch, rank);
  return !me.waiter.failed;
}

}  // namespace imex

KERNEL decode(const GRID_CONSTANT imex::LaunchParams p) {
  using namespace imex;
  Me me = who(p);
  if (warp_index() >= kConsumerWarps) return;
  for (u32 round = 0; round < shape().num_layers; round++)
    if (!swap(me, round)) {
      atomic_add_gpu(counts(me) + kGaveUp, 1);
      return;
    }
}
