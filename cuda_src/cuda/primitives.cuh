// The primitives on a GPU. All PTX of the project is in this file; sim/primitives.cuh has the same functions for a CPU.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#include "abi.cuh"

#define DEV static __device__ __forceinline__
#define DEV_CALL static __device__ __noinline__
#define KERNEL extern "C" __global__ void __launch_bounds__(imex::kThreads, 1)
#define GRID_CONSTANT __grid_constant__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")  // off the token path: short code is worth more

namespace imex {

constexpr int LANES = 32;
constexpr int kThreads = kNumWarps * LANES;

// ---------------------------------------------------------------------------------------------- who am I
// The sizes this kernel was built for: compile-time constants here, fields of a struct in the simulator.
DEV constexpr Shape shape() { return Shape IMEX_SHAPE; }
DEV int grid_block() { return blockIdx.x; }  // counts the blocks of every rank of this launch
DEV int warp_index() { return threadIdx.x / LANES; }
DEV int lane_index() { return threadIdx.x % LANES; }
DEV char* shared_memory() {
  extern __shared__ __align__(1024) char dynamic_shared[];
  return dynamic_shared;
}
DEV u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---------------------------------------------------------------------------------------------- numbers
DEV float bits_float(u32 v) { return __uint_as_float(v); }
DEV u32 float_bits(float v) { return __float_as_uint(v); }
DEV float bf16_low(u32 pair) { return __uint_as_float(pair << 16); }
DEV float bf16_high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
DEV u32 pack_bf16(float low, float high) {  // round to nearest even
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEV float fast_exp(float x) { return __expf(x); }
DEV float reciprocal_sqrt(float x) { return rsqrtf(x); }
DEV float natural_log(float x) { return logf(x); }  // of a positive number, to the last bits also near 1

// ---------------------------------------------------------------------------------------------- global memory
// Constants of the run (weights, norms, RoPE): never written while the kernel is resident, so the read-only path may cache them.
DEV u32 load_const(const u32* p) { return __ldg(p); }
DEV u64 load_const(const u64* p) { return __ldg(p); }
DEV float2 load_const(const float2* p) { return __ldg(p); }
// Plain accesses: ordered only by the fences of the KV rule (kv.cuh).
DEV u32 load_global(const u32* p) { return *(const volatile u32*)p; }
DEV void store_global(u32* p, u32 v) { *p = v; }
DEV void store_global(u16* p, u16 v) { *p = v; }

DEV u32 load_relaxed_sys(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DEV void store_relaxed_sys(u32* p, u32 v) { asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
DEV void store_release_sys(u32* p, u32 v) { asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
DEV u32 atomic_add_gpu(u32* p, u32 v) {
  u32 old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}
DEV u32 atomic_exchange_sys(u32* p, u32 v) {
  u32 old;
  asm volatile("atom.relaxed.sys.global.exch.b32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}

// A tagged word is one 64-bit store: {payload, epoch}. Two neighbours travel in one 128-bit access, which may tear into its halves,
// each of which is a whole word; so nothing is ever promised that PTX does not (a vector access is a set of scalar ones).
DEV void store_word(u64* p, u32 payload, u32 epoch) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"((u64)epoch << 32 | payload) : "memory");
}
DEV void store_words(u64* p, u32 first, u32 second, u32 epoch) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(p), "l"((u64)epoch << 32 | first),
               "l"((u64)epoch << 32 | second)
               : "memory");
}
DEV void load_words(const u64* p, u64& first, u64& second) {
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(p) : "memory");
}

DEV void store_event(TraceEvent* p, u32 clock, u32 what, u32 value, u32 step) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(clock), "r"(what), "r"(value), "r"(step)
               : "memory");
}

// ---------------------------------------------------------------------------------------------- fences
DEV void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
DEV void fence_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
DEV void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
DEV void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---------------------------------------------------------------------------------------------- waiting
// What a wait needs to give up: whose abort word to look at, how long to be patient, whom to name. See faults.cuh.
struct Waiter {
  const RankParams* params;
  u32 layer;
  Phase phase;
  bool failed;      // a wait of this thread gave up; every later wait returns at once, and the block leaves at its next vote
  u32 word_clocks;  // trace.cuh: waited for words that were not there at the first poll
};
// Called every so many failed polls, with when the wait began; true when the wait must end without what it waited for.
// `idle` waits (for the next plan, and for whoever waits for those who do) have no deadline: only the abort word ends them.
// A call with plain numbers, so that no Waiter needs an address and the fast path keeps everything in registers.
DEV bool give_up(const RankParams* params, Phase phase, u32 layer, Wait kind, bool idle, u32 source, u32 expected, u32 seen,
                 u64 began_ns);
DEV bool aborted(const RankParams* params);  // has anybody given up?
DEV u64 timer_ns() {
  u64 t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}
DEV u32 clock_low() {
  u32 t;
  asm volatile("mov.u32 %0, %clock;" : "=r"(t)::"memory");
  return t;
}
DEV void stand_still(u32 ns) {
  for (const u64 began = timer_ns(); timer_ns() - began < ns;) {}
}
constexpr u32 kPollsPerCheck = 256;  // the abort word and the clock are looked at this seldom, off the fast path

// Waits until the words at address(0) .. address(count - 1) and their right neighbours all carry `epoch`; payloads in `out`.
// All loads of a poll are in flight together. count <= N; source(i) names the rank that owes word i.
template <int N, class Address, class Source>
DEV void wait_words(Waiter& w, Wait kind, bool idle, u32 epoch, int count, Address address, Source source, u32 (&out)[N][2]) {
  u64 word[N][2] = {};
  u32 missing_pairs = (1u << count) - 1;  // only these are loaded again: polling shares the way to L2 with the stream
  auto ready = [&] {
  UNROLL for (int i = 0; i < N; i++)
      if (missing_pairs >> i & 1) load_words(address(i), word[i][0], word[i][1]);
    UNROLL for (int i = 0; i < N; i++)
      if ((u32)(word[i][0] >> 32) == epoch && (u32)(word[i][1] >> 32) == epoch) missing_pairs &= ~(1u << i);
    return missing_pairs == 0;
  };
  u64 began_ns = 0;
  const bool late = shape().trace && !ready();
  const u32 began = late ? clock_low() : 0;
  for (u32 polls = 0; !ready() && !w.failed;) {
    if (++polls % kPollsPerCheck) continue;
    if (!began_ns) began_ns = timer_ns();
    const int first = __ffs(missing_pairs) - 1;  // for the record: whose word it is, and what is there instead
    u64 there[2];
    load_words(address(first), there[0], there[1]);
    const u32 tag = (u32)(there[0] >> 32);
    w.failed = give_up(w.params, w.phase, w.layer, kind, idle, source(first), epoch, tag == epoch ? (u32)(there[1] >> 32) : tag, began_ns);
  }
  if (late) w.word_clocks += clock_low() - began;
  UNROLL for (int i = 0; i < N; i++) UNROLL for (int j = 0; j < 2; j++) out[i][j] = i < count ? (u32)word[i][j] : 0;
}
DEV void mailbox_pause(u32 idle_polls) {  // between two looks at the descriptor ring; sleeps only after about 1 ms without news
  if (idle_polls > 1000) __nanosleep(500);
}

// ---------------------------------------------------------------------------------------------- inside a block
DEV void block_sync() { __syncthreads(); }
// The register file is dealt anew, by groups of four warps: 256 threads of 200 and 128 of 104 are what 384 of 168 had. Consumers hold
// activations and tiles in registers; nobody else needs many. All warps of a group call it once, before anything else.
DEV void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 200;"); }
DEV void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 104;"); }
DEV void consumer_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumerWarps * LANES) : "memory"); }
DEV bool consumer_any(bool mine) {  // a barrier, and whether any consumer said yes
  u32 any;
  asm volatile(
      "{ .reg .pred p, q; setp.ne.u32 p, %1, 0; barrier.cta.red.or.pred q, 1, %2, p; selp.u32 %0, 1, 0, q; }"
      : "=r"(any)
      : "r"((u32)mine), "n"(kConsumerWarps * LANES)
      : "memory");
  return any;
}
DEV void warp_sync() { __syncwarp(); }
DEV bool warp_any(bool v) { return __any_sync(~0u, v); }  // also brings the lanes together
DEV u32 shuffle(u32 v, int lane) { return __shfl_sync(~0u, v, lane); }
DEV float warp_sum(float v) {
  UNROLL for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  return v;
}
DEV u64 warp_sum(u64 v) {
  UNROLL for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  return v;
}
DEV float warp_max(float v) {
  UNROLL for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, o));
  return v;
}
DEV u64 warp_max(u64 v) {
  UNROLL for (int o = 16; o; o >>= 1) {
    u64 other = __shfl_xor_sync(~0u, v, o);
    v = other > v ? other : v;
  }
  return v;
}

