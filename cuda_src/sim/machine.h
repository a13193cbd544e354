// The simulated machine: one fiber per CUDA thread (LANES = 32) or per warp (LANES = 1), blocks, and the launch they belong to.
// The kernel sees none of this; primitives.cuh offers it the functions of a GPU on top. Nothing here needs libstdc++ at run time.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#include "../abi.cuh"
#include "tsan.h"

#ifndef SIM_LANES
#define SIM_LANES 1
#endif

namespace imex {

constexpr int LANES = SIM_LANES;
constexpr int kThreads = kNumWarps * LANES;
static_assert(LANES == 1 || LANES == 32, "a warp is simulated as one fiber or as 32");

namespace sim {

enum class Mode : u32 { kRoundRobin, kRandom, kPct };
enum class OnDeadlock : u32 { kReport, kExpire };
enum Status : int { kOk = 0, kMisuse = 1, kDeadlock = 2, kStopped = 3, kBusy = 4, kNoMemory = 5 };

// How a launch is simulated. device/sim.py has the same fields in the same order.
struct SimConfig {
  u64 seed;
  u64 stop;  // address of a u32: non-zero ends the launch at its next dispatch
  Mode mode;
  u32 processes;     // ranks of other processes may write memory: re-poll parked word waits, count in wall time
  u32 preempt;       // leave the fiber at one of so many memory operations; 0: only where it must wait
  u32 delay_stores;  // weak memory: stores wait in their block's buffer, loads may be stale
  u32 delay_copies;  // bulk copies land late and in pieces
  u32 split_words;   // the halves of a 16-byte store of two words may land apart
  u32 stalls;        // blocks and single warps stand still for a random while
  u32 pct_depth;     // PCT: priority changes in a run
  u32 pct_steps;     // PCT: dispatches among which the changes are spread
  OnDeadlock on_deadlock;
  u64 abort_step;  // dispatch at which every rank's abort word is raised; 0: never
  u64 host_bytes;  // of mailbox and arena: what the host writes there may be stale until a fence_sys; 0: never
};
static_assert(sizeof(SimConfig) == 72);

enum class State : unsigned char { kReady, kParked, kDone };
enum class Park : unsigned char { kNone, kWord, kMbar, kBarrier, kWarp, kIdle };

struct Block;
struct Warp;

// Plain stores that are seen for sure, by the number that they got when they reached memory: those of blocks of the same rank up to
// `gpu`, the last fence of either scope; those of other ranks that their writer fenced at system scope, up to `sys`, the last fence_sys.
struct View {
  u64 gpu, sys;
};
inline View later(View a, View b) { return {a.gpu > b.gpu ? a.gpu : b.gpu, a.sys > b.sys ? a.sys : b.sys}; }

// What a parked fiber waits for: enough for a report, a deadline and the re-poll of memory that another process writes.
struct WaitNote {
  const void* address;  // of the word or mbarrier
  Wait kind;
  Phase phase;
  u32 layer;
  u32 source;        // rank that owes the word
  u32 expected;      // what a word has of the epoch above its payload, or parity
  int payload_bits;  // 0: a bare word, which is there when it is not zero
  u32 seen;
  bool idle;
  u64 began_ns;
  u64 deadline_ns;
};

struct Fiber {
  void* sp;
  Block* block;
  Warp* warp;
  u32 lane;
  u32 thread;  // of the block
  State state;
  Park park;
  bool ask;            // woken to call give_up, not because its condition holds
  bool aborted;        // has been told of the abort word already
  u32 private_stores;  // own delayed stores that no barrier has shared with the block yet
  View view;           // own, or learnt of by a barrier or mbarrier
  u64 view_async;      // `view.gpu` at the last fence_async_global: what bulk copies see for sure
  WaitNote note;
  Fiber* next;  // parked on the same pair of words, or on an mbarrier of the same block
  char* stack;
  void* tsan;
};

struct Warp {
  u32 ready;     // mask of lanes
  u32 position;  // in Machine::ready
  u32 arrived;   // mask of lanes at the collective
  u32 exited;    // mask of lanes: warp_sync does not wait for them, and nothing else may be called without them
  bool syncing;  // the collective is a warp_sync
  View view, view_result;
  bool mailbox;  // has paused idly: its steps alone are no progress
  u64 priority;  // PCT
  u64 stalled_until;
  bool starved;  // runs only when nobody else can, or when it has been ready for very long
  u64 ready_at;  // dispatch at which it last ran or became ready
  Fiber* fibers;
  void* slot[LANES];                                   // what each lane brought to the collective
  float scratch[2][kMaxRows * kChunk + 4 * kMaxRows];  // of attention (tensor_lanes.cuh), used in turn
  u32 turn;
};

struct Barrier {
  u32 arrived;
  u32 generation;
  bool any, result;
  View view, view_result;
};

struct PendingStore;

struct Block {
  u32 index;     // over all ranks of the launch
  u32 rank_idx;  // in LaunchParams
  char* shared;
  View* mbar_view;      // [smem_bytes / 8]: what arrivals at the mbarrier of that offset had seen
  char* landed_shared;  // [smem_bytes]: what the async proxy knows of it; where it differs, plain stores wrote
  u32 alive;
  Barrier barriers[3];
  Fiber* mbar_waiters;
  void* tsan_async;  // the async proxy
  u64 stalled_until;
  u32 hold;        // of words: 0 until a fence or until nothing else can run, n: one in n chances
  u32 hold_plain;  // of plain stores: the same, but 0 is until a fence and no earlier: nobody may count on less
  u32 copy_hold;
  u32 stale;  // how often a load that no fence protects is stale: 0 never, 1 half, 2 always
  PendingStore* pending;
  u32 num_pending;
  Warp* warps;
  Fiber* fibers;
};

constexpr u32 kBuckets = 4096;

struct Machine {
  Fiber* current;
  u32 preempt;
  bool weak;    // delay_stores
  bool simple;  // fibers may hand over to each other without the scheduler's loop
  bool processes;
  Shape shape;
  LaunchParams params;
  SimConfig config;
  Fiber* parked[kBuckets];  // word waits by address
  void* main_sp;
  void* main_tsan;
  Fiber* fibers;
  Warp* warps;
  Block* blocks;
  u32 num_fibers, num_warps, num_blocks, alive, num_idle;
  Warp** ready;
  u32 num_ready, turn;
  u64 random_state;
  u64 steps, switches, drains, copies;
  u64 progress;  // dispatches of warps that are not the mailbox
  u64 clock_ns;  // virtual time
  u64 sequence;  // of plain stores that reached memory
  u64 stall_step;
  u64 change_at[16];  // PCT
  int status;
};
extern Machine machine;

// ---------------------------------------------------------------------------------------------- scheduler.cpp
void make_ready(Fiber* f);
void park(Park kind);                             // the current fiber, until somebody makes it ready
bool park_wait(Park kind, const WaitNote& note);  // true: woken to ask give_up
void wake_pair(const void* address);
void maybe_yield();
void pause_idle();
void stand_still(u64 ns);
u64 now_ns();
[[noreturn]] void misuse(const char* format, ...);  // ends the launch with a report
inline void point() {                               // where a schedule may change
  if (__builtin_expect(machine.preempt != 0, 0)) maybe_yield();
}
inline u64 random_u64() {  // splitmix64
  u64 z = (machine.random_state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}
inline bool one_in(u32 n) { return n && random_u64() % n == 0; }
inline u32 bucket_of(const void* p) { return (u32)((uintptr_t)p >> 4) % kBuckets; }

// ---------------------------------------------------------------------------------------------- report.cpp
void report_clear();
void report_add(const char* format, ...);
void report_waits(const char* headline);

// ---------------------------------------------------------------------------------------------- memory.cpp
constexpr u32 kMaxPending = 512;  // delayed stores a block may hold
bool memory_setup();              // buffers of all blocks; false: no memory
void memory_teardown();
void delay_words(u64* p, u64 first, u64 second, int count);
void delay_plain(void* p, u64 value, u32 size);
void delay_relaxed(u32* p, u32 value);
u32 load_delayed(const u32* p);  // own delayed stores over what a load without a fence may see
void flush_visible();            // delayed stores that a fence of the current fiber covers
void flush_overlap(const void* p, u32 size);
void share_stores();  // a barrier: the block's fences now cover the current fiber's stores
void fence(bool sys);
void acquire(bool sys);  // the half of a fence that makes loads fresh
void proxy_fence();
void shared_proxy_fence();
void block_ends(Block* block);
u32 load_host(const u32* p);  // relaxed; what the host writes beyond the rings is fresh after a fence
bool drain_some(bool must);   // lets delayed stores and copies land; true if one did
void start_copy(void* shared, const void* global, u32 bytes, u64* bar);

// ---------------------------------------------------------------------------------------------- sync.cpp
bool block_barrier(int id, u32 count, bool vote);
void fiber_exits();
void mbarrier_init(u64* bar, u32 count);
void mbarrier_arrive(u64* bar, u32 bytes, bool expect);
void mbarrier_complete(Block* block, u64* bar, u32 bytes);
bool mbarrier_done(u64* bar, u32 parity);
void mbarrier_seen(u64* bar, u32 parity);  // the current fiber has waited for it: it sees what the arrivals saw
void warp_synchronize();                   // __syncwarp: also orders memory among the lanes
bool warp_arrive(void* mine);              // true for the last lane, which computes for all and then calls warp_release
void warp_release();

// One warp collective: every lane brings a pointer to its part; the last to arrive runs `all` over the 32 parts and writes results
// through them. No lane leaves before, so the parts may live on the lanes' stacks.
template <class All>
inline void collective(void* mine, All all) {
  if (warp_arrive(mine)) {
    tsan_ignore(true);  // a shuffle orders nothing
    all(machine.current->warp->slot);
    tsan_ignore(false);
    warp_release();
  }
}

inline void put_word(u64* p, u64 value) {
  point();
  tsan_word_stored(p);
  if (machine.weak) return delay_words(p, value, 0, 1);
  __atomic_store_n(p, value, __ATOMIC_RELAXED);
  if (machine.parked[bucket_of(p)]) wake_pair(p);
}
inline void put_words(u64* p, u64 first, u64 second) {
  point();
  tsan_word_stored(p);
  tsan_word_stored(p + 1);
  if (machine.weak) return delay_words(p, first, second, 2);
  __atomic_store_n(p, first, __ATOMIC_RELAXED);
  __atomic_store_n(p + 1, second, __ATOMIC_RELAXED);
  if (machine.parked[bucket_of(p)]) wake_pair(p);
}

inline void put_bare(u32* p, u32 value) {
  point();
  tsan_word_stored(p);
  if (machine.weak) return delay_relaxed(p, value);
  __atomic_store_n(p, value, __ATOMIC_RELAXED);
  if (machine.parked[bucket_of(p)]) wake_pair(p);
}

void kernel_entry();  // kernel.cpp: the kernel under test, on the current fiber's stack

}  // namespace sim
}  // namespace imex
