// The decode kernel: one resident launch that runs every decode step of a model, token after token. Read this file first.
//
// Each block is one SM's worth of four roles, by warp:
//   consumers (warps 0-7)  walk the phases of the step, below in decode order; each phase is a file in phases/
//   adders    (warps 8, 9) sum what the consumers computed and send it off as words (adders.cuh)
//   producer  (warp 10)    streams the weights and KV pages of the same phases through a ring in shared memory (stream.cuh)
//   mailbox   (warp 11)    on rank 0's block 0 talks to the host and plans the steps (mailbox.cuh)
// Activations cross blocks and ranks as words, tagged (words.cuh) or bare (bare.cuh); partial sums cross ranks inside o_proj and down_proj
// (exchange.cuh).
// There is no barrier of the grid and no fence on the token path but that at a step's end (kv.cuh).
#include "adders.cuh"
#include "mailbox.cuh"
#include "phases/embed.cuh"
#include "phases/attention.cuh"
#include "phases/sample.cuh"
#include "renew.cuh"

namespace imex {

// What the matrix phase at b.waiter multiplies with: the residual, after the exchange that completes it, times the norm's weights; or
// another phase's words. Where it does not multiply, o_proj's exchange alone is taken in. take() takes weights while words are on their way:
// at once, but where this block sums a slice for others, who shall not wait for that. False when the block must leave.
template <class Take>
DEV bool prepare(Block& b, bool multiplies, Take take) {
  const Phase phase = b.waiter.phase;
  const int layer = b.waiter.layer;
  const bool receives =
      has_norm(phase) && (phase == Phase::kGateUp || b.waiter.layer > 0);  // layer 0 starts from what `embed` left
  const bool sums = receives && !replicated(num_rows(b));
  if (!sums) take();
  bool well = true;  // calls of their own: with constant sizes each is shorter than one for all with divisions
  if (phase == Phase::kOProj) {
    well = gather_activations(b, shape().off_attn, 0, matrix_k(Phase::kOProj));
  } else if (!multiplies && phase != Phase::kGateUp && !shape().only_phase) {
    return true;  // what comes before it was not multiplied either
  } else if (phase == Phase::kDownProj) {
    const int width = matrix_k(Phase::kDownProj);  // values of this block's part
    well = gather_activations(b, shape().off_gate, slice_of(b) * width, width);
  } else if (phase == Phase::kGateUp) {
    well = receive(b, o_exchange(), layer, multiplies, sums, take);
  } else if (receives) {
    well = receive(b, down_exchange(), layer - 1, multiplies, sums, take);
  }
  if (well) mark(b, Mark::kInput, take_word_clocks(b));
  return well;
}

DEV void multiply(Block& b, Phase phase, Groups& taken) {
  if (phase == Phase::kDownProj && kDownK != kHiddenK) multiply_units<kDownK>(b, taken);
  else if (phase == Phase::kOProj && kHeadsK != kHiddenK) multiply_units<kHeadsK>(b, taken);
  else multiply_units<kHiddenK>(b, taken);
}

// One step; false when the block must leave.
DEV bool decode_step(Block& b) {
  if (!embed(b)) return false;
  b.waiter.layer = first_layer();
  ROLLED for (b.waiter.phase = Phase::kQkv;; next_matrix(b.waiter)) {
    const Phase phase = b.waiter.phase;
    if (runs(phase)) {
      const bool multiplies = multiplies_in(phase, b.waiter.layer, b.shared->num_sampling);
      if (phase == Phase::kQkv || phase == Phase::kLmHead) mark_clock(b, Mark::kPair);
      mark(b, Mark::kBegin);
      Groups taken{};  // nothing of the phase before: that would live in local memory across all between
      if (!prepare(b, multiplies, [&] { if (multiplies) take_ahead(b, taken); })) return false;
      mark(b, Mark::kReady, multiplies);
      if (multiplies) multiply(b, phase, taken);
      mark(b, Mark::kEnd, take_tile_clocks(b));
    }
    if (phase == Phase::kQkv && !attention(b)) return false;
    if (phase == Phase::kGateUp) append_kv(b), clear_set(b);
    if (phase == Phase::kLmHead) break;
  }
  return (!runs(Phase::kLmHead) || publish_best(b)) && sample(b) && (!renews(b.step) || renew(b));
}

DEV void consume(Block& b) {
  for (b.step = 0; begin_step(b); b.step++) {
    if (b.shared->command == (u32)Command::kShutdown) {
      b.waiter.layer = first_layer();
      if (runs(Phase::kQkv)) skip_units(b, shape().hidden_size);  // what the producer fetched ahead
      break;
    }
    if (!decode_step(b) || shape().only_phase) break;
  }
  b.waiter.failed = warp_any(b.waiter.failed);  // by the vote the block leaves whole, but not every lane has given up
  hand_over_mark(b, kUnitExit);
  report_fault(b);
}

DEV Matrix matrix_of(const Block& b, Producer& p) {
  const bool odd = b.step & 1;
  const u32 with_logits = odd ? p.num_logits_odd : p.num_logits_even;
  const u32 uses = b.waiter.layer + 1 < shape().num_layers ? b.step / 2 : with_logits;  // see multiplies_in
  switch (b.waiter.phase) {
    case Phase::kQkv: return qkv_matrix(b);
    case Phase::kOProj: return o_proj_matrix(b);
    case Phase::kGateUp: return gate_up_matrix(b, uses);
    case Phase::kDownProj: return down_proj_matrix(b, uses);
    default: p.num_logits_odd += odd, p.num_logits_even += !odd; return lm_head_matrix(b, with_logits);
  }
}

// Streams everything the consumers will ask for, in their order, step after step.
DEV void produce(Block& b) {
  Producer p;
  for (b.step = 0;; b.step++) {
    b.waiter.layer = first_layer();
    ROLLED for (b.waiter.phase = Phase::kQkv; !b.waiter.failed; next_matrix(b.waiter)) {
      const Phase phase = b.waiter.phase;
      if (runs(phase) && multiplies_in(phase, b.waiter.layer, p.num_sampling)) {
        if (has_norm(phase)) prefetch_norm(b);
        push_units(b, p, matrix_of(b, p));
      }
      if (phase == Phase::kLmHead) break;
      if (phase != Phase::kQkv) continue;
      if (b.waiter.layer == first_layer()) {
        if (!mbar_wait(b.waiter, Wait::kStep, true, Pending{&b.shared->step_begin, b.step & 1})) break;
        p.leaving = b.shared->command == (u32)Command::kShutdown;
        p.num_sampling = b.shared->num_sampling;
        if (p.leaving) break;
        fence_async_global();  // the KV rule's last link: copies after this see the pages of earlier steps
      }
      stream_pages(b, p);
    }
    if (b.waiter.failed || p.leaving || shape().only_phase) break;
  }
  drain_copies(b, p);
}

DEV void start_barriers(Shared& s) {
  for (u32 i = 0; i < shape().ring_stages; i++) {
    mbar_init(&s.full[i], 1);
    mbar_init(&s.empty[i], kConsumerWarps * kWarpArrivals);
  }
  for (int i = 0; i < kPartSlots; i++) {
    mbar_init(&s.done[i], kConsumerWarps * kWarpArrivals);
    mbar_init(&s.free[i], kWarpArrivals);
  }
  mbar_init(&s.candidates_ready, kAdderWarps * kWarpArrivals);
  mbar_init(&s.step_begin, kConsumerArrivals);
  mbar_init(&s.step_end[0], kConsumerArrivals);
  mbar_init(&s.step_end[1], kConsumerArrivals);
  mbar_init_done();
}

}  // namespace imex

// Launch: (ranks here) x Shape.num_blocks blocks of kThreads, all resident at once (cooperative), Shape.smem_bytes of shared memory.
KERNEL decode(const GRID_CONSTANT imex::LaunchParams launch) {
  using namespace imex;
  Block b = this_block(launch);
  if (b.thread == 0) {
    b.shared->fault.set = 0;
    b.shared->num_rounds = 0;
    b.shared->num_rows = 0;
    b.shared->params = b.params;
    start_barriers(*b.shared);
  }
  block_sync();
  if (b.warp < kConsumerWarps) {
    take_registers();
    consume(b);
  } else {
    give_registers();
    if (b.warp < kConsumerWarps + kAdderWarps) {
      add_units(b, b.warp - kConsumerWarps);
    } else if (b.warp == kConsumerWarps + kAdderWarps) {
      if (b.lane == 0) produce(b);
    } else if (b.params->rank == 0 && b.index == 0 && b.params->mailbox) {
      run_mailbox(b);
    }
  }
}
