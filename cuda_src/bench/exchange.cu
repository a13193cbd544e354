// The exchange alone: the code of exchange.cuh in a loop, o_proj's buffers and down_proj's in turn as in a layer, so that condition C
// (exchange.cuh) holds as it does there. Where bare words are used all blocks meet after num_layers times, as a step ends; that and
// clearing are in the time. Each time ends when every block of every rank has the whole sum, as bf16 activations.
#include "bench.cuh"
#include "../all_gather.cuh"
#include "../exchange.cuh"
#include "../renew.cuh"

namespace imex {

// What a source adds to output n of a row: small whole numbers, others each time, whose sums are exact in any order and in bf16, so that
// every bit can be checked, and cheap to make, since that is timed too; or fractions, to see what rounding costs. imex_persist/bench/sums.py has the same.
constexpr u32 kTurns = 17;  // after so many a source begins again
DEV u32 mixed(u32 a, u32 b) {
  u32 h = a * 0x9e3779b1u + b * 0x85ebca77u + 0x165667b1u;
  h = (h ^ h >> 15) * 0x2c1b3c6du;
  return h ^ h >> 12;
}
DEV float part_of(const Block& b, u32 source, int row, int n, u32 turn) {
  const u32 at = row * shape().hidden_size + n;
  if (job_of(b).fractions) return (float)(int)mixed(source, at) * 0x1p-31f;
  return (float)(int)((((at + source * 0x85ebca77u) * 0x9e3779b1u >> 24) + turn) % kTurns) - 8.f;
}

// What is sent depends on what was received, so no exchange begins before its block has ended the last one.
constexpr u32 kNever = 0x7fc17fc1;  // a pair that no sum is

DEV int slice_width(const Block& b) {  // values of a row that are this block's residual
  return replicated(num_rows(b)) ? (int)shape().hidden_size : 2 * owned_pairs();
}

// Time number `time`, from 1 on, is a use of the sets of bare words, so a layer of a step.
DEV void begin_time(Block& b, u32 time) {
  b.step = (time - 1) / shape().num_layers;
  b.waiter.layer = (time - 1) % shape().num_layers;
}
DEV bool end_time(Block& b) {
  clear_set(b);
  return b.waiter.layer + 1 < shape().num_layers || !meet(b.waiter, b.index, b.thread, shape().off_renew, b.step + 1);
}

// A block's units, a warp each.
DEV void send_parts(Block& b, Exchange x, u32 time) {
  const u32 slice = b.index % x.slices, source = b.params->rank * x.slices + slice, turn = time % kTurns;
  const int units = shape().hidden_size / kUnitRows, step = divide_up(shape().num_blocks - slice, x.slices);
  for (int unit = b.index / x.slices + b.warp * step; unit < units; unit += kConsumerWarps * step) {
    auto sum = [&](int row, int pair) {
      const int n = unit * kUnitRows + 2 * pair;
      const u32 before = *(const u32*)(activations(b) + activation_offset(row, n));
      const float late = before == kNever ? 1.f : 0.f;
      return float2{part_of(b, source, row, n, turn) + late, part_of(b, source, row, n + 1, turn)};
    };
    send_unit(b, x, num_rows(b), slice, unit, layer_epoch(b.step, b.waiter.layer), sum);
  }
}
DEV bool reduce(Block& b, Exchange x, u32 time) {
  send_parts(b, x, time);
  return receive(b, x, b.waiter.layer, false, !replicated(num_rows(b)), [] {});
}
// Each by code of its own, as in decode.cu: sizes of an exchange that is chosen at run time would be no constants, and every word's place a
// division of 40 instructions.
DEV bool reduce_all(Block& b, u32 time) {
  begin_time(b, time);
  const bool well = time & 1 ? reduce(b, o_exchange(), time) : reduce(b, down_exchange(), time);
  return well && (replicated(num_rows(b)) || end_time(b));
}

DEV bool gather_all(Block& b, u32 time) {
  begin_time(b, time);
  const int total = num_rows(b) * shape().hidden_size / 2, world = shape().world_size, rank = b.params->rank;
  const int begin = total * rank / world,
            mine = total * (rank + 1) / world - begin;  // at least one for each block: exchange_shape
  const int last = begin + mine * (b.index + 1) / (int)shape().num_blocks;
  for (int i = begin + mine * b.index / (int)shape().num_blocks + b.thread; i < last; i += kConsumerThreads) {
    const int at = 2 * i, width = shape().hidden_size;
    const u32 before = *(const u32*)(activations(b) + activation_offset(at / width, at % width));
    share_pair(b, at / width, i % (width / 2), mixed(i, before == kNever ? 0 : time));
  }
  return take_all_pairs(b) && end_time(b);
}

// Every block leaves a number that any wrong bit of its activations changes; owners leave their residual.
DEV void leave_results(Block& b) {
  const int rows = num_rows(b), hidden = shape().hidden_size;
  u32* checks = (u32*)job_of(b).result;
  u32 check = 0;
  for (int i = b.thread; i < rows * hidden / 2; i += kConsumerThreads) {
    const int row = 2 * i / hidden, n = 2 * i % hidden;
    const u32 pair = *(const u32*)(activations(b) + activation_offset(row, n));
    check += (pair == kTwoZeros ? 0 : pair) * (2 * i + 1);  // ONE_SHOT does not send them
  }
  atomic_add_gpu(checks + b.index, check);
  float* sums = (float*)(checks + shape().num_blocks);  // [rows, hidden]
  const bool whole = replicated(rows);
  if (whole && b.index) return;
  const int mine = slice_width(b), begin = whole ? 0 : owner_index(b) * mine;
  for (int i = b.thread; i < rows * mine; i += kConsumerThreads)
    if (begin + i % mine < hidden) sums[i / mine * hidden + begin + i % mine] = residual(b)[i];
}

DEV void measure(Block& b) {
  const int rows = num_rows(b), width = slice_width(b);
  for (int i = b.thread; i < rows * width; i += kConsumerThreads) residual(b)[i] = 0.f;
  for (int i = b.thread; i < rows * (int)shape().hidden_size / 2; i += kConsumerThreads) ((u32*)activations(b))[i] = 0;
  consumer_sync();
  if (job_of(b).probe == (u32)Probe::kAllGather) time_loop(b, [&](u32 time) { return gather_all(b, time); });
  else time_loop(b, [&](u32 time) { return reduce_all(b, time); });
  if (b.waiter.failed) return;
  leave_results(b);
  // All sets are left clear, the last too: the next launch may have other rows.
  if (meet(b.waiter, b.index, b.thread, shape().off_renew + shape().world_size * shape().num_blocks * 2,
           b.step * shape().num_layers + b.waiter.layer + 1))
    return;
  b.waiter.layer++;
  clear_set(b);
}

}  // namespace imex

KERNEL decode(const GRID_CONSTANT imex::LaunchParams launch) {
  using namespace imex;
  Block b = this_block(launch);
  if (b.thread == 0) {
    b.shared->fault.set = 0;
    b.shared->num_rows = b.shared->last_rows = job_of(b).rows;
  }
  block_sync();
  if (b.warp < kConsumerWarps) {
    measure(b);
    report_fault(b);
  }
}
