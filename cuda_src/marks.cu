// Before the decode kernel is launched: does peer memory work? Every rank stores a pair of words into every rank's memory, with the store
// that partial sums travel by, and waits in its own for every other's, with the load that they are polled by. Both directions of all
// pairs, in the memory and over the mappings that decoding will use. runtime/marks.py launches it and reads the fault records.
#include "faults.cuh"

namespace imex {

// What `source` stores into `target`'s memory. RankParams.tap is the start's own number: an earlier start left other marks.
DEV u32 mark_between(u64 nonce, u32 source, u32 target) { return (u32)nonce * 0x9e3779b1u + source * kMaxRanks + target; }

DEV void exchange_marks(Block& b, u32 other) {
  const u64 nonce = b.params->tap;
  const u32 rank = b.params->rank, epoch = (u32)(nonce >> 32) | 1;  // never 0, which unwritten memory has
  const u32 mine = mark_between(nonce, rank, other), its = mark_between(nonce, other, rank);
  store_words(words_of(b, other, 2 * rank), mine, ~mine, epoch);
  u32 seen[1][2];
  wait_words<1>(
      b.waiter, Wait::kWords, false, epoch, 1, [&](int) { return own_words(b, 2 * other); }, [&](int) { return other; }, seen);
  if (b.waiter.failed || (seen[0][0] == its && seen[0][1] == ~its)) return;
  b.shared->fault = {1,   (u32)Phase::kEmbed, 0, (u32)Wait::kWords,
                     its, seen[0][0],         0, other};  // waited 0: it came, and is wrong
}

}  // namespace imex

KERNEL decode(const GRID_CONSTANT imex::LaunchParams launch) {
  using namespace imex;
  Block b = this_block(launch);
  if (b.thread == 0) b.shared->fault.set = 0;
  block_sync();
  if (b.index) return;
  for (u32 other = b.thread; other < shape().world_size; other += kThreads) exchange_marks(b, other);
  block_sync();
  report_fault(b);
}
