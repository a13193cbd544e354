// What the benchmark kernels share: they run the kernel's own code in loops and time it by the GPU's timer, so that no launch and no
// host is in the figure. Like decode.cu they are one cooperative launch of (ranks here) x Shape.num_blocks blocks, and their waits
// for other blocks and ranks have its deadline.
#pragma once
#include "../faults.cuh"

namespace imex {

DEV const ProbeJob& job_of(const Block& b) { return *(const ProbeJob*)b.params->tap; }

// When the block's first consumer began (0) and ended (1) what is timed.
DEV void note_time(const Block& b, int which) {
  if (b.thread == 0) ((u64*)job_of(b).times)[2 * b.index + which] = timer_ns();
}

// Runs `once(epoch)` warmup + iterations times, each with an epoch of its own, and times the latter; it returns false when the block must leave.
template <class Once>
DEV void time_loop(const Block& b, Once once) {
  const u32 warmup = job_of(b).warmup, end = warmup + job_of(b).iterations;
  for (u32 i = 0; i < end; i++) {
    if (i == warmup) note_time(b, 0);
    if (!once(job_of(b).epoch + 1 + i)) return;
  }
  note_time(b, 1);
}

}  // namespace imex
