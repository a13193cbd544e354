// Litmus: the poll is the read. A warp writes 64-byte lines, word by word and in any order, into its partner's memory; the partner's
// warp loads a whole line at once and takes it if sequence number and check fit: then all of it is new, without any fence.
// A line is written again when the reader has answered with a word. BUG_NO_CHECK takes it by its sequence number alone.
// Lines: u32 [num_blocks, warps, 16] at 64 KB of symmetric memory.
#include "litmus.cuh"

namespace imex {

constexpr u32 kFirstLine = 65536;
DEV u32* line_of(const Me& me, u32 rank, u32 block) {
  return (u32*)((char*)me.params->peers[rank] + kFirstLine) + (block * kConsumerWarps + warp_index()) * 16;
}
DEV u32 word_of(u32 block) { return (block * kConsumerWarps + warp_index()) * 2; }
DEV u32 check_of(const u32* line) {  // as rings.cuh has it, by one thread
  u32 check = 0;
  for (u32 i = 0; i < 15; i++) {
    const u32 mixed = (line[i] ^ (i + 1) * kDescriptorMagic) * kDescriptorFactor;
    check += (mixed ^ mixed >> 15) * kDescriptorFactor;
  }
  return check;
}

DEV bool swap(Me& me, u32 round) {
  const u32 rank = partner_rank(me), block = partner_block(me), epoch = round + 1, lane = lane_index();
  u32* copy = (u32*)(shared_memory() + 1024) + warp_index() * 32;  // the line looked at, and the line to write
  if (lane == 0) {
    u32* out = copy + 16;
    out[0] = epoch;
    for (u32 i = 1; i < 15; i++) out[i] = payload_of(me.params->rank, me.block, i, epoch) % 8;  // small: words differ alike
    out[15] = check_of(out);
  }
  warp_sync();
  u32* theirs = line_of(me, rank, block);
  for (u32 i = lane; i < 16; i += LANES) {
    const u32 at = (i * 5 + round) % 16;
    store_relaxed_sys(theirs + at, copy[16 + at]);
  }
  const u32* mine = line_of(me, me.params->rank, me.block);
  const u64 began = timer_ns();
  for (u32 polls = 1;; polls++) {  // as look_until, but the whole warp goes on or leaves
    for (u32 i = lane; i < 16; i += LANES) copy[i] = load_relaxed_sys(mine + i);
    warp_sync();
#ifdef BUG_NO_CHECK
    const bool there = copy[0] == epoch;
#else
    const bool there = copy[0] == epoch && copy[15] == check_of(copy);
#endif
    const bool over = !there && polls % kPollsPerCheck == 0 &&
                      give_up(me.params, Phase::kEmbed, 0, Wait::kWords, false, rank, epoch, copy[0], began);
    if (warp_any(there)) break;
    if (warp_any(over)) return false;
    warp_sync();
    mailbox_pause();
  }
  u32 wrong = 0;
  for (u32 i = 1 + lane; i < 15; i += LANES) wrong += copy[i] != payload_of(rank, block, i, epoch) % 8;
  if (wrong) atomic_add_gpu(counts(me) + kWrong, wrong);
  warp_sync();
  if (lane == 0) store_words(words_at(me, rank, word_of(block)), 0, 0, epoch);
  wait_one(me.waiter, me.words + word_of(me.block), epoch, rank);
  return !warp_any(me.waiter.failed);
}

}  // namespace imex

KERNEL decode(const GRID_CONSTANT imex::LaunchParams p) {
  using namespace imex;
  Me me = who(p);
  if (warp_index() >= kConsumerWarps) return;
  for (u32 round = 0; round < shape().num_layers; round++)
    if (!swap(me, round)) {
      if (lane_index() == 0) atomic_add_gpu(counts(me) + kGaveUp, 1);
      return;
    }
}
