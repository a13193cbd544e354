// Litmus: a record is eight tagged words, each a store of 64 bits. Every thread writes records into its partner's memory and reads the
// partner's: when all eight tags are the expected one, all of it is there, without a fence and in whatever order the words came.
// A record is written again when the reader has answered with a word. BUG_ONE_TAG takes it when the last word is there.
// Records: u64 [num_blocks, threads, 8] at 1 MB of symmetric memory.
#include "litmus.cuh"

namespace imex {

constexpr u32 kFirstRecord = 1 << 20;

DEV bool swap(Me& me, u32 round) {
  const u32 rank = partner_rank(me), block = partner_block(me), epoch = round + 1, thread = warp_index() * LANES + lane_index();
  auto record_of = [&](u32 r, u32 b) {
    return (u64*)((char*)me.params->peers[r] + kFirstRecord) + (b * kLitmusThreads + thread) * 8;
  };
  auto word_of = [&](u32 b) { return (b * kLitmusThreads + thread) * 2; };
  u64* theirs = record_of(rank, block);
  for (u32 i = 0; i < 8; i += 2)
    store_words(theirs + i, payload_of(me.params->rank, me.block, thread * 8 + i, epoch),
                payload_of(me.params->rank, me.block, thread * 8 + i + 1, epoch), epoch);
  const u64* mine = record_of(me.params->rank, me.block);
  u64 word[8];
  const bool there = look_until(me, epoch, [&] {
    u32 fitting = 0;
    for (u32 i = 0; i < 8; i += 2) load_words(mine + i, word[i], word[i + 1]);
    for (u32 i = 0; i < 8; i++) fitting += (u32)(word[i] >> 32) == epoch;
#ifdef BUG_ONE_TAG
    return (u32)(word[7] >> 32) == epoch;
#else
    return fitting == 8;
#endif
  });
  if (!there) return false;
  u32 wrong = 0;
  for (u32 i = 0; i < 8; i++) wrong += (u32)word[i] != payload_of(rank, block, thread * 8 + i, epoch);
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
