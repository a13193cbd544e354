// The primitives on a CPU: the same functions as cuda/primitives.cuh, which is the contract. Every wait parks its fiber with the
// condition; every store and load that another block may see goes through the memory model (memory.cpp).
#pragma once

#include "machine.h"

#define DEV [[maybe_unused]] static inline
#define DEV_CALL [[maybe_unused]] static __attribute__((noinline))
#define KERNEL extern "C" void
#define GRID_CONSTANT
#define UNROLL
#define ROLLED

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  u32 x, y;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
[[maybe_unused]] static inline float2 make_float2(float x, float y) { return {x, y}; }
[[maybe_unused]] static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
[[maybe_unused]] static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
[[maybe_unused]] static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

namespace imex {

// ---------------------------------------------------------------------------------------------- who am I
DEV const Shape& shape() { return sim::machine.shape; }
DEV int grid_block() { return (int)sim::machine.current->block->index; }
DEV int warp_index() { return (int)sim::machine.current->thread / LANES; }
DEV int not_before(int x) { return x; }
DEV int lane_index() { return LANES == 1 ? 0 : (int)sim::machine.current->lane; }
constexpr int kHeldRows = kMaxRows, kHeldSlots = kMaxSlots, kHeldStages = kMaxStages;  // one build for all shapes
constexpr int kHeaderBytes = kSharedHeaderBytes;
DEV char* shared_memory() { return sim::machine.current->block->shared; }
DEV u32 shared_address(const void* p) { return (u32)((const char*)p - shared_memory()); }

// ---------------------------------------------------------------------------------------------- numbers
DEV float bits_float(u32 v) {
  float f;
  memcpy(&f, &v, 4);
  return f;
}
DEV u32 float_bits(float v) {
  u32 u;
  memcpy(&u, &v, 4);
  return u;
}
DEV float bf16_low(u32 pair) { return bits_float(pair << 16); }
DEV float bf16_high(u32 pair) { return bits_float(pair & 0xffff0000u); }
DEV u32 round_bf16(float v) {  // to nearest even; NaN stays one
  const u32 u = float_bits(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return (u + 0x7fffu + (u >> 16 & 1)) >> 16;
}
DEV u32 pack_bf16(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }
DEV u32 multiply_bf16(u32 pairs, u32 by) { return pack_bf16(bf16_low(pairs) * bf16_low(by), bf16_high(pairs) * bf16_high(by)); }
DEV float fast_exp(float x) {  // 2^n * e^f with a polynomial: the same bits with every C library, and a loop over it vectorises
  const float t = x < -87.f ? -87.f : x > 88.7f ? 88.7f : x;
  const float shifted = t * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the sum's low bits are n, rounded
  const float n = shifted - 12582912.f;
  const float f = (t - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691e-4f;
  p = p * f + 1.3981999e-3f;
  p = p * f + 8.3334519e-3f;
  p = p * f + 4.1665796e-2f;
  p = p * f + 1.6666665e-1f;
  p = p * f + 5.0000001e-1f;
  p = p * f * f + f + 1.f;
  const float e = p * bits_float((float_bits(shifted) - 0x4b400000u + 127u) << 23);
  return x < -87.f ? 0.f : x > 88.7f ? INFINITY : e;
}
DEV float reciprocal_sqrt(float x) { return 1.f / __builtin_sqrtf(x); }
DEV float fast_divide(float a, float b) { return a / b; }
DEV float natural_log(float x) {  // of a positive normal number; log(2^n m), m in [0.7, 1.4), with a polynomial as above
  const u32 shifted = float_bits(x) - 0x3f3504f3u;
  const float n = (float)((int)shifted >> 23), f = bits_float((shifted & 0x7fffffu) + 0x3f3504f3u) - 1.f, z = f * f;
  float p = 7.0376836e-2f;
  p = p * f - 1.1514610e-1f;
  p = p * f + 1.1676999e-1f;
  p = p * f - 1.2420141e-1f;
  p = p * f + 1.4249323e-1f;
  p = p * f - 1.6668057e-1f;
  p = p * f + 2.0000714e-1f;
  p = p * f - 2.4999994e-1f;
  p = p * f + 3.3333331e-1f;
  return (p * f * z - n * 2.12194440e-4f - 0.5f * z + f) + n * 0.693359375f;
}

// ---------------------------------------------------------------------------------------------- global memory
DEV u32 load_const(const u32* p) { return *p; }
DEV u64 load_const(const u64* p) { return *p; }
DEV float2 load_const(const float2* p) { return *p; }
struct EarlyQuads {
  const u64* of;  // the first; the others follow it
};
DEV void prefetch_global(const void*) {}
DEV void ask_early(EarlyQuads& quads, int i, const u64* p) {
  if (i == 0) quads.of = p;
}
DEV u64 early_quad(const EarlyQuads& quads, int i) { return quads.of[i * kConsumerWarps * LANES]; }

DEV u32 load_global(const u32* p) {
  sim::point();
  if (!sim::machine.weak) return *(const volatile u32*)p;
  sim::tsan_read(p, sizeof *p);
  return sim::load_delayed(p);
}
DEV float4 load_global(const float4* p) {
  const u32* words = (const u32*)p;
  return {bits_float(load_global(words)), bits_float(load_global(words + 1)), bits_float(load_global(words + 2)),
          bits_float(load_global(words + 3))};
}
template <class T>
DEV void store_plain(T* p, T v) {
  sim::point();
  u64 bits = 0;
  memcpy(&bits, &v, sizeof v);
  if (sim::machine.weak) {
    sim::tsan_write(p, sizeof v);
    return sim::delay_plain(p, bits, sizeof v);
  }
  *(volatile T*)p = v;
}
DEV void store_global(u32* p, u32 v) { store_plain(p, v); }
DEV void store_global(u16* p, u16 v) { store_plain(p, v); }
DEV void store_global(float2* p, float2 v) { store_plain((u64*)p, (u64)float_bits(v.y) << 32 | float_bits(v.x)); }

DEV u32 load_relaxed_sys(const u32* p) {
  sim::point();
  if (sim::machine.weak && sim::machine.config.host_bytes) return sim::load_host(p);
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}
DEV void store_relaxed_sys(u32* p, u32 v) {
  sim::point();
  if (sim::machine.weak) return sim::delay_relaxed(p, v);
  __atomic_store_n(p, v, __ATOMIC_RELAXED);
}
DEV void store_release_sys(u32* p, u32 v) {
  sim::point();
  if (sim::machine.weak) sim::flush_visible(), sim::flush_overlap(p, 4);
  __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
DEV u32 atomic_add_gpu(u32* p, u32 v) {
  sim::point();
  if (sim::machine.weak) sim::flush_overlap(p, 4);
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
DEV u32 atomic_exchange_sys(u32* p, u32 v) {
  sim::point();
  if (sim::machine.weak) sim::flush_overlap(p, 4);
  return __atomic_exchange_n(p, v, __ATOMIC_RELAXED);
}

DEV void store_word(u64* p, u32 payload, u32 epoch) { sim::put_word(p, (u64)epoch << 32 | payload); }
DEV void store_wide_word(u64* p, u64 payload, u32 epoch) { sim::put_word(p, (u64)epoch << 48 | payload); }
DEV void store_words(u64* p, u32 first, u32 second, u32 epoch) {
  sim::put_words(p, (u64)epoch << 32 | first, (u64)epoch << 32 | second);
}
DEV void load_words(const u64* p, u64& first, u64& second) {
  first = __atomic_load_n(p, __ATOMIC_RELAXED);
  second = __atomic_load_n(p + 1, __ATOMIC_RELAXED);
}

DEV void store_bare_word(u32* p, u32 pair) { sim::put_bare(p, pair); }
DEV void load_bare_words(const u32* p, u32 (&pairs)[4]) {
  for (int j = 0; j < 4; j++) pairs[j] = __atomic_load_n(p + j, __ATOMIC_RELAXED);
}
DEV void clear_bare_words(u32* p) {
  for (int j = 0; j < 4; j++) sim::put_bare(p + j, 0);
}

DEV void store_event(TraceEvent* p, u32 clock, u32 what, u32 value, u32 step) { *p = {clock, what, value, step}; }

// ---------------------------------------------------------------------------------------------- fences
DEV void fence_sys() {
  sim::point();
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  sim::fence(true);
}
DEV void fence_acquire_sys() {
  sim::point();
  __atomic_thread_fence(__ATOMIC_ACQUIRE);
  sim::acquire(true);
}
DEV void fence_gpu() {
  sim::point();
  sim::fence(false);
}
DEV void fence_async_global() {
  sim::point();
  if (sim::machine.weak) sim::proxy_fence();
}
DEV void fence_async_shared() { sim::shared_proxy_fence(); }

}  // namespace imex
#include "waiting.cuh"
namespace imex {

// ---------------------------------------------------------------------------------------------- inside a block
DEV void block_sync() { sim::block_barrier(0, kThreads, false); }
DEV void take_registers() {}
DEV void give_registers() {}
DEV void consumer_sync() { sim::block_barrier(1, kConsumerWarps * LANES, false); }
DEV bool consumer_any(bool mine) { return sim::block_barrier(2, kConsumerWarps * LANES, mine); }
DEV void warp_sync() {
  if (LANES == 1) return;
  sim::point();
  sim::warp_synchronize();
}
DEV bool warp_any(bool v) {
  if (LANES == 1) return v;
  u32 any = v;
  sim::collective(&any, [](void** lane) {
    u32 all = 0;
    for (int i = 0; i < LANES; i++) all |= *(u32*)lane[i];
    for (int i = 0; i < LANES; i++) *(u32*)lane[i] = all;
  });
  return any;
}
DEV bool warp_all(bool v) { return !warp_any(!v); }
DEV u32 shuffle(u32 v, int lane) {
  if (LANES == 1) return v;
  struct Part {
    u32 value, result;
    int from;
  } part{v, 0, lane};
  sim::collective(&part, [](void** lanes) {
    for (int i = 0; i < LANES; i++) ((Part*)lanes[i])->result = ((Part*)lanes[((Part*)lanes[i])->from % LANES])->value;
  });
  return part.result;
}
// A butterfly over groups of neighbouring lanes, in the order of a GPU's shuffles: offsets 16, 8, 4, 2, 1.
template <class T, class Combine>
DEV T lanes_reduce(T v, int lanes, Combine combine) {
  if (LANES == 1) return v;
  sim::collective(&v, [&](void** lane) {
    T all[LANES];
    for (int i = 0; i < LANES; i++) all[i] = *(T*)lane[i];
    for (int o = lanes / 2; o; o >>= 1)
      for (int i = 0; i < LANES; i++)
        if (i % lanes < o) all[i] = combine(all[i], all[i + o]);
    for (int i = 0; i < LANES; i++) *(T*)lane[i] = all[i / lanes * lanes];
  });
  return v;
}
template <class T, class Combine>
DEV T warp_reduce(T v, Combine combine) {
  return lanes_reduce(v, LANES, combine);
}
DEV float lanes_sum(float v, int lanes) {
  return lanes_reduce(v, lanes, [](float a, float b) { return a + b; });
}
template <int N>
DEV void lanes_sums(float (&v)[N], int lanes) {
  for (float& each : v) each = lanes_sum(each, lanes);
}
DEV float lanes_max(float v, int lanes) {
  return lanes_reduce(v, lanes, [](float a, float b) { return fmaxf(a, b); });
}
DEV float warp_sum(float v) { return lanes_sum(v, LANES); }
DEV u32 warp_sum(u32 v) {
  return warp_reduce(v, [](u32 a, u32 b) { return a + b; });
}
DEV u64 warp_sum(u64 v) {
  return warp_reduce(v, [](u64 a, u64 b) { return a + b; });
}
DEV u64 warp_max(u64 v) {
  return warp_reduce(v, [](u64 a, u64 b) { return a > b ? a : b; });
}

// ---------------------------------------------------------------------------------------------- mbarriers and bulk copies
DEV void mbar_init(u64* bar, u32 count) { sim::mbarrier_init(bar, count); }
DEV void mbar_init_done() {}
DEV void mbar_arrive(u64* bar) { sim::mbarrier_arrive(bar, 0, false); }
DEV void mbar_arrive_expect(u64* bar, u32 bytes) { sim::mbarrier_arrive(bar, bytes, true); }
struct Pending {
  u64* bar;
  u32 parity;
};
DEV bool mbar_test(Pending p) {
  if (!sim::mbarrier_done(p.bar, p.parity)) return false;
  sim::mbarrier_seen(p.bar, p.parity);
  return true;
}
template <class... More>
DEV bool mbar_test_now(Pending p, More... more) {
  return mbar_test(p) && (mbar_test(more) && ...);
}
DEV bool mbar_wait(Waiter& w, Wait kind, bool idle, Pending p) {
  sim::point();
  sim::WaitNote note{};
  note.kind = kind, note.idle = idle, note.expected = p.parity, note.seen = p.parity ^ 1;
  note.source = w.params->rank, note.address = p.bar;
  while (!mbar_test(p) && !w.failed)
    if (park_once(w, sim::Park::kMbar, note)) break;
  return !w.failed;
}
template <class... Phases>
DEV bool mbar_wait(Waiter& w, Wait kind, bool idle, Pending first, Phases... phases) {
  return mbar_wait(w, kind, idle, first) && mbar_wait(w, kind, idle, phases...);
}
template <class... Phases>
DEV bool mbar_wait_warp(Waiter& w, Wait kind, bool idle, Phases... phases) {
  mbar_wait(w, kind, idle, phases...);
  w.failed = warp_any(w.failed);  // as on a GPU: all lanes give up or none
  return !w.failed;
}
DEV void mbar_drain(Pending p) {
  sim::WaitNote note{};
  note.kind = Wait::kTile, note.idle = true, note.expected = p.parity, note.seen = p.parity ^ 1;
  note.address = p.bar, note.deadline_ns = ~0ull, note.began_ns = timer_ns();
  while (!mbar_test(p)) sim::park_wait(sim::Park::kMbar, note);
}
DEV void bulk_copy(void* shared, const void* global, u32 bytes, u64* bar) {
  sim::point();
  sim::start_copy(shared, global, bytes, bar);
  sim::point();  // who waits for it may overtake what comes next
}

}  // namespace imex

#include "../chunk.cuh"
#include "tensor.cuh"