// ---------------------------------------------------------------------------------------------- mbarriers and bulk copies
DEV void mbar_init(u64* bar, u32 count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory"); }
DEV void mbar_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEV void mbar_arrive(u64* bar) { asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory"); }
DEV void mbar_arrive_expect(u64* bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}
struct Pending {  // a phase of an mbarrier that somebody waits for
  u64* bar;
  u32 parity;
};
DEV bool mbar_test(Pending p) {  // has it completed?
  u32 done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(shared_address(p.bar)), "r"(p.parity)
      : "memory");
  return done;
}
DEV bool mbar_test_now(Pending p) {  // the same without the hardware's own short wait
  u32 done;
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(shared_address(p.bar)), "r"(p.parity)
      : "memory");
  return done;
}
// Have all completed? In one piece of PTX, so that the tests are on their way together; the same phase may be given twice.
DEV bool mbar_test(Pending one, Pending two) {
  u32 done;
  asm volatile(
      "{ .reg .pred p, q; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; "
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 q, [%3], %4; and.pred p, p, q; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(shared_address(one.bar)), "r"(one.parity), "r"(shared_address(two.bar)), "r"(two.parity)
      : "memory");
  return done;
}
DEV bool mbar_test(Pending one, Pending two, Pending three) {
  u32 done;
  asm volatile(
      "{ .reg .pred p, q, r; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; "
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 q, [%3], %4; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 r, [%5], %6; "
      "and.pred p, p, q; and.pred p, p, r; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(shared_address(one.bar)), "r"(one.parity), "r"(shared_address(two.bar)), "r"(two.parity), "r"(shared_address(three.bar)),
        "r"(three.parity)
      : "memory");
  return done;
}
// Waits for all; false when the block must leave. The first test stands before the loop: a loop's head costs as much as a test.
// No deadline of its own: what a block's warps and copies wait for from each other comes, unless another block's word does not, and for
// that somebody's deadline passes. So a look at the abort word bounds this wait as well.
template <class... Phases>
DEV bool mbar_wait(Waiter& w, Wait, bool, Phases... phases) {
  if (mbar_test(phases...)) return true;
  for (u32 polls = 1; !mbar_test(phases...); polls++) {
    if (polls % kPollsPerCheck == 0) w.failed |= aborted(w.params);
    if (w.failed) return false;
  }
  return true;
}
// The same for a whole warp, all lanes together: true when all have seen all, false when the block must leave.
template <class... Phases>
DEV bool mbar_wait_warp(Waiter& w, Wait, Phases... phases) {
  if (__all_sync(~0u, mbar_test(phases...))) return true;
  for (u32 polls = 1; !__all_sync(~0u, mbar_test(phases...)); polls++) {
    if (polls % kPollsPerCheck == 0) w.failed = __any_sync(~0u, w.failed || aborted(w.params));
    if (w.failed) return false;  // only ever set for all lanes: by the line above, or before a vote of the block
  }
  return true;
}
// Waits for copies that are certain to end, whatever has failed: nothing may land in shared memory after the block has gone.
DEV void mbar_drain(Pending p) {
  while (!mbar_test(p)) {
  }
}
// Asynchronous copy into shared memory; its bytes complete on `bar`. Both addresses and the size are multiples of 16.
DEV void bulk_copy(void* shared, const void* global, u32 bytes, u64* bar) {
  constexpr u64 kEvictFirst = 0x12F0000000000000ull;  // a cache policy as createpolicy makes it: read once, do not keep
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(bar)), "l"(kEvictFirst)
      : "memory");
}

