// Litmus: messages by tagged words. Every consumer thread swaps a pair of words with the same thread of its partner, round after round.
// A pair may tear into its halves, so both epochs are waited for; each look on the way must find whole words, old or new.
// Two buffers, by round: a thread stores round n + 2 over round n when it has the partner's n + 1, which left after the partner read n.
// BUG_ONE_EPOCH takes a pair when its left half is there; BUG_ONE_BUFFER overwrites what may not have been read.
#include "litmus.cuh"

namespace imex {

DEV void look(Me& me, const u64* pair, u32 index, u32 epoch) {
  u64 word[2];
  load_words(pair, word[0], word[1]);
  u32 wrong = 0;
  for (u32 j = 0; j < 2; j++) {
    const u32 tag = (u32)(word[j] >> 32);
    if (tag) wrong += (u32)word[j] != payload_of(partner_rank(me), partner_block(me), index + j, tag);
  }
  if (wrong) atomic_add_gpu(counts(me) + kWrong, wrong);
  if ((u32)(word[0] >> 32) != (u32)(word[1] >> 32)) atomic_add_gpu(counts(me) + kTorn, 1);
}

DEV bool swap(Me& me, u32 round) {
#ifdef BUG_ONE_BUFFER
  const u32 buffer = 0;
#else
  const u32 buffer = round % 2;
#endif
  const u32 index = 2 * (warp_index() * LANES + lane_index()), epoch = round + 1;
  auto at = [&](u32 block) { return (buffer * shape().num_blocks + block) * 2 * kLitmusThreads + index; };
  store_words(words_at(me, partner_rank(me), at(partner_block(me))), payload_of(me.params->rank, me.block, index, epoch),
              payload_of(me.params->rank, me.block, index + 1, epoch), epoch);
  u64* mine = me.words + at(me.block);
  for (int looks = 0; looks < 3; looks++) look(me, mine, index, epoch);
  u32 out[1][2];
#ifdef BUG_ONE_EPOCH
  u64 word[2];
  const bool there = look_until(me, epoch, [&] {
    load_words(mine, word[0], word[1]);
    return (u32)(word[0] >> 32) == epoch;
  });
  if (!there) return false;
  out[0][0] = (u32)word[0], out[0][1] = (u32)word[1];
#else
  wait_words<1>(
      me.waiter, Wait::kWords, false, epoch, 1, [&](int) { return mine; }, [&](int) { return partner_rank(me); }, out);
  if (me.waiter.failed) return false;
#endif
  u32 wrong = 0;
  for (u32 j = 0; j < 2; j++) wrong += out[0][j] != payload_of(partner_rank(me), partner_block(me), index + j, epoch);
  if (wrong) atomic_add_gpu(counts(me) + kWrong, wrong);
  return true;
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
