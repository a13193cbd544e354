// Epochs have 32 bits. Before they would wrap, every renew_steps steps, all words are zeroed and epochs begin again: nothing of the steps
// before can match, and no server has to be started anew because it has run for days.
//
// Between two steps all blocks of all ranks meet, zero their share of their own rank's memory, and meet again. Why this is enough:
//   - a block comes to the first meeting when it has passed `sample` and its barrier: it has read all it will ever read of the step, and
//     whatever it sent has been read by somebody who is at the meeting too, or is on the way there. So nobody stores or awaits a word
//     of the zeroed buffers while they are zeroed. Plans are not zeroed: the mailbox is ahead, and their epochs may wrap (block.cuh);
//   - a block stores words of the next step after the second meeting, and they must not be overtaken by another's zeros. Words order
//     nothing but themselves, so: zeros, consumer barrier, fence.acq_rel.sys, the word; the word, fence.acq_rel.sys, barrier, the store;
//   - the two meetings have words of their own: who is late at the first must still find what others have overwritten at the second.
//     The next renewal's first word is stored after the second meeting of this one, hence after everybody has left its first.
#pragma once
#include "words.cuh"

namespace imex {

DEV bool renews(u32 step) { return (step + 1) % shape().renew_steps == 0; }

// All consumers; false when the block must leave.
DEV bool renew(Block& b) {
  const int sources = shape().world_size * shape().num_blocks;
  ROLLED for (u32 meeting = 0; meeting < 2; meeting++) {
    const u32 epoch = b.step / shape().renew_steps * 2 + meeting + 1, at = shape().off_renew + meeting * sources * 2;
    const u32 begin = shape().off_qkv / 2 + b.index * kConsumerThreads + b.thread;
    ROLLED for (u32 pair = begin; meeting && pair < shape().off_renew / 2; pair += shape().num_blocks * kConsumerThreads)
      store_words(own_words(b, 2 * pair), 0, 0, 0);
    consumer_sync();
    ROLLED for (u32 r = b.thread; r < shape().world_size; r += kConsumerThreads) {
      fence_sys();
      store_words(words_of(b, r, at + 2 * (b.params->rank * shape().num_blocks + b.index)), 0, 0, epoch);
    }
    ROLLED for (int i = b.thread; i < sources; i += kConsumerThreads) {
      u32 words[1][2];
      wait_words<1>(
          b.waiter, Wait::kWords, false, epoch, 1, [&](int) { return own_words(b, at + 2 * i); },
          [&](int) { return (u32)i / shape().num_blocks; }, words);
    }
    fence_sys();
    if (!all_well(b)) return false;
  }
  return true;
}

}  // namespace imex
