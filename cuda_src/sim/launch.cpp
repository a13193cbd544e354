// The C entry: sets a machine up for a launch, runs it, takes it down.
#include <stdlib.h>
#include <sys/mman.h>

#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_poison_memory_region(const void* p, size_t bytes);
extern "C" void __asan_unpoison_memory_region(const void* p, size_t bytes);
#else
static void __asan_poison_memory_region(const void*, size_t) {}
static void __asan_unpoison_memory_region(const void*, size_t) {}
#endif

namespace imex {
namespace sim {

int run_fibers();
void start_fiber(Fiber* f, char* stack, size_t bytes);
const char* report_text();

namespace {

constexpr size_t kStackBytes = LANES == 1 ? 256 << 10 : 64 << 10;
constexpr size_t kGuardBytes = 4096;
constexpr u32 kMaxGuards = 16384;  // each splits a mapping; the kernel allows about 65000

bool busy;

char* map_memory(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : (char*)p;
}

struct Memory {
  char* stacks = nullptr;
  char* shared = nullptr;
  char* landed = nullptr;
  char* views = nullptr;
  size_t stacks_bytes = 0, shared_bytes = 0;
  ~Memory() {
    memory_teardown();
    if (stacks) munmap(stacks, stacks_bytes);
    if (shared) __asan_unpoison_memory_region(shared, shared_bytes), munmap(shared, shared_bytes);
    if (landed) munmap(landed, shared_bytes);
    if (views) munmap(views, 2 * shared_bytes);
    free(machine.fibers), free(machine.warps), free(machine.blocks), free(machine.ready);
    machine.fibers = nullptr, machine.warps = nullptr, machine.blocks = nullptr, machine.ready = nullptr;
  }
};

u32 draw_policy(u32 slow) {  // eager, slow, or only when it must be
  const u32 kind = random_u64() % 3;
  return kind == 0 ? 1 : kind == 1 ? slow : 0;
}

// A few warps run only when nobody else can: none, up to three of them, those of one role in all blocks, or those of one block.
void starve() {
  Machine& m = machine;
  const u32 kind = random_u64() % 4,
            role = random_u64() & 1 ? random_u64() % kNumWarps : kConsumerWarps + random_u64() % (kNumWarps - kConsumerWarps),
            block = random_u64() % m.num_blocks;
  for (u32 i = random_u64() % 3 + 1; i && kind == 1; i--) m.warps[random_u64() % m.num_warps].starved = true;
  for (u32 w = 0; w < m.num_warps && kind == 2; w++) m.warps[w].starved = w % kNumWarps == role;
  for (u32 w = 0; w < kNumWarps && kind == 3; w++) m.blocks[block].warps[w].starved = true;
}

bool set_up(Memory& memory) {
  Machine& m = machine;
  m.num_blocks = m.params.num_ranks * m.shape.num_blocks;
  m.num_warps = m.num_blocks * (kThreads / LANES);
  m.num_fibers = m.alive = m.num_blocks * kThreads;
  const size_t shared_stride = ((size_t)m.shape.smem_bytes + 1023) / 1024 * 1024 + 1024;
  m.fibers = (Fiber*)calloc(m.num_fibers, sizeof(Fiber));
  m.warps = (Warp*)calloc(m.num_warps, sizeof(Warp));
  m.blocks = (Block*)calloc(m.num_blocks, sizeof(Block));
  m.ready = (Warp**)calloc(m.num_warps, sizeof(Warp*));
  memory.stacks_bytes = m.num_fibers * kStackBytes;
  memory.shared_bytes = m.num_blocks * shared_stride;
  memory.stacks = map_memory(memory.stacks_bytes);
  memory.shared = map_memory(memory.shared_bytes);
  memory.views = map_memory(2 * memory.shared_bytes);
  if (!m.fibers || !m.warps || !m.blocks || !m.ready || !memory.stacks || !memory.shared || !memory.views) return false;
  memset(memory.shared, 0xff, memory.shared_bytes);  // NaN until somebody writes
  if (m.config.delay_copies) {
    if (!(memory.landed = map_memory(memory.shared_bytes))) return false;
    memset(memory.landed, 0xff, memory.shared_bytes);
  }
  for (u32 b = 0; b < m.num_blocks; b++) {
    Block& block = m.blocks[b];
    block.index = b;
    block.rank_idx = b / m.shape.num_blocks;
    block.shared = memory.shared + b * shared_stride;
    __asan_poison_memory_region(block.shared + m.shape.smem_bytes, shared_stride - m.shape.smem_bytes);
    block.mbar_view = (View*)(memory.views + 2 * b * shared_stride);
    block.landed_shared = memory.landed ? memory.landed + b * shared_stride : nullptr;
    block.alive = kThreads;
    block.hold = draw_policy(8 << random_u64() % 4);
    block.hold_plain = draw_policy(8 << random_u64() % 4);
    block.copy_hold = draw_policy(2 << random_u64() % 4);
    block.stale = random_u64() % 3;
    block.warps = m.warps + b * (kThreads / LANES);
    block.fibers = m.fibers + b * kThreads;
    for (int t = 0; t < kThreads; t++) {
      Fiber& f = block.fibers[t];
      f.block = &block;
      f.warp = block.warps + t / LANES;
      f.lane = t % LANES;
      f.thread = t;
      if (!f.lane) f.warp->fibers = &f;
    }
  }
  for (u32 w = 0; w < m.num_warps; w++) m.warps[w].priority = (1ull << 40) + random_u64() % (1ull << 40);
  if (m.config.stalls) starve();
  for (u64& step : m.change_at) step = m.config.pct_steps ? random_u64() % m.config.pct_steps : 0;
  if (!memory_setup()) return false;
  for (u32 i = 0; i < m.num_fibers; i++) {
    char* stack = memory.stacks + i * kStackBytes;
    if (m.num_fibers <= kMaxGuards) mprotect(stack, kGuardBytes, PROT_NONE);
    start_fiber(m.fibers + i, stack + kGuardBytes, kStackBytes - kGuardBytes);
  }
  return true;
}

bool checked(const SimConfig& c, const Shape& s, const LaunchParams& p) {
  if (p.num_ranks < 1 || p.num_ranks > kMaxRanks || s.num_blocks < 1)
    return report_add("a launch of %u ranks with %u blocks each", p.num_ranks, s.num_blocks), false;
  if (s.max_rows > kMaxRows || s.head_dim > kMaxHeadDim)
    return report_add("max_rows %u or head_dim %u above %d, %d", s.max_rows, s.head_dim, kMaxRows, kMaxHeadDim), false;
  if ((u32)c.mode > 2 || c.pct_depth > 16) return report_add("mode %u, pct_depth %u", (u32)c.mode, c.pct_depth), false;
  return true;
}

}  // namespace
}  // namespace sim
}  // namespace imex