// ---------------------------------------------------------------------------------------------- tensor cores
DEV void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Weights are the m = 16 operand, eight rows of them: rows 0-7 of the fragment are one half of a chunk's k, rows 8-15 the other half. So a
// lane's 16 bytes of a chunk are its whole fragment. The step's rows are the n = 8 operand. Up to four rows take half of the columns each
// for the two halves of k, and one instruction multiplies a chunk; more rows take an instruction for each half, and half of what it
// computes is not used.
constexpr int kStepRows = shape().max_rows;
constexpr bool kFewRows = kStepRows <= 4;
constexpr int kShareChunks = kTileK / 32 / kConsumerWarps;  // of a full tile, a warp's: the chunks warp, warp + CONSUMER_WARPS, …
constexpr bool kWholeTiles =                                // no unit's last tile is short
    (shape().hidden_size | shape().num_heads * shape().head_dim | shape().intermediate_size / shape().down_slices) % kTileK == 0;

// K of the matrices, for what is unrolled; the simulator learns them when it runs, and has 0 here.
constexpr int kHiddenK = shape().hidden_size, kHeadsK = shape().num_heads * shape().head_dim, kDownK = shape().intermediate_size / shape().down_slices;
DEV int group_tiles() { return kFewRows ? 2 : 1; }  // tiles that are loaded together: with more rows two would not fit the registers

