// Times the simulator's own hot paths, in CPU time (others may share the cores): RankParams.tap, float [2], receives the seconds of block 0.
// Shape.only_phase chooses: 1 products with a large tile array, 2 copy and multiply, 3 consumer_sync, 4 warp_sum, 5 words.
#include <time.h>

#include "litmus.cuh"

namespace imex {
DEV double seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

DEV void multiply(Me& me, const char* tiles) {  // [num_layers, 32, 8, 32] bf16
  const int rows = (int)shape().max_rows;
  char* x = shared_memory() + shape().smem_x;
  memset(x, 0, 64 * 32 * rows);
  Share share;
  Operand<0> operand;
  Accum acc;
  accum_zero(acc);
  for (u32 t = 0; t < shape().num_layers; t++)
    for (int w = 0; w < kConsumerWarps; w++) {
      share_weights(share, tiles + (size_t)t * kStageBytes, x, 0, 32, w);
      share_activations(share, operand, x, 0, 32, w, rows);
      accum_multiply(acc, share, operand, 0, rows);
    }
  accum_store(acc, (float*)(shared_memory() + shape().smem_part), rows);
}

DEV void stream(Me& me, const char* tiles) {  // the ring with one stage in flight per consumer round
  u64* full = (u64*)shared_memory();
  u64* empty = full + 4;
  char* ring = shared_memory() + shape().smem_ring;
  const int warp = warp_index(), lane = lane_index();
  const u32 rows = shape().max_rows, count = shape().num_layers;
  const size_t base = (size_t)me.block * count * kStageBytes;
  if (warp == kConsumerWarps && lane == 0)
    for (u32 t = 0; t < count; t++) {
      if (t >= 4) mbar_wait(me.waiter, Wait::kStage, false, Pending{&empty[t % 4], (u32)((t / 4 - 1) & 1)});
      mbar_arrive_expect(&full[t % 4], kStageBytes);
      bulk_copy(ring + t % 4 * kStageBytes, tiles + base + (size_t)t * kStageBytes, kStageBytes, &full[t % 4]);
    }
  if (warp >= kConsumerWarps) return;
  char* x = shared_memory() + shape().smem_x;
  if (warp == 0 && lane == 0) memset(x, 0, 64 * 32 * rows);
  consumer_sync();
  Share share;
  Operand<0> operand;
  Accum acc;
  accum_zero(acc);
  for (u32 t = 0; t < count; t++) {
    mbar_wait(me.waiter, Wait::kTile, false, Pending{&full[t % 4], (u32)(t / 4 & 1)});
    share_weights(share, ring + t % 4 * kStageBytes, x, 0, 32, warp);
    share_activations(share, operand, x, 0, 32, warp, rows);
    accum_multiply(acc, share, operand, 0, rows);
    warp_sync();
    if (lane == 0) mbar_arrive(&empty[t % 4]);
  }
  accum_store(acc, (float*)(shared_memory() + shape().smem_part) + warp * rows * 8, rows);
}
}  // namespace imex

KERNEL decode(const GRID_CONSTANT imex::LaunchParams p) {
  using namespace imex;
  Me me = who(p);
  const u32 mode = shape().only_phase;
  if (warp_index() == 0 && lane_index() == 0)
    for (int i = 0; i < 4; i++)
      mbar_init((u64*)shared_memory() + i, 1), mbar_init((u64*)shared_memory() + 4 + i, kConsumerWarps);
  block_sync();
  const double began = seconds();
  const char* tiles = (const char*)me.params->qkv;
  if (mode == 1 && warp_index() == 0) multiply(me, tiles);
  if (mode == 2) stream(me, tiles);
  if (mode == 3 && warp_index() < kConsumerWarps)
    for (u32 i = 0; i < shape().num_layers; i++) consumer_sync();
  float v = lane_index();
  if (mode == 4)
    for (u32 i = 0; i < shape().num_layers; i++) v = warp_sum(v) * 0.03125f;
  if (mode == 5 && warp_index() == 0 && lane_index() == 0)
    for (u32 i = 0; i < shape().num_layers; i++) {
      store_words(me.words + 2 * (i % 1024), i, i, i + 1);
      wait_one(me.waiter, me.words + 2 * (i % 1024), i + 1);
    }
  block_sync();
  if (warp_index() == 0 && lane_index() == 0 && grid_block() == 0) me.result[0] = (float)(seconds() - began), me.result[1] = v;
}