#define EXPORT extern "C" __attribute__((visibility("default")))

// Runs the kernel to its end; one launch at a time in a process. Returns a Status; the report says more.
EXPORT int imex_sim_launch(const imex::sim::SimConfig* config, const imex::Shape* shape, const imex::LaunchParams* params) {
  using namespace imex::sim;
  if (__atomic_exchange_n(&busy, true, __ATOMIC_ACQUIRE)) return kBusy;
  report_clear();
  int status = kMisuse;
  if (checked(*config, *shape, *params)) {
    machine = Machine{};
    machine.config = *config;
    machine.shape = *shape;
    machine.params = *params;
    machine.preempt = config->preempt;
    machine.weak = config->delay_stores;
    machine.processes = config->processes;
    machine.simple = config->mode == Mode::kRoundRobin && !config->delay_stores && !config->delay_copies && !config->stalls;
    machine.random_state = config->seed * 0x2545f4914f6cdd1dull + 1;
    Memory memory;
    status = set_up(memory) ? run_fibers() : kNoMemory;
    machine.status = status;
    if (status == kStopped) report_waits("stopped by the host");
    if (status == kNoMemory) report_add("not enough memory for %u fibers", machine.num_fibers);
  }
  __atomic_store_n(&busy, false, __ATOMIC_RELEASE);
  return status;
}

EXPORT const char* imex_sim_report() { return imex::sim::report_text(); }

// Counters of the last launch: dispatches by the scheduler, switches, delayed stores landed, copies, virtual nanoseconds.
EXPORT void imex_sim_stats(u64 (&out)[5]) {
  const imex::sim::Machine& m = imex::sim::machine;
  out[0] = m.steps, out[1] = m.switches, out[2] = m.drains, out[3] = m.copies, out[4] = m.clock_ns;
}
