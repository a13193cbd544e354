// Litmus: what is not in the word needs a fence, and its scope must have both threads. Every block stores plain values into its partner's
// memory, which is on another GPU if there are two ranks; barrier, fence, word; there: word, fence, barrier, plain loads. Renewal
// (renew.cuh) and the arena (mailbox.cuh) depend on it. Two buffers, by round, as in message.cu.
// BUG_NO_WRITER_FENCE, BUG_NO_READER_FENCE; BUG_WRITER_SCOPE and BUG_READER_SCOPE fence for the own GPU only.
// Values: u32 [2, num_blocks, 1024] at 64 KB of symmetric memory.
#include "litmus.cuh"

namespace imex {

constexpr u32 kValues = 1024, kFirstValue = 65536;
DEV u32* values_of(const Me& me, u32 rank, u32 block, u32 round) {
  return (u32*)((char*)me.params->peers[rank] + kFirstValue) + (round % 2 * shape().num_blocks + block) * kValues;
}
DEV u32 word_of(u32 block, u32 round) { return (round % 2 * shape().num_blocks + block) * 2; }

DEV bool swap(Me& me, u32 round) {
  const u32 thread = warp_index() * LANES + lane_index(), rank = partner_rank(me), block = partner_block(me), epoch = round + 1;
  u32* theirs = values_of(me, rank, block, round);
  for (u32 i = thread; i < kValues; i += kLitmusThreads)
    store_global(theirs + i, payload_of(me.params->rank, me.block, i, epoch));
  consumer_sync();
  if (thread == 0) {
#if defined(BUG_WRITER_SCOPE)
    fence_gpu();
#elif !defined(BUG_NO_WRITER_FENCE)
    fence_sys();
#endif
    store_words(words_at(me, rank, word_of(block, round)), 0, 0, epoch);
    wait_one(me.waiter, me.words + word_of(me.block, round), epoch, rank);
#if defined(BUG_READER_SCOPE)
    fence_gpu();
#elif !defined(BUG_NO_READER_FENCE)
    fence_sys();
#endif
  }
  if (consumer_any(me.waiter.failed)) return false;
  u32 wrong = 0;
  for (u32 i = thread; i < kValues; i += kLitmusThreads)
    wrong += load_global(values_of(me, me.params->rank, me.block, round) + i) != payload_of(rank, block, i, epoch);
  if (wrong) atomic_add_gpu(counts(me) + kWrong, wrong);
  consumer_sync();  // read, before this block's next word says so
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
