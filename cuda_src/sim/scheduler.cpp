// Who runs next. Fibers leave only where they must wait (round robin) or also at any memory operation (random, PCT). A parked fiber has
// its condition with it, so when nothing can run we know exactly who waits for what.
#include <sched.h>
#include <time.h>

#include "machine.h"
#include "switch.h"

namespace imex {
namespace sim {

Machine machine;

namespace {
constexpr u32 kHousekeeping = 64;   // dispatches between two looks at idle fibers
constexpr u64 kPatience = 16384;    // of a starved warp, in dispatches: somebody may be polling all the time
constexpr u32 kAbortSteps = 4096;   // dispatches between two looks at the abort words while others run
constexpr u64 kStepNs = 20;         // virtual time of a dispatch
constexpr u64 kBusyNs = 2'000'000;  // without progress before sleeping: a peer's words are seldom longer away
constexpr u64 kSleepMinNs = 50'000, kSleepMaxNs = 1'000'000;
constexpr u64 kAskEveryNs = 1'000'000;  // between two looks at deadlines while nothing runs

struct {
  u64 progress, since_ns, sleep_ns, last_ask_ns, last_wall_ns;
} quiet;

u64 wall_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (u64)t.tv_sec * 1'000'000'000 + t.tv_nsec;
}

void remove_ready(Warp* w) {
  Warp* last = machine.ready[--machine.num_ready];
  machine.ready[w->position] = last;
  last->position = w->position;
  if (machine.turn == w->position + 1) machine.turn--;  // who moved here has not had its turn
}

void unready(Fiber* f) {
  f->warp->ready &= ~(1u << f->lane);
  if (!f->warp->ready) remove_ready(f->warp);
}

Fiber* dispatch(Fiber* f) {
  machine.switches++;
  machine.progress += !f->warp->mailbox;
  f->warp->ready_at = machine.steps;
  machine.current = f;
  return f;
}

Fiber* pick_lane(Warp* w) {
  u32 mask = w->ready;
  if (LANES > 1 && machine.config.mode != Mode::kRoundRobin)
    for (u32 skip = random_u64() % __builtin_popcount(mask); skip; skip--) mask &= mask - 1;
  return w->fibers + __builtin_ctz(mask);
}

Warp* pick_warp() {
  switch (machine.config.mode) {
    case Mode::kRoundRobin:
      if (machine.turn >= machine.num_ready) machine.turn = 0;
      return machine.ready[machine.turn++];
    case Mode::kRandom: return machine.ready[random_u64() % machine.num_ready];
    default:
      Warp* best = machine.ready[0];
      for (u32 i = 1; i < machine.num_ready; i++)
        if (machine.ready[i]->priority > best->priority) best = machine.ready[i];
      for (u32 i = 0; i < machine.config.pct_depth; i++)
        if (machine.change_at[i] == machine.steps) best->priority = i;
      return best;
  }
}

u32 reluctance(const Warp* w) {
  return 2 * (w->starved && machine.steps - w->ready_at < kPatience) +
         (w->stalled_until > machine.steps || w->fibers->block->stalled_until > machine.steps);
}

// A stalled block or warp stands still unless nobody else can run, and a starved one even then if a stalled one can.
Warp* pick_unstalled() {
  if (one_in(512)) {
    Warp* w = machine.ready[random_u64() % machine.num_ready];
    (random_u64() & 1 ? w->stalled_until : w->fibers->block->stalled_until) =
        machine.steps + random_u64() % (2048u << random_u64() % 5);
  }
  Warp* w = pick_warp();
  u32 i = reluctance(w) ? random_u64() % machine.num_ready : 0;
  for (u32 tries = 0; tries < machine.num_ready && reluctance(w); tries++, i = (i + 1) % machine.num_ready)
    if (reluctance(machine.ready[i]) < reluctance(w)) w = machine.ready[i];
  return w;
}

void continue_fiber(void** save, Fiber* f) {
  tsan_switch(f->tsan);
  imex_sim_switch(save, f->sp);
}
void continue_scheduler(void** save) {
  tsan_switch(machine.main_tsan);
  imex_sim_switch(save, machine.main_sp);
}

// Called by the current fiber after it changed its state: continues another, or the scheduler's own context.
void leave() {
  Fiber* self = machine.current;
  if (machine.simple && ++machine.steps % kHousekeeping) {
    Fiber* next = nullptr;
    if (LANES > 1 && self->warp->ready) {  // the next lane of the same warp: warps mostly move together
      const u32 after = self->lane == 31 ? 0 : self->warp->ready >> (self->lane + 1) << (self->lane + 1);
      next = self->warp->fibers + __builtin_ctz(after ? after : self->warp->ready);
    } else if (machine.num_ready) {
      next = pick_lane(pick_warp());
    }
    if (next) {
      machine.clock_ns += kStepNs;
      dispatch(next);
      if (next != self) continue_fiber(&self->sp, next);
      return;
    }
  }
  continue_scheduler(&self->sp);
}

void fiber_main() {
  kernel_entry();
  Fiber* f = machine.current;
  fiber_exits();
  f->state = State::kDone;
  unready(f);
  machine.alive--;
  leave();
  __builtin_trap();
}

Fiber** waiters_of(const Fiber* f) {
  return f->park == Park::kWord ? &machine.parked[bucket_of(f->note.address)] : &f->block->mbar_waiters;
}

void unlink_waiter(Fiber* f) {
  Fiber** at = waiters_of(f);
  while (*at != f) at = &(*at)->next;
  *at = f->next;
}

void ask_fiber(Fiber* f) {
  unlink_waiter(f);
  f->ask = true;
  make_ready(f);
}

u64* abort_word(const RankParams& r) { return r.peers[r.rank] ? (u64*)r.peers[r.rank] + machine.shape.off_abort : nullptr; }
bool abort_raised(const Block* b) {
  const u64* word = abort_word(machine.params.ranks[b->rank_idx]);
  return word && __atomic_load_n(word, __ATOMIC_RELAXED) != 0;
}
void raise_abort() {
  for (u32 i = 0; i < machine.params.num_ranks; i++)
    if (u64* word = abort_word(machine.params.ranks[i])) __atomic_store_n((u32*)word, 1, __ATOMIC_RELAXED);
}

// Wakes the waits whose deadline has passed or whose rank was aborted, so that they call give_up; true if there was one.
bool ask_waits() {
  bool any = false;
  const u64 now = now_ns();
  for (Fiber* f = machine.fibers; f < machine.fibers + machine.num_fibers; f++) {
    if (f->state != State::kParked || (f->park != Park::kWord && f->park != Park::kMbar)) continue;
    const bool aborted = !f->aborted && abort_raised(f->block);
    if (!aborted && now <= f->note.deadline_ns) continue;
    f->aborted |= aborted;
    ask_fiber(f);
    any = true;
  }
  return any;
}

bool expire_next() {  // nothing will happen any more: moves virtual time to the first deadline
  u64 first = ~0ull;
  for (Fiber* f = machine.fibers; f < machine.fibers + machine.num_fibers; f++)
    if (f->state == State::kParked && (f->park == Park::kWord || f->park == Park::kMbar) && f->note.deadline_ns < first)
      first = f->note.deadline_ns;
  if (first == ~0ull) return false;
  if (machine.clock_ns <= first) machine.clock_ns = first + 1000;
  return ask_waits();
}

bool wake_idle() {
  if (!machine.num_idle) return false;
  for (Fiber* f = machine.fibers; f < machine.fibers + machine.num_fibers; f++)
    if (f->state == State::kParked && f->park == Park::kIdle) machine.num_idle--, make_ready(f);
  return true;
}

bool poll_words() {  // another process may have written what is waited for
  bool any = false;
  for (Fiber* f = machine.fibers; f < machine.fibers + machine.num_fibers; f++) {
    if (f->state != State::kParked || f->park != Park::kWord) continue;
    const bool there =
        f->note.payload_bits
            ? (u32)(__atomic_load_n((const u64*)f->note.address, __ATOMIC_ACQUIRE) >> f->note.payload_bits) == f->note.expected
            : __atomic_load_n((const u32*)f->note.address, __ATOMIC_ACQUIRE) != 0;
    if (!there) continue;
    unlink_waiter(f);
    make_ready(f);
    any = true;
  }
  return any;
}

// Nothing can run. Lets what is delayed land, other processes write, the host speak, deadlines pass; kDeadlock when none of it can help.
int quiescent() {
  if (drain_some(true)) return kOk;
  const bool outside = machine.num_idle || machine.processes;
  if (machine.processes && poll_words()) return kOk;
  if (!outside) {
    if (ask_waits()) return kOk;
    if (machine.config.on_deadlock == OnDeadlock::kExpire && expire_next()) return kOk;
    report_waits("deadlock: nothing can run");
    return kDeadlock;
  }
  const u64 wall = wall_ns();
  if (quiet.progress != machine.progress) quiet = {machine.progress, wall, kSleepMinNs, quiet.last_ask_ns, wall};
  machine.clock_ns += wall - quiet.last_wall_ns;  // while nothing runs, virtual time passes with the wall's
  quiet.last_wall_ns = wall;
  if (wall - quiet.last_ask_ns > kAskEveryNs) {
    quiet.last_ask_ns = wall;
    if (ask_waits()) return kOk;
  }
  if (wall - quiet.since_ns > kBusyNs) {
    const timespec t{0, (long)quiet.sleep_ns};
    nanosleep(&t, nullptr);
    if (quiet.sleep_ns < kSleepMaxNs) quiet.sleep_ns += quiet.sleep_ns / 4;
  } else {
    sched_yield();  // there may be fewer cores than ranks
  }
  wake_idle();
  return kOk;
}

}  // namespace

u64 now_ns() { return machine.processes ? wall_ns() : machine.clock_ns; }

void make_ready(Fiber* f) {
  f->state = State::kReady;
  Warp* w = f->warp;
  if (!w->ready) {
    w->position = machine.num_ready;
    w->ready_at = machine.steps;
    machine.ready[machine.num_ready++] = w;
  }
  w->ready |= 1u << f->lane;
}

void park(Park kind) {
  Fiber* f = machine.current;
  f->park = kind;
  f->state = State::kParked;
  unready(f);
  leave();
}

bool park_wait(Park kind, const WaitNote& note) {
  Fiber* f = machine.current;
  f->note = note;
  if (!note.began_ns) f->note.began_ns = now_ns();
  f->ask = false;
  f->park = kind;
  Fiber** last = waiters_of(f);
  while (*last) last = &(*last)->next;  // in order of arrival: schedules do not depend on addresses
  *last = f;
  f->next = nullptr;
  park(kind);
  return f->ask;
}

void wake_pair(const void* address) {
  for (Fiber** at = &machine.parked[bucket_of(address)]; *at;) {
    Fiber* f = *at;
    if ((uintptr_t)f->note.address >> 4 == (uintptr_t)address >> 4) {
      *at = f->next;
      make_ready(f);
    } else {
      at = &f->next;
    }
  }
}

void maybe_yield() {
  if (machine.current->warp->starved || one_in(machine.preempt)) leave();
}

void pause_idle() {
  machine.num_idle++;
  machine.current->warp->mailbox = true;
  machine.current->note = WaitNote{};
  park(Park::kIdle);
}

void stand_still(u64 ns) {
  for (const u64 end = now_ns() + ns; now_ns() < end;) leave();
}

void fail_launch(int status) {
  machine.status = status;
  void* nowhere;
  continue_scheduler(&nowhere);
  __builtin_trap();
}

void start_fiber(Fiber* f, char* stack, size_t bytes) {
  f->stack = stack;
  f->tsan = tsan_create();
  f->sp = make_context(stack, bytes, fiber_main);
  make_ready(f);
}

static int dispatch_all() {
  const u32* stop = (const u32*)machine.config.stop;
  quiet = {};
  quiet.last_wall_ns = wall_ns();
  while (machine.alive && machine.status == kOk) {
    if (stop && __atomic_load_n(stop, __ATOMIC_RELAXED)) return kStopped;
    machine.steps++;
    machine.clock_ns += kStepNs;
    drain_some(false);
    if (machine.steps == machine.config.abort_step) raise_abort();
    if (machine.num_idle && machine.num_ready && (machine.simple || one_in(kHousekeeping))) wake_idle();
    if (machine.steps % kAbortSteps < (machine.simple ? kHousekeeping : 1u)) ask_waits();
    if (!machine.num_ready) {
      const int status = quiescent();
      if (status != kOk) return status;
      continue;
    }
    Fiber* f = dispatch(pick_lane(machine.config.stalls ? pick_unstalled() : pick_warp()));
    continue_fiber(&machine.main_sp, f);
  }
  return machine.status;
}

// What this launch did happens before whatever comes after it, also what its fibers did that never ended.
static void join_fibers() {
  auto join = [](void* fiber) {
    tsan_switch(fiber);
    tsan_release(&machine);
    tsan_switch(machine.main_tsan);
    tsan_destroy(fiber);
  };
  for (u32 i = 0; i < machine.num_fibers; i++) join(machine.fibers[i].tsan);
  for (u32 i = 0; i < machine.num_blocks; i++) join(machine.blocks[i].tsan_async);
  tsan_acquire(&machine);
}

int run_fibers() {
  machine.main_tsan = tsan_self();
  for (u32 i = 0; i < machine.num_blocks; i++) machine.blocks[i].tsan_async = tsan_create();
  const int status = dispatch_all();
  if (kTsan) join_fibers();
  return status;
}

}  // namespace sim
}  // namespace imex
