// Litmus: condition C, one buffer each is enough. All blocks of all ranks take part in two exchanges in turn, A and B. A block stores
// A of the next round over A of this one once it has everybody's B: everybody sent B after a barrier that follows its reads of A.
// BUG_NO_B leaves the second exchange out; BUG_NO_BARRIER sends B while other warps of the block still read A.
#include "litmus.cuh"

namespace imex {

// Everybody's words of one exchange: [ranks, blocks] pairs. False when somebody's never came.
DEV bool exchange(Me& me, u32 which, u32 epoch) {
  const u32 blocks = shape().num_blocks, sources = shape().world_size * blocks, thread = warp_index() * LANES + lane_index();
  const u32 mine = me.params->rank * blocks + me.block, offset = which * 2 * sources;
  for (u32 r = thread; r < shape().world_size; r += kLitmusThreads)
    store_words(words_at(me, r, offset + 2 * mine), payload_of(me.params->rank, me.block, which, epoch),
                payload_of(me.params->rank, me.block, which + 2, epoch), epoch);
  for (u32 i = thread; i < sources; i += kLitmusThreads) {
    u32 out[1][2];
    wait_words<1>(
        me.waiter, Wait::kWords, false, epoch, 1, [&](int) { return me.words + offset + 2 * i; },
        [&](int) { return i / blocks; }, out);
    u32 wrong = 0;
    for (u32 j = 0; j < 2; j++) wrong += out[0][j] != payload_of(i / blocks, i % blocks, which + 2 * j, epoch);
    if (wrong && !me.waiter.failed) atomic_add_gpu(counts(me) + kWrong, wrong);
  }
#ifdef BUG_NO_BARRIER
  return !me.waiter.failed;
#else
  return !consumer_any(me.waiter.failed);
#endif
}

}  // namespace imex

KERNEL decode(const GRID_CONSTANT imex::LaunchParams p) {
  using namespace imex;
  Me me = who(p);
  if (warp_index() >= kConsumerWarps) return;
  for (u32 round = 0; round < shape().num_layers; round++) {
    bool well = exchange(me, 0, round + 1);
#ifndef BUG_NO_B
    well = well && exchange(me, 1, round + 1);
#endif
    if (!well) {
      atomic_add_gpu(counts(me) + kGaveUp, 1);
      return;
    }
  }
}
