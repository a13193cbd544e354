// The decode kernel: one resident launch that runs every decode step of a model, token after token. Read this file first.
//
// Each block is one SM's worth of four roles, by warp:
//   consumers (warps 0-7)  walk the phases of the step, below in decode order; each phase is a file in phases/
//   adders    (warps 8, 9) sum what the consumers computed and send it off as words (adders.cuh)
//   producer  (warp 10)    streams the weights and KV pages of the same phases through a ring in shared memory (stream.cuh)
//   mailbox   (warp 11)    on rank 0's block 0 talks to the host and plans the steps (mailbox.cuh)
// Activations cross blocks and ranks as tagged words (words.cuh); partial sums cross ranks inside o_proj and down_proj (exchange.cuh).
// There is no barrier of the grid and no fence on the token path but the KV rule's (kv.cuh).
#include "adders.cuh"
#include "mailbox.cuh"
#include "phases/embed.cuh"
#include "phases/attention.cuh"
#include "phases/sample.cuh"

namespace imex {

// One step; false when the block must leave.
DEV bool decode_step(Block& b) {
  if (!embed(b)) return false;
  for (b.waiter.layer = first_layer(); b.waiter.layer < end_layer(); b.waiter.layer++) {
    if (!qkv(b) || !attention(b) || !o_proj(b) || !gate_up(b)) return false;
    append_kv(b);
    if (!down_proj(b)) return false;
  }
  return lm_head(b) && sample(b);
}

DEV void consume(Block& b) {
  for (b.step = 0; begin_step(b); b.step++) {
    if (b.shared->command == (u32)Command::kShutdown) {
      b.waiter.layer = first_layer();
      if (runs(Phase::kQkv)) skip_units(b);  // what the producer fetched ahead
      break;
    }
    if (!decode_step(b) || shape().only_phase) break;
  }
  hand_over_mark(b, kUnitExit);
  report_fault(b);
}

DEV void produce(Block& b) {
  Producer p;
  for (b.step = 0; !b.waiter.failed; b.step++) {
    for (b.waiter.layer = first_layer(); b.waiter.layer < end_layer() && !b.waiter.failed; b.waiter.layer++) {
      b.waiter.phase = Phase::kQkv;
      stream_qkv(b, p);
      if (b.waiter.layer == first_layer()) {
        mbar_wait(b.waiter, Wait::kStep, true, &b.shared->step_begin, b.step & 1);
        if (b.waiter.failed || b.shared->command == (u32)Command::kShutdown) break;
        fence_async_global();  // the KV rule's last link: copies after this see the pages of earlier steps
      }
      b.waiter.phase = Phase::kAttention;
      stream_pages(b, p);
      b.waiter.phase = Phase::kOProj;
      stream_o_proj(b, p);
      b.waiter.phase = Phase::kGateUp;
      stream_gate_up(b, p);
      b.waiter.phase = Phase::kDownProj;
      stream_down_proj(b, p);
    }
    if (b.waiter.failed || b.shared->command == (u32)Command::kShutdown) break;
    b.waiter.phase = Phase::kLmHead;
    stream_lm_head(b, p);
    if (shape().only_phase) break;
  }
  drain_copies(b, p);
}

DEV void start_barriers(Shared& s) {
  for (u32 i = 0; i < shape().ring_stages; i++) {
    mbar_init(&s.full[i], 1);
    mbar_init(&s.empty[i], kConsumerWarps);
  }
  for (int i = 0; i < kPartSlots; i++) {
    mbar_init(&s.done[i], kConsumerWarps);
    mbar_init(&s.free[i], 1);
  }
  mbar_init(&s.candidates_ready, kAdderWarps);
  mbar_init(&s.step_begin, 1);
  mbar_init(&s.step_end[0], 1);
  mbar_init(&s.step_end[1], 1);
  mbar_init_done();
}

}  // namespace imex

// Launch: (ranks here) x Shape.num_blocks blocks of kThreads, all resident at once (cooperative), Shape.smem_bytes of shared memory.
KERNEL decode(const GRID_CONSTANT imex::LaunchParams launch) {
  using namespace imex;
  const u32 rank = grid_block() / shape().num_blocks;
  Block b;
  b.params = &launch.ranks[rank];
  b.memory = shared_memory();
  b.shared = (Shared*)b.memory;
  b.index = grid_block() % shape().num_blocks;
  b.warp = warp_index();
  b.lane = lane_index();
  b.thread = b.warp * LANES + b.lane;
  b.step = 0;
  b.num_units = b.num_lm_heads = b.num_events = b.tile_clocks = 0;
  b.waiter = {b.params, 0, Phase::kEmbed, false};
  if (b.thread == 0) {
    b.shared->fault.set = 0;
    start_barriers(*b.shared);
  }
  block_sync();
  if (b.warp < kConsumerWarps) {
    consume(b);
  } else if (b.warp < kConsumerWarps + kAdderWarps) {
    add_units(b, b.warp - kConsumerWarps);
  } else if (b.warp == kConsumerWarps + kAdderWarps) {
    if (b.lane == 0) produce(b);
  } else if (b.params->rank == 0 && b.index == 0 && b.params->mailbox) {
    run_mailbox(b);
  }
}
