// Waits that nothing will ever end, and misuse. Shape.only_phase: 0 a word that rank 1 owes, 1 a barrier that one warp does not reach,
// 2 an mbarrier that arrives once too often, 3 a misaligned copy, 4 a mailbox that waits for the host, 5 a word from another process.
#include "litmus.cuh"

KERNEL decode(const GRID_CONSTANT imex::LaunchParams p) {
  using namespace imex;
  Me me = who(p);
  u64* bar = (u64*)shared_memory();
  const bool first = warp_index() == 0 && lane_index() == 0;
  if (first) mbar_init(bar, 1);
  block_sync();
  me.waiter.layer = 7, me.waiter.phase = Phase::kOProj;
  switch (shape().only_phase) {
    case 0:
      if (first) wait_one(me.waiter, me.words + 2, 5, 1);
      return;
    case 1:
      if (warp_index() < kConsumerWarps - 1) consumer_sync();
      return;
    case 2:
      if (warp_index() == 0) mbar_arrive(bar), mbar_arrive(bar);
      if (warp_index() == 1) mbar_init(bar, 1), *bar = 0, mbar_arrive(bar);
      return;
    case 3:
      if (first) bulk_copy(shared_memory() + 8, me.words, 16, bar);
      return;
    case 4: {  // the host writes word 1; every consumer waits for what the mailbox then publishes
      if (warp_index() == kConsumerWarps + 1) {
        while (!shuffle(load_relaxed_sys((u32*)(me.words + 1)), 0)) mailbox_pause();
        if (lane_index() == 0) store_words(me.words + 2, 0, 0, 5);
      }
      wait_one(me.waiter, me.words + 2, 5, 0, true);
      if (first) me.result[0] = 1.f;
      return;
    }
    default:
      if (first) {
        store_words((u64*)me.params->peers[1 - me.params->rank] + 2, me.params->rank + 40, 0, 5);
        me.result[0] = (float)wait_one(me.waiter, me.words + 2, 5, 1 - me.params->rank);
      }
  }
}