// The activations that a warp's shares of a row's tiles meet, where they fit registers: every unit of the phase needs the same.
// Few rows: lane (column, quarter) has of row column % 4 the k pairs 0 and 2 (columns 0-3) or 1 and 3 of its quarter of a chunk. Else all four
// of row `column`, and of row column + 8.
constexpr int kPairs = kFewRows ? 2 : kStepRows <= 8 ? 4 : 8;
template <int K>
struct Operand {
  static constexpr bool kHeld = kFewRows && K <= 4 * kTileK;
  u32 x[kHeld ? (K + kTileK - 1) / kTileK : 1][kShareChunks][kPairs];
};
// What one warp multiplies of a tile, in registers.
struct Share {
  uint4 w[kShareChunks];  // lane (n, quarter) of a chunk: k pairs 0-3 of output row n, at k = 8 * quarter
  u32 x[kShareChunks][kPairs];  // where the operand is not held
};
// x: bf16 [chunks, max_rows, 32]; rows: how many of max_rows are live. A lane beyond them takes the last one's activations again: no
// branch, no bank conflict, and its sums are not stored. What lies beyond the last of `chunks` is zero.
DEV void load_pairs(u32 (&to)[kPairs], const char* x, int c, int chunks, int rows) {
  const int column = lane_index() / 4, quarter = lane_index() % 4;
  const int low = min(kFewRows ? column % 4 : column, rows - 1), high = min(column + 8, rows - 1);
  const bool here = kWholeTiles || c < chunks;
  const uint4 zero = {0, 0, 0, 0};
  const char* from = x + (c * kStepRows + low) * 64 + quarter * 16;
  if (kFewRows) {
    from += column / 4 * 4;
    to[0] = here ? *(const u32*)from : 0;
    to[1] = here ? *(const u32*)(from + 8) : 0;
  } else {
    *(uint4*)to = here ? *(const uint4*)from : zero;
    if (kStepRows > 8) *(uint4*)(to + 4) = here ? *(const uint4*)(x + (c * kStepRows + high) * 64 + quarter * 16) : zero;
  }
}
template <int K>
DEV void operand_load(Operand<K>& operand, const char* x, int warp, int rows) {
  if (Operand<K>::kHeld)
    UNROLL for (int t = 0; t < (K + kTileK - 1) / kTileK; t++) UNROLL for (int j = 0; j < kShareChunks; j++)
      load_pairs(operand.x[t][j], x, t * (kTileK / 32) + warp + j * kConsumerWarps, K / 32, rows);
}
// The warp's share of tile number `t` of a unit of `chunks` chunks. tile: bf16 [chunks, 8, 32], of which at most TILE_K / 32 are here.
template <int K>
DEV void share_load(Share& share, const char* tile, const Operand<K>&, const char* x, int t, int chunks, int warp, int rows) {
  UNROLL for (int j = 0; j < kShareChunks; j++) {
    const int c = warp + j * kConsumerWarps, at = t * (kTileK / 32) + c;
    const uint4 zero = {0, 0, 0, 0};
    share.w[j] = kWholeTiles || at < chunks ? ((const uint4*)tile)[c * 32 + lane_index()] : zero;  // a unit's last tile may be short
    if (!Operand<K>::kHeld) load_pairs(share.x[j], x, at, chunks, rows);
  }
}

