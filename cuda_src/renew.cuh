// Epochs have 32 bits, of which wide words carry 16. Before what the narrowest word carries would wrap, every renew_steps steps, all words with
// an epoch are zeroed and epochs begin again: nothing of the steps before can match, and a server may run for ever.
//
// Between two steps all blocks of all ranks meet, zero their share of their own rank's words, and meet again. Why this is enough:
//   - a block comes to the first meeting when it has passed `sample` and its barrier: it has read all it will ever read of the step, and
//     whatever it sent has been read by somebody who is at the meeting too, or is on the way there, or nobody will read it: entries behind
//     a list's head, logits of rows that do not sample. Of those its fence before its word of the first meeting says that they are stored
//     before the zeros. So nobody stores or awaits a word of the zeroed buffers while they are zeroed. Plans, and what travels beside them,
//     are not zeroed: the mailbox is ahead, and steps end before their epochs wrap (mailbox.cuh);
//   - a block stores words of the next step after the second meeting, and they must not be overtaken by another's zeros. Words order
//     nothing but themselves, so: zeros, consumer barrier, fence.acq_rel.sys, the word; the word, fence.acq_rel.sys, barrier, the store;
//   - the two meetings have words of their own: who is late at the first must still find what others have overwritten at the second.
//     The next renewal's first word is stored after the second meeting of this one, hence after everybody has left its first.
#pragma once
#include "words.cuh"

namespace imex {

DEV bool renews(u32 step) { return (step + 1) % shape().renew_steps == 0; }

// All blocks of all ranks meet: what any has done before comes before what any does after. Their words are at `at`. All consumers; true when the
// block must leave.
DEV bool meet(Waiter& waiter, u32 index, u32 thread, u32 at, u32 epoch) {
  const RankParams* params = waiter.params;
  const u32 blocks = shape().num_blocks, sources = shape().world_size * blocks;
  const u64* own = (const u64*)params->peers[params->rank] + at;
  consumer_sync();
  ROLLED for (u32 r = thread; r < shape().world_size; r += kConsumerThreads) {
    fence_sys();
    store_words((u64*)params->peers[r] + at + 2 * (params->rank * blocks + index), 0, 0, epoch);
  }
  ROLLED for (u32 i = thread; i < sources; i += kConsumerThreads) {
    u32 words[1][2];
    wait_words<1>(
        waiter, Wait::kWords, false, epoch, 1, [&](int) { return own + 2 * i; }, [&](int) { return i / blocks; }, words);
  }
  fence_sys();
  return consumer_any(waiter.failed);
}

// All consumers; true when the block must leave. A call with plain numbers: it runs seldom and must not cost the step a register.
DEV_CALL bool renew_words(const RankParams* params, u32 index, u32 thread, u32 step) {
  const u32 blocks = shape().num_blocks;
  Waiter waiter = {params, shape().num_layers, Phase::kSample, false};
  ROLLED for (u32 meeting = 0; meeting < 2; meeting++) {
    u64* own = (u64*)params->peers[params->rank];
    const u32 begin = shape().off_qkv / 2 + index * kConsumerThreads + thread;
    ROLLED for (u32 pair = begin; meeting && pair < shape().off_renew / 2; pair += blocks * kConsumerThreads)
      store_words(own + 2 * pair, 0, 0, 0);
    const u32 at = shape().off_renew + meeting * shape().world_size * blocks * 2, epoch = step / shape().renew_steps * 2 + meeting + 1;
    if (meet(waiter, index, thread, at, epoch)) return true;
  }
  return false;
}
DEV bool renew(Block& b) {
  b.waiter.failed = renew_words(b.params, b.index, b.thread, b.step);
  if (b.thread == 0) b.shared->num_rounds = 0;  // search.cuh; next looked at behind barriers of the step to come
  return !b.waiter.failed;
}

}  // namespace imex
