// A small copy of the kernel's shape: per rank and block a producer streams tiles through a ring, consumers multiply and add their parts,
// sums travel to all ranks as words, everybody waits for all of them, several steps long.
// RankParams.qkv: tiles, bf16 [blocks, num_layers, K / 32, 8, 32]; o_proj: x, bf16 [K / 32, rows, 32]; tap: float [steps, blocks, rows, 8].
#include "litmus.cuh"

namespace imex {

constexpr u32 kRing = 4;
struct Shared {
  u64 full[kRing], empty[kRing], part_full[2], part_empty[2];
};

DEV void produce(Me& me, Shared* s) {
  if (lane_index() != 0) return;
  const u32 chunks = shape().hidden_size / 32, bytes = chunks * 512;
  const char* tiles = (const char*)me.params->qkv + (size_t)me.block * shape().num_layers * bytes;
  for (u32 t = 0; t < shape().num_layers; t++) {
    const u32 stage = t % kRing;
    if (t >= kRing) mbar_wait(me.waiter, Wait::kStage, false, Pending{&s->empty[stage], (u32)((t / kRing - 1) & 1)});
    mbar_arrive_expect(&s->full[stage], bytes);
    bulk_copy(shared_memory() + shape().smem_ring + stage * kStageBytes, tiles + (size_t)t * bytes, bytes, &s->full[stage]);
  }
}

DEV void consume(Me& me, Shared* s) {
  const u32 chunks = shape().hidden_size / 32, rows = shape().max_rows, blocks = shape().num_blocks, world = shape().world_size;
  const u32 values = rows * kUnitRows;
  float* parts = (float*)(shared_memory() + shape().smem_part);  // [2, warps, rows, 8]
  const u32 thread = warp_index() * LANES + lane_index();
  for (u32 i = thread; i < chunks * rows * 16; i += kConsumerWarps * LANES)
    ((u32*)(shared_memory() + shape().smem_x))[i] = load_const((const u32*)me.params->o_proj + i);
  for (u32 t = 0; t < shape().num_layers; t++) {
    me.waiter.layer = t;
    consumer_sync();
    const u32 stage = t % kRing, slot = t % 2;
    Share share;
    Operand<0> operand;
    Accum acc;
    accum_zero(acc);
    mbar_wait(me.waiter, Wait::kTile, false, Pending{&s->full[stage], (u32)(t / kRing & 1)});
    share_weights(share, shared_memory() + shape().smem_ring + stage * kStageBytes, shared_memory() + shape().smem_x, 0, chunks,
                  warp_index());
    share_activations(share, operand, shared_memory() + shape().smem_x, 0, chunks, warp_index(), rows);
    accum_multiply(acc, share, operand, 0, rows);
#ifndef BUG_NO_WARP_SYNC
    warp_sync();
#endif
    if (lane_index() == 0) mbar_arrive(&s->empty[stage]);
    if (t >= 2) mbar_wait(me.waiter, Wait::kPartial, false, Pending{&s->part_empty[slot], (u32)((t / 2 - 1) & 1)});
    float* mine = parts + (slot * kConsumerWarps + warp_index()) * values;
    accum_store(acc, mine, rows);
    warp_sync();
    if (lane_index() == 0) mbar_arrive(&s->part_full[slot]);
    if (warp_index() == (int)(t % kConsumerWarps)) {
#ifndef BUG_NO_PART_WAIT
      mbar_wait(me.waiter, Wait::kPartial, false, Pending{&s->part_full[slot], (u32)(t / 2 & 1)});
#endif
      for (u32 i = lane_index() * 2; i < values; i += LANES * 2) {
        float sum[2] = {0.f, 0.f};
        for (int w = 0; w < kConsumerWarps; w++)
          for (u32 j = 0; j < 2; j++) sum[j] += parts[(slot * kConsumerWarps + w) * values + i + j];
        for (u32 r = 0; r < world; r++)
          store_words((u64*)me.params->peers[r] + (me.params->rank * blocks + me.block) * values + i, float_bits(sum[0]),
                      float_bits(sum[1]), t + 1);
      }
      warp_sync();
      if (lane_index() == 0) mbar_arrive(&s->part_empty[slot]);
    }
    // Everybody reads everybody's, so nobody is more than one step ahead.
    for (u32 i = thread * 2; i < blocks * values; i += kConsumerWarps * LANES * 2) {
      u32 word[kMaxRanks][2];
      wait_words<kMaxRanks>(
          me.waiter, Wait::kWords, false, t + 1, world, [&](int r) { return me.words + r * blocks * values + i; },
          [](int r) { return (u32)r; }, word);
      for (u32 j = 0; j < 2 && me.block == 0; j++) {
        float sum = 0.f;
        for (u32 r = 0; r < world; r++) sum += bits_float(word[r][j]);
        me.result[t * blocks * values + i + j] = sum;
      }
    }
    if (consumer_any(me.waiter.failed)) return;
    // The next step's words overwrite these: wait until every block of every rank has read them.
    if (thread == 0)
      for (u32 r = 0; r < world; r++)
        store_words((u64*)me.params->peers[r] + shape().off_best + 2 * (me.params->rank * blocks + me.block), 0, 0, t + 1);
#ifndef BUG_NO_CONDITION_C
    for (u32 i = thread; i < world * blocks; i += kConsumerWarps * LANES)
      wait_one(me.waiter, me.words + shape().off_best + 2 * i, t + 1, i / blocks);
#endif
  }
}

}  // namespace imex

KERNEL decode(const GRID_CONSTANT imex::LaunchParams p) {
  using namespace imex;
  Me me = who(p);
  Shared* s = (Shared*)shared_memory();
  if (warp_index() == 0 && lane_index() == 0) {
    for (u32 i = 0; i < kRing; i++) mbar_init(&s->full[i], 1), mbar_init(&s->empty[i], kConsumerWarps);
    for (u32 i = 0; i < 2; i++) mbar_init(&s->part_full[i], kConsumerWarps), mbar_init(&s->part_empty[i], 1);
    mbar_init_done();
  }
  block_sync();
  if (warp_index() < kConsumerWarps) consume(me, s);
  if (warp_index() == kConsumerWarps) produce(me, s);
}
