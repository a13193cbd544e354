// What one block knows: its rank's memory, its shared memory, where it stands in the step.
#pragma once
#include "primitives.cuh"

namespace imex {

constexpr int kConsumerThreads = kConsumerWarps * LANES;
constexpr int kHeldPlanWords = kPlanHeaderWords + kPlanRowWords * kHeldRows;
// Cells (row, pair of a unit's outputs), in whole warps.
constexpr int kCells = (kHeldRows * (kUnitRows / 2) + LANES - 1) / LANES * LANES;
constexpr int kMailboxBytes = 256 + 144 * kHeldSlots + 40 * kHeldRows;

// One row of the step: a position of a sequence, and the token that stands there.
struct Row {
  u32 token;
  u32 position;
  u32 slot;
  u32 page;       // KV page of this position
  u32 first_row;  // the first row of the same slot in this step; rows of a slot are neighbours, positions ascending
  u32 flags;      // kRowSamples, kRowDraws
  u32 together;   // the first of so many rows that attention takes together (attention.cuh); of the others not used
  u32 runs;       // that its context is cut into (kv.cuh)
  u32 at_once;    // of them, in an item of attention: 1 or 2
};

// What a part slot holds, for the warp that adds it.
struct UnitNote {
  int unit;  // or kUnitEnd, kUnitExit
  Phase phase;
  u32 layer, step;
};

struct FaultNote {
  u32 set;
  u32 phase, layer, wait, expected, seen, waited_us, source;
};

// The head of shared memory; the big arrays follow at the offsets in Shape.
struct Shared {
  u64 full[kHeldStages];   // bulk copies -> consumers: the stage's tile is here
  u64 empty[kHeldStages];  // consumer warps -> producer: the stage may be overwritten
  u64 done[kPartSlots];    // consumer warps -> adder: all partial sums of a unit are here
  u64 free[kPartSlots];    // adder -> consumer warps: they have been read
  u64 candidates_ready;    // adders -> consumers: every row's best logits of this block are in `candidates`
  u64 step_begin;          // consumers -> producer: plan read, KV pages of earlier steps may be streamed
  u64 step_end[2];         // consumers -> mailbox, by step parity: the step's tokens are in `tokens`
  UnitNote notes[kPartSlots];
  FaultNote fault;        // the first wait of this block that lasted too long
  int unit[kHeldStages];  // what the stage holds: a unit's index, or one of the marks below
  u32 plan[kHeldPlanWords];
  u32 num_rows, num_sampling, num_drawing, command;  // of the step; rows that are not plainly greedy are drawing
  u32 last_rows;                                     // of the step before
  u32 first_item, end_item;                          // the block's, of attention (deal.cuh)
  const RankParams* params;                          // for draw.cuh's calls, so that the greedy path need not hold the address
  u32 num_drawn, num_searching, num_rounds;          // sampling.cuh, search.cuh
  u32 drawing[kHeldRows], drawn[kHeldRows], searching[kHeldRows];
  Row rows[kHeldRows];
  u32 tokens[2][kHeldRows];                    // by step parity: what the step sampled
  float norm_sums[kHeldRows][kConsumerWarps];  // sums of squares, see norm.cuh
  float row_scales[kAdderWarps][kHeldRows];    // each adder's own
  u64 best[kHeldRows][kConsumerWarps];
  u64 candidates[kAdderWarps][kCells];
  alignas(16) char mailbox[kMailboxBytes];  // struct MailboxState of rank 0's block 0
};
static_assert(sizeof(Shared) <= kHeaderBytes, "raise header_bytes in planner.py, or SHARED_HEADER_BYTES in abi.py");

constexpr int kLastUnit = 1 << 30;  // set in the number of the block's last unit of a phase
constexpr int kUnitEnd = -1;        // a phase without a unit for this block; to the adders: the LM head is done
constexpr int kUnitPage = -2;       // a KV page
constexpr int kUnitExit = -3;       // the adders leave
constexpr int kUnitScratch = -4;    // nothing: attention's own until it gives the stage back

// A position in the ring, kept by everyone who walks it.
struct RingCursor {
  int stage = 0;
  u32 parity = 0;
};
DEV RingCursor ahead(RingCursor at, int count) {  // by a lap at most
  at.stage += count;
  if (at.stage >= (int)shape().ring_stages) at.stage -= shape().ring_stages, at.parity ^= 1;
  return at;
}
DEV RingCursor behind(RingCursor at, int count) {
  at.stage -= count;
  if (at.stage < 0) at.stage += shape().ring_stages, at.parity ^= 1;
  return at;
}

struct Block {
  const RankParams* params;
  Shared* shared;
  char* memory;  // all of shared memory
  u64* words;    // the own rank's symmetric memory: every poll needs it, and looking it up costs two reads of constants
  Waiter waiter;
  int index;  // of the rank's blocks
  int warp;   // consumers: 0 .. kConsumerWarps - 1
  int lane;
  int thread;  // consumers: 0 .. kConsumerThreads - 1
  u32 step;
  RingCursor ring;
  u32 num_events, num_aligns, tile_clocks;  // trace.cuh
  u32 num_units;                            // units this warp has handed to the adders: names the part slot and the adder
  u32 num_lm_heads;                         // steps that had logits
};

// As this thread begins.
DEV Block make_block(const RankParams* params, int index) {
  Block b{};
  b.params = params;
  b.memory = shared_memory();
  b.shared = (Shared*)b.memory;
  b.words = (u64*)params->peers[params->rank];
  b.index = index;
  b.warp = warp_index();
  b.lane = lane_index();
  b.thread = b.warp * LANES + b.lane;
  b.waiter.params = params;
  b.waiter.phase = Phase::kEmbed;
  return b;
}
// The launch's blocks are divided among the ranks that it runs.
DEV Block this_block(const LaunchParams& launch) {
  return make_block(&launch.ranks[grid_block() / shape().num_blocks], grid_block() % shape().num_blocks);
}

// Who has met, by warp_sync or consumer_sync, tells an mbarrier so by one thread for all; and what a lane has seen of one, warp_sync tells the
// others. compute-sanitizer's racecheck does not follow either: in a build for it everybody arrives, and waits, and what it then reports is a race
// (tests/gpu/sanitize.py).
#ifdef IMEX_EVERYBODY_ARRIVES
constexpr int kWarpArrivals = LANES, kConsumerArrivals = kConsumerThreads;
#else
constexpr int kWarpArrivals = 1, kConsumerArrivals = 1;
#endif
DEV void warp_arrive(const Block& b, u64* bar) {
  warp_sync();
  if (b.lane < kWarpArrivals) mbar_arrive(bar);
}
DEV void consumers_arrive(const Block& b, u64* bar) {  // after their barrier
  if (b.thread < kConsumerArrivals) mbar_arrive(bar);
}

DEV bool semaphore() { return shape().strategy == (u32)Strategy::kSemaphore; }  // exchange.cuh
DEV bool two_shot() { return shape().strategy == (u32)Strategy::kTwoShot; }
DEV bool one_shot(int rows) { return rows <= (int)shape().one_shot_rows; }
DEV bool replicated(int rows) { return semaphore() || one_shot(rows); }
DEV int num_rows(const Block& b) { return shape().max_rows == 1 ? 1 : (int)b.shared->num_rows; }

// ---------------------------------------------------------------------------------------------- addresses
DEV u64* own_words(const Block& b, u32 offset) { return b.words + offset; }
DEV u64* words_of(const Block& b, u32 rank, u32 offset) {
  return shape().world_size == 1 ? own_words(b, offset) : (u64*)b.params->peers[rank] + offset;
}
DEV u32* abort_word(const RankParams* p, u32 rank) { return (u32*)((u64*)p->peers[rank] + shape().off_abort); }

// bf16 [K / 32, max_rows, 32]: the rows' activations, in the order the tensor core takes them
DEV char* activations(const Block& b) { return b.memory + shape().smem_x; }
DEV int activation_offset(int row, int k) { return ((k / 32 * (int)shape().max_rows + row) * 32 + k % 32) * 2; }
// float [PART_SLOTS, CONSUMER_WARPS, max_rows, 8]
DEV float* partial_sums(const Block& b, int slot, int warp) {
  return (float*)(b.memory + shape().smem_part) + (slot * kConsumerWarps + warp) * (int)shape().max_rows * kUnitRows;
}
DEV float* residual(const Block& b) { return (float*)(b.memory + shape().smem_residual); }  // see exchange.cuh
DEV float2* rope_rows(const Block& b) { return (float2*)(b.memory + shape().smem_rope); }   // [max_rows, head_dim / 2] cos, sin
DEV char* ring_stage(const Block& b, int stage) { return b.memory + shape().smem_ring + stage * kStageBytes; }

// ---------------------------------------------------------------------------------------------- epochs
// Every use of a buffer has an epoch of its own: one a layer, one for what follows the last layer. 0 is never used, so zeroed
// memory never matches. Epochs are compared for equality; they begin again, with zeroed memory, before they wrap (renew.cuh). Those of
// plans do not: a launch ends before they would wrap (mailbox.cuh).
DEV u32 epochs_per_step() { return shape().num_layers + 2; }
DEV u32 layer_epoch(u32 step, u32 layer) { return step % shape().renew_steps * epochs_per_step() + layer + 1; }
DEV u32 plan_epoch(u32 step) { return step + 1; }

// Tests run one phase of one layer alone; a build for that has only_phase set, all others fold these to constants.
DEV bool runs(Phase phase) { return shape().only_phase == 0 || shape().only_phase == 1 + (u32)phase; }
DEV u32 first_layer() { return shape().only_phase ? shape().only_layer : 0; }
DEV u32 end_layer() { return shape().only_phase ? shape().only_layer + 1 : shape().num_layers; }

// The matrix phases in order: qkv, o_proj, gate_up, down_proj of every layer, then the LM head. Consumers and producer walk them in
// loops with one copy of the code: the kernel should stay small enough for the instruction cache (docs/performance.md).
DEV void next_matrix(Waiter& at) {
  if (at.phase == Phase::kDownProj) {
    at.layer++;
    at.phase = Phase::kQkv;
    if (at.layer == end_layer()) at.phase = Phase::kLmHead, at.layer = shape().num_layers;
  } else {
    at.phase = at.phase == Phase::kQkv ? Phase::kOProj : at.phase == Phase::kOProj ? Phase::kGateUp : Phase::kDownProj;
  }
}
// Whether a step multiplies in a matrix phase. Without a row that samples nobody needs logits, nor what leads to nothing but them: the
// products after the last layer's o_proj. What o_proj exchanges is taken in all the same: that is when keys and values may be stored.
DEV bool multiplies_in(Phase phase, u32 layer, u32 num_sampling) {
  if (phase == Phase::kQkv || phase == Phase::kOProj || num_sampling) return true;
  return phase != Phase::kLmHead && (layer + 1 < shape().num_layers || shape().only_phase);
}
// K of a phase's matrix: one block's part of it, a multiple of 32.
DEV int matrix_k(Phase phase) {
  if (phase == Phase::kOProj) return shape().num_heads * shape().head_dim;
  if (phase == Phase::kDownProj) return shape().intermediate_size / shape().down_slices;
  return shape().hidden_size;
}

// What a block's step leaves to the next: its pages (kv.cuh), the sets that it cleared (bare.cuh), what it read of other ranks (semaphore.cuh).
// Before its word of `sample`, and by everybody after all blocks' words.
DEV void fence_step() { semaphore() || two_shot() ? fence_sys() : fence_gpu(); }
// Of what rank 0 stores to every rank. Where there is only one, the system's scope is not needed, and held up every block for 4 us, it seems until
// records under way had arrived in host memory (docs/performance.md).
DEV void fence_ranks() { shape().world_size > 1 ? fence_sys() : fence_gpu(); }

DEV u32 smaller(u32 a, u32 b) { return a < b ? a : b; }
DEV u32 larger(u32 a, u32 b) { return a > b ? a : b; }
DEV u32 divide_up(u32 a, u32 b) { return (a + b - 1) / b; }
// a / b, both known at run time only, a below 2^20: 5 instructions, not 40. The half keeps the quotient further from whole numbers than the
// division errs.
DEV int quotient(int a, int b) { return (int)fast_divide((float)a + 0.5f, (float)b); }

// A vote of the consumers, which is also a barrier: true while none of them has given up. All leave together or none does.
DEV bool all_well(const Block& b) { return !consumer_any(b.waiter.failed); }

}  // namespace imex
