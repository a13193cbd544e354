// What the kernel needs of a machine. Two bodies of the same functions: cuda/primitives.cuh holds all PTX of this project,
// sim/primitives.cuh runs the same kernel on a CPU. Nothing outside them knows which machine it is on.
//
// A lane loop strides by LANES: 32 on CUDA and in the exact simulator, 1 in the fast one, where it becomes a loop over a whole vector.
#pragma once

#include "abi.cuh"

namespace imex {
constexpr float kMinusInfinity = -1e30f;  // of masked scores: finite, so that differences of two stay numbers
template <class Payload>
constexpr int kBitsOfPayload = sizeof(Payload) == 4 ? 32 : 48;  // of a tagged word; of a wide one (words.cuh)

// What a wait needs to give up: whose abort word to look at, how long to be patient, whom to name. See faults.cuh.
struct Waiter {
  const RankParams* params;
  unsigned int layer;
  Phase phase;
  bool failed;  // a wait of this thread gave up; every later wait returns at once, and the block leaves at its next vote
  unsigned int word_clocks;  // trace.cuh: waited for words that were not there at the first poll
};
}  // namespace imex

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#include "cuda/primitives.cuh"
#else
#include "sim/primitives.cuh"
#endif
