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
constexpr int kHeldRows = shape().max_rows, kHeldSlots = shape().num_slots,
              kHeldStages = shape().ring_stages;  // of arrays in shared memory
constexpr int kHeaderBytes = shape().smem_x;
DEV int grid_block() { return blockIdx.x; }  // counts the blocks of every rank of this launch
DEV int warp_index() { return threadIdx.x / LANES; }
DEV int lane_index() { return threadIdx.x % LANES; }
// x, of which the compiler knows nothing: what depends on it is not computed before this place, and does not fill registers until it is used.
DEV int not_before(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
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
DEV u32 multiply_bf16(u32 pairs, u32 by) {  // both products, rounded to nearest even
  u32 product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(pairs), "r"(by));
  return product;
}
DEV u32 pack_bf16(float low, float high) {  // round to nearest even
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEV float fast_exp(float x) { return __expf(x); }
DEV float reciprocal_sqrt(float x) { return rsqrtf(x); }
DEV float fast_divide(float a, float b) { return __fdividef(a, b); }  // 0 where |b| is above 2^126
DEV float natural_log(float x) { return logf(x); }                    // of a positive number, to the last bits also near 1

// ---------------------------------------------------------------------------------------------- global memory
// Constants of the run (weights, norms, RoPE): never written while the kernel is resident, so the read-only path may cache them.
DEV u32 load_const(const u32* p) { return __ldg(p); }
DEV u64 load_const(const u64* p) { return __ldg(p); }
DEV float2 load_const(const float2* p) { return __ldg(p); }
// Of those, one for each of a consumer's quads of a row, in registers long before they are used: volatile, so that the loads stay where they are.
struct EarlyQuads {
  u64 of[(shape().hidden_size / 4 + kConsumerWarps * LANES - 1) / (kConsumerWarps * LANES)];
};
DEV void prefetch_global(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }  // a hint
DEV void ask_early(EarlyQuads& quads, int i, const u64* p) {
  asm volatile("ld.global.nc.u64 %0, [%1];" : "=l"(quads.of[i]) : "l"(p));
}
DEV u64 early_quad(const EarlyQuads& quads, int i) {  // registers have no index: where i is known at run time only it is chosen
  u64 v = quads.of[0];
  UNROLL for (int j = 1; j < (int)(sizeof quads.of / sizeof *quads.of); j++) v = i == j ? quads.of[j] : v;
  return v;
}
// Plain accesses: ordered by the fences of the KV rule (kv.cuh), of page tables (mailbox.cuh) and of semaphore.cuh; within a block by its barriers. A load
// may find what its SM's L1 has, until a fence of whoever runs there.
DEV u32 load_global(const u32* p) {
  u32 v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DEV float4 load_global(const float4* p) {
  float4 v;
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
DEV void store_global(u32* p, u32 v) { *p = v; }
DEV void store_global(u16* p, u16 v) { *p = v; }
DEV void store_global(float2* p, float2 v) { *p = v; }

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
DEV void store_wide_word(u64* p, u64 payload, u32 epoch) {  // words.cuh
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"((u64)epoch << 48 | payload) : "memory");
}
DEV void store_words(u64* p, u32 first, u32 second, u32 epoch) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(p), "l"((u64)epoch << 32 | first),
               "l"((u64)epoch << 32 | second)
               : "memory");
}
DEV void load_words(const u64* p, u64& first, u64& second) {
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(p) : "memory");
}

// Bare words (bare.cuh): each of four neighbours is an access of its own to PTX. A set is used once a step; that it stays in L2 so long, while all
// weights pass through, takes a cache policy as createpolicy makes it: keep.
constexpr u64 kEvictLast = 0x14F0000000000000ull;
DEV void store_bare_word(u32* p, u32 pair) {
  asm volatile("st.relaxed.sys.global.L2::cache_hint.u32 [%0], %1, %2;" ::"l"(p), "r"(pair), "l"(kEvictLast) : "memory");
}
DEV void load_bare_words(const u32* p, u32 (&pairs)[4]) {
  asm volatile("ld.relaxed.sys.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
               : "l"(p), "l"(kEvictLast)
               : "memory");
}
DEV void clear_bare_words(u32* p) {
  asm volatile("st.relaxed.sys.global.L2::cache_hint.v4.u32 [%0], {%1, %1, %1, %1}, %2;" ::"l"(p), "r"(0), "l"(kEvictLast) : "memory");
}

