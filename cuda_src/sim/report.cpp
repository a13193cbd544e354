// What a launch says when it cannot go on: who waits for what, exactly.
#include <stdarg.h>
#include <stdio.h>

#include "machine.h"

namespace imex {
namespace sim {

static char text[1 << 16];
static size_t used;

void fail_launch(int status);

const char* report_text() { return text; }

void report_clear() { used = 0, text[0] = 0; }

static void add(const char* format, va_list args) {
  const int n = vsnprintf(text + used, sizeof text - used, format, args);
  if (n > 0) used = used + n < sizeof text - 1 ? used + n : sizeof text - 1;
}

void report_add(const char* format, ...) {
  va_list args;
  va_start(args, format);
  add(format, args);
  va_end(args);
}

static const char* name_of(Phase p) {
  static const char* const kNames[] = {"embed", "qkv", "attention", "o_proj", "gate_up", "down_proj", "lm_head", "sample"};
  return (u32)p < 8 ? kNames[(u32)p] : "?";
}
static const char* name_of(Wait w) {
  static const char* const kNames[] = {"words", "a tile", "a free stage", "partial sums", "the plan", "the step's end"};
  return (u32)w < 6 ? kNames[(u32)w] : "?";
}
static const char* barrier_name(u32 id) {
  static const char* const kNames[] = {"block_sync", "consumer_sync", "consumer_any"};
  return kNames[id];
}

static void where(const Fiber* f) {
  const LaunchParams& p = machine.params;
  report_add("rank %u block %u warp %u", p.ranks[f->block->rank_idx].rank, f->block->index % machine.shape.num_blocks,
             f->thread / LANES);
  if (LANES > 1) report_add(" lane %u", f->lane);
}

static bool same_wait(const Fiber* a, const Fiber* b) {
  return a->state == b->state && a->park == b->park && a->note.address == b->note.address &&
         a->note.expected == b->note.expected;
}

void report_waits(const char* headline) {
  report_add("%s (seed %llu, dispatch %llu)", headline, machine.config.seed, machine.steps);
  constexpr u32 kMaxLines = 200;
  u32 lines = 0;
  for (u32 i = 0; i < machine.num_fibers; i++) {
    const Fiber* f = machine.fibers + i;
    if (f->state == State::kDone) continue;
    if (++lines > kMaxLines) return report_add("\n  ... and more");
    u32 same = 0;  // further lanes of the warp in the same wait
    while (f->lane + same + 1 < LANES && same_wait(f, f + same + 1)) same++;
    report_add("\n  ");
    where(f);
    if (same) report_add("-%u", f->lane + same);
    i += same;
    const WaitNote& n = f->note;
    if (f->state == State::kReady) {
      report_add(": ready");
    } else if (f->park == Park::kBarrier) {
      const Barrier* b = (const Barrier*)n.address;
      report_add(": at %s, where %u have arrived", barrier_name(n.expected), b->arrived);
    } else if (f->park == Park::kWarp) {
      report_add(": at a warp collective, where lanes %08x have arrived", f->warp->arrived);
    } else if (f->park == Park::kIdle) {
      report_add(": paused between two looks at the mailbox");
    } else {
      report_add(": in %s of layer %u, waits for %s", name_of(n.phase), n.layer, name_of(n.kind));
      const size_t offset = (const char*)n.address - f->block->shared;
      if (f->park == Park::kMbar) report_add(": mbarrier at shared + %zu, parity %u", offset, n.expected);
      else report_add(" of rank %u at %p: expected epoch %u, seen %u", n.source, n.address, n.expected, n.seen);
      if (n.idle) report_add(" (idle wait)");
    }
  }
}

void misuse(const char* format, ...) {
  where(machine.current);
  report_add(": ");
  va_list args;
  va_start(args, format);
  add(format, args);
  va_end(args);
  report_add(" (seed %llu, dispatch %llu)", machine.config.seed, machine.steps);
  fail_launch(kMisuse);
  __builtin_trap();
}

}  // namespace sim
}  // namespace imex