// What one warp has summed of a unit: [8 output rows, rows of the step] over its share of K.
struct Accum {
  float c[4][4];  // four chains, so that a product need not wait for the one before
};
DEV void accum_zero(Accum& acc) {
  UNROLL for (int i = 0; i < 4; i++) UNROLL for (int j = 0; j < 4; j++) acc.c[i][j] = 0.f;
}
// `t`: the tile's number in its unit; a constant where the operand is held.
template <int K>
DEV void accum_multiply(Accum& acc, const Share& share, const Operand<K>& operand, int t, int) {
  UNROLL for (int j = 0; j < kShareChunks; j++) {
    const uint4 w = share.w[j];
    const u32* x = Operand<K>::kHeld ? operand.x[t][j] : share.x[j];
    if (kFewRows) {
      mma_bf16(acc.c[j % 4], w.x, w.y, w.z, w.w, x[0], x[1]);
    } else if (kStepRows <= 8) {
      mma_bf16(acc.c[j % 2 * 2], w.x, w.y, w.z, w.w, x[0], x[2]);
      mma_bf16(acc.c[j % 2 * 2 + 1], w.x, w.y, w.z, w.w, x[1], x[3]);
    } else {
      UNROLL for (int i = 0; i < 2; i++) {
        mma_bf16(acc.c[2 * i], w.x, w.y, w.z, w.w, x[4 * i], x[4 * i + 2]);
        mma_bf16(acc.c[2 * i + 1], w.x, w.y, w.z, w.w, x[4 * i + 1], x[4 * i + 3]);
      }
    }
  }
}
// part: float [max_rows, 8] in shared memory.
DEV void accum_store(const Accum& acc, float* part, int rows) {
  const int output = lane_index() / 4, row = 2 * (lane_index() % 4);
  auto put = [&](int at, float first, float second) {
    if (at < rows) part[at * 8 + output] = first;
    if (at + 1 < rows) part[(at + 1) * 8 + output] = second;
  };
  if (kFewRows) {
    float s[4];
    UNROLL for (int j = 0; j < 4; j++) s[j] = (acc.c[0][j] + acc.c[1][j]) + (acc.c[2][j] + acc.c[3][j]);
    s[2] = __shfl_down_sync(~0u, s[2], 2);  // the other half of k is two columns on
    s[3] = __shfl_down_sync(~0u, s[3], 2);
    if (row < 4) put(row, s[0] + s[2], s[1] + s[3]);
  } else if (kStepRows <= 8) {
    put(row, (acc.c[0][0] + acc.c[2][0]) + (acc.c[1][2] + acc.c[3][2]), (acc.c[0][1] + acc.c[2][1]) + (acc.c[1][3] + acc.c[3][3]));
  } else {
    UNROLL for (int i = 0; i < 2; i++) put(row + 8 * i, acc.c[2 * i][0] + acc.c[2 * i + 1][2], acc.c[2 * i][1] + acc.c[2 * i + 1][3]);
  }
}