DEV void store_event(TraceEvent* p, u32 clock, u32 what, u32 value, u32 step) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(clock), "r"(what), "r"(value), "r"(step)
               : "memory");
}

// ---------------------------------------------------------------------------------------------- fences
DEV void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
DEV void fence_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
DEV void fence_acquire_sys() { asm volatile("fence.acquire.sys;" ::: "memory"); }
DEV void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
DEV void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---------------------------------------------------------------------------------------------- clocks and waiting
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
// The clock, if `tag` is `epoch`: read no earlier than the tag was there.
DEV void clock_when(u32 tag, u32 epoch, u32& clock) {
  asm volatile("{ .reg .pred p; setp.eq.u32 p, %1, %2; @p mov.u32 %0, %clock; }"
               : "+r"(clock)
               : "r"(tag), "r"(epoch)
               : "memory");
}
DEV bool warp_any(bool v) { return __any_sync(~0u, v); }  // also brings the lanes together
DEV bool warp_all(bool v) { return __all_sync(~0u, v); }

}  // namespace imex
#include "waiting.cuh"
namespace imex {

// ---------------------------------------------------------------------------------------------- inside a block
DEV void block_sync() { __syncthreads(); }
// The register file is dealt anew, by groups of four warps: 256 threads of 216 and 128 of 72 are what 384 of 168 had. Consumers hold
// activations and tiles in registers; nobody else needs many. All warps of a group call it once, before anything else.
DEV void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 216;"); }
DEV void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 72;"); }
DEV void consumer_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumerWarps * LANES) : "memory"); }
// A barrier, and whether any consumer said yes. The vote brings a warp's lanes together, as an aligned barrier needs them.
DEV bool consumer_any(bool mine) {
  u32 any;
  asm volatile("{ .reg .pred p, q; setp.ne.u32 p, %1, 0; bar.red.or.pred q, 1, %2, p; selp.u32 %0, 1, 0, q; }"
               : "=r"(any)
               : "r"((u32)warp_any(mine)), "n"(kConsumerWarps * LANES)
               : "memory");
  return any;
}
DEV void warp_sync() { __syncwarp(); }
DEV u32 shuffle(u32 v, int lane) { return __shfl_sync(~0u, v, lane); }
DEV float lanes_sum(float v, int lanes) {  // over groups of so many neighbouring lanes, a power of two; all lanes call it
  for (int o = lanes / 2; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  return v;
}
template <int N>
DEV void lanes_sums(float (&v)[N], int lanes) {  // the same for several values, whose shuffles do not wait for each other
  for (int o = lanes / 2; o; o >>= 1) UNROLL for (int i = 0; i < N; i++) v[i] += __shfl_xor_sync(~0u, v[i], o);
}
DEV float lanes_max(float v, int lanes) {
  for (int o = lanes / 2; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, o));
  return v;
}
DEV float warp_sum(float v) { return lanes_sum(v, LANES); }
DEV u32 warp_sum(u32 v) { return __reduce_add_sync(~0u, v); }
DEV u64 warp_sum(u64 v) {
  UNROLL for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
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
template <class... More>
DEV bool mbar_test_now(Pending p, More... more) {
  const bool first = mbar_test_now(p), others = mbar_test_now(more...);  // none waits for another's answer
  return first & others;
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
DEV bool mbar_wait_warp(Waiter& w, Wait, bool, Phases... phases) {
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
// Of a matrix of 8 x 8 values of 16 bits lane 4 * row + i holds columns 2 * i and 2 * i + 1 of a row: here and there.
DEV u32 transpose_matrix(u32 pair) {
  u32 to;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(pair));
  return to;
}
DEV void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace imex

#include "../chunk.cuh"
#include "tensor.cuh"
