// The KV rule: block 0 writes rows with plain stores, block 1 reads them with a bulk copy and with plain loads. Each BUG_ leaves out one
// step. RankParams.kv: u32 [num_layers, 256]; tap: float [2]: values that the bulk copies, that the loads saw wrong.
#include "litmus.cuh"

namespace imex {

constexpr u32 kValues = 256;  // a page
struct Shared {
  u64 told, landed;
};

DEV void write(Me& me, u32* page, u32 round) {
  const u32 thread = warp_index() * LANES + lane_index();
  for (u32 i = thread; i < kValues; i += kConsumerWarps * LANES) store_global(page + i, round * kValues + i + 1);
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
    store_word(me.words, 0, round + 1);
    store_word(me.words + 1, 0, round + 1);
  }
}

DEV void learn(Me& me, Shared* s, const u32* page, u32 round) {  // one consumer of the reading block
  wait_one(me.waiter, me.words, round + 1);
#ifndef BUG_NO_READER_FENCE
  fence_gpu();
#endif
  mbar_arrive(&s->told);
  u32 wrong = 0;
  for (u32 i = 0; i < kValues; i++) wrong += load_global(page + i) != round * kValues + i + 1;
  me.result[1] += wrong;
}

DEV void copy(Me& me, Shared* s, const u32* page, u32 round) {  // its producer
  mbar_wait(me.waiter, Wait::kStep, false, Pending{&s->told, round & 1});
#ifndef BUG_NO_READER_PROXY
  fence_async_global();
#endif
  mbar_arrive_expect(&s->landed, kValues * 4);
  bulk_copy(shared_memory() + 1024, page, kValues * 4, &s->landed);
  mbar_wait(me.waiter, Wait::kTile, false, Pending{&s->landed, round & 1});
  for (u32 i = 0; i < kValues; i++) me.result[0] += ((u32*)(shared_memory() + 1024))[i] != round * kValues + i + 1;
}

}  // namespace imex

KERNEL decode(const GRID_CONSTANT imex::LaunchParams p) {
  using namespace imex;
  Me me = who(p);
  Shared* s = (Shared*)shared_memory();
  const int warp = warp_index(), lane = lane_index();
  if (warp == 0 && lane == 0) mbar_init(&s->told, 1), mbar_init(&s->landed, 1);
  block_sync();
  for (u32 round = 0; round < shape().num_layers; round++) {
    u32* page = (u32*)me.params->kv + round * kValues;
    if (me.block == 0) {
      if (warp < kConsumerWarps) write(me, page, round);
      if (warp == 0 && lane == 0) wait_one(me.waiter, me.words + 2, round + 1);  // the reader is done
    } else {
      if (warp == 0 && lane == 0) learn(me, s, page, round);
      if (warp == kConsumerWarps && lane == 0) copy(me, s, page, round);
    }
    block_sync();
    if (me.block == 1 && warp == 0 && lane == 0) store_words(me.words + 2, 0, 0, round + 1);
  }
}
