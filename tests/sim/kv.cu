// Litmus: the KV rule. A block writes a page of its rank with plain stores; its neighbour reads it with a bulk copy, which is the async
// proxy, and with plain loads. A page is written again when the reader has said, with a word, that it is done with it. Each BUG_ leaves
// out one step. RankParams.kv: u32 [num_blocks, 256].
#include "litmus.cuh"

namespace imex {

constexpr u32 kValues = 256;  // of a page
struct Shared {
  u64 told, landed;
};
DEV u32* page_of(const Me& me, u32 block) { return (u32*)me.params->kv + block * kValues; }
DEV u64* word_of(const Me& me, u32 block, u32 which) { return me.words + (block * 2 + which) * 2; }  // 0: written, 1: read

DEV void write(Me& me, u32 round) {
  const u32 thread = warp_index() * LANES + lane_index();
  u32* page = page_of(me, me.block);
  for (u32 i = thread; i < kValues; i += kLitmusThreads)
    store_global(page + i, payload_of(me.params->rank, me.block, i, round + 1));
#ifndef BUG_NO_BARRIER
  consumer_sync();
#endif
  if (thread == 0) {
#ifndef BUG_NO_WRITER_PROXY
    fence_async_global();
#endif
#ifndef BUG_NO_WRITER_FENCE
    fence_gpu();
#endif
    store_words(word_of(me, me.block, 0), 0, 0, round + 1);
  }
}

DEV void learn(Me& me, Shared* s, u32 round) {  // one consumer of the reading block
  const u32 from = me.block ^ 1;
  wait_one(me.waiter, word_of(me, from, 0), round + 1);
#ifndef BUG_NO_READER_FENCE
  fence_gpu();
#endif
  mbar_arrive(&s->told);
  u32 wrong = 0;
  for (u32 i = 0; i < kValues; i++)
    wrong += load_global(page_of(me, from) + i) != payload_of(me.params->rank, from, i, round + 1);
  if (wrong && !me.waiter.failed) atomic_add_gpu(counts(me) + kWrong, wrong);
}

DEV void copy(Me& me, Shared* s, u32 round) {  // its producer
  const u32 from = me.block ^ 1;
  u32* landed = (u32*)(shared_memory() + 1024);
  mbar_wait(me.waiter, Wait::kStep, false, Pending{&s->told, round & 1});
  if (me.waiter.failed) return;
#ifndef BUG_NO_READER_PROXY
  fence_async_global();
#endif
  mbar_arrive_expect(&s->landed, kValues * 4);
  bulk_copy(landed, page_of(me, from), kValues * 4, &s->landed);
  mbar_wait(me.waiter, Wait::kTile, false, Pending{&s->landed, round & 1});
  u32 wrong = 0;
  for (u32 i = 0; i < kValues; i++) wrong += landed[i] != payload_of(me.params->rank, from, i, round + 1);
  if (wrong) atomic_add_gpu(counts(me) + kWrong, wrong);
}

}  // namespace imex

KERNEL decode(const GRID_CONSTANT imex::LaunchParams p) {
  using namespace imex;
  Me me = who(p);
  Shared* s = (Shared*)shared_memory();
  const int warp = warp_index(), lane = lane_index();
  if (warp == 0 && lane == 0) mbar_init(&s->told, 1), mbar_init(&s->landed, 1), mbar_init_done();
  block_sync();
  for (u32 round = 0; round < shape().num_layers; round++) {
    if (warp < kConsumerWarps) {
      if (round) wait_one(me.waiter, word_of(me, me.block ^ 1, 1), round);
      if (consumer_any(me.waiter.failed)) break;
      write(me, round);
      if (warp == 0 && lane == 0) learn(me, s, round);
    }
    if (warp == kConsumerWarps && lane == 0) copy(me, s, round);
    block_sync();  // the copy and the loads are done
    if (warp == 0 && lane == 0) store_words(word_of(me, me.block, 1), 0, 0, round + 1);
  }
  if (me.waiter.failed && lane == 0) atomic_add_gpu(counts(me) + kGaveUp, 1);
}