// One warp's running softmax over the chunks it has seen, for up to 16 query heads of one KV head: maximum, sum, weighted values.
struct Flash {
  float max[2], sum[2];      // heads lane / 4 and lane / 4 + 8; `sum` holds this lane's positions only
  float out[kMaxHeadDim / 8][4];
};
DEV void flash_zero(Flash& f) {
  f.max[0] = f.max[1] = kMinusInfinity;
  f.sum[0] = f.sum[1] = 0.f;
  UNROLL for (int i = 0; i < kMaxHeadDim / 8; i++) UNROLL for (int j = 0; j < 4; j++) f.out[i][j] = 0.f;
}
// Attends to the first `valid` of a chunk's 32 positions. q: bf16 [head_dim / 32, heads, 32] in shared memory; chunk: K then V
// in the order of packing.py: lane (n, quarter) finds 8 consecutive dims of a K row, or 8 consecutive positions of a V dim, in one
// 16-byte load, and the scores of its four K units are exactly the operand it needs for V: no shared memory in between.
DEV void flash_chunk(Flash& f, const char* q, const char* chunk, int heads, int valid, float scale) {
  constexpr int kDim = shape().head_dim;
  const int lane = lane_index(), quarter = lane % 4, low_head = min(lane / 4, heads - 1), high_head = min(lane / 4 + 8, heads - 1);
  float s[4][4];
  UNROLL for (int u = 0; u < 4; u++) UNROLL for (int j = 0; j < 4; j++) s[u][j] = 0.f;
  UNROLL for (int c = 0; c < kDim / 32; c++) {
    const uint4 low = ((const uint4*)q)[(c * heads + low_head) * 4 + quarter];  // a head beyond the last is computed and not stored
    const uint4 high = ((const uint4*)q)[(c * heads + high_head) * 4 + quarter];
    UNROLL for (int u = 0; u < 4; u++) {
      const uint4 b = ((const uint4*)chunk)[(u * (kDim / 32) + c) * 32 + lane];
      mma_bf16(s[u], low.x, high.x, low.y, high.y, b.x, b.y);
      mma_bf16(s[u], low.z, high.z, low.w, high.w, b.z, b.w);
    }
  }
  u32 p[2][4];
  UNROLL for (int h = 0; h < 2; h++) {
    float m = f.max[h];
    UNROLL for (int u = 0; u < 4; u++) UNROLL for (int j = 0; j < 2; j++) {
      float& v = s[u][2 * h + j];  // position 8 * quarter + 2 * u + j
      v = 8 * quarter + 2 * u + j < valid ? v * scale : kMinusInfinity;
      m = fmaxf(m, v);
    }
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
    const float keep = __expf(f.max[h] - m);
    f.max[h] = m;
    float sum = 0.f;
    UNROLL for (int u = 0; u < 4; u++) {
      const float e0 = __expf(s[u][2 * h] - m), e1 = __expf(s[u][2 * h + 1] - m);
      sum += e0 + e1;
      p[h][u] = pack_bf16(e0, e1);
    }
    f.sum[h] = f.sum[h] * keep + sum;
    UNROLL for (int i = 0; i < kDim / 8; i++) {
      f.out[i][2 * h] *= keep;
      f.out[i][2 * h + 1] *= keep;
    }
  }
  const uint4* v = (const uint4*)(chunk + 64 * kDim);
  UNROLL for (int i = 0; i < kDim / 8; i++) {
    const uint4 b = v[i * 32 + lane];
    mma_bf16(f.out[i], p[0][0], p[1][0], p[0][1], p[1][1], b.x, b.y);
    mma_bf16(f.out[i], p[0][2], p[1][2], p[0][3], p[1][3], b.z, b.w);
  }
}
// merge: float [heads, head_dim + 2] of this warp in shared memory: values, then maximum and sum.
DEV void flash_store(const Flash& f, float* merge, int heads) {
  constexpr int kDim = shape().head_dim;
  const int lane = lane_index(), row = lane / 4, quarter = lane % 4;
  UNROLL for (int h = 0; h < 2; h++) {
    float sum = f.sum[h];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int head = row + 8 * h;
    if (head >= heads) continue;
    float* to = merge + head * (kDim + 2);
    UNROLL for (int i = 0; i < kDim / 8; i++) *(float2*)(to + 8 * i + 2 * quarter) = make_float2(f.out[i][2 * h], f.out[i][2 * h + 1]);
    if (quarter == 0) *(float2*)(to + kDim) = make_float2(f.max[h], sum);
  }
}

}  // namespace imex
