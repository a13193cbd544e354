// The hardware's floors, with the primitives that the decode kernel uses: what no version of it can be faster than.
#include "bench.cuh"
#include "../words.cuh"

namespace imex {

// Device memory through a ring like the decode kernel's (stream.cuh), and nobody looks at it: the read ceiling. Tiles are dealt in turn,
// and nothing is waited for but copies, at most `window` of them in flight.
DEV u32 num_tiles(const Block& b) {  // of this block, in all passes
  const u32 tiles = (u32)(job_of(b).bytes / kStageBytes);
  return job_of(b).iterations * (u32)divide_up(tiles - smaller(b.index, tiles), shape().num_blocks);
}
DEV Pending tile_here(const Block& b, u32 n) { return {&b.shared->full[n % shape().ring_stages], n / shape().ring_stages & 1}; }
DEV Pending stage_free(const Block& b, u32 n) {
  return {&b.shared->empty[n % shape().ring_stages], (n / shape().ring_stages & 1) ^ 1};
}
DEV void produce_tiles(Block& b) {
  const u32 window = shape().window, count = num_tiles(b), each = count / job_of(b).iterations;
  u32 n = 0;
  for (; n < count; n++) {
    if (!mbar_wait(b.waiter, Wait::kStage, true, stage_free(b, n))) break;
    if (n >= window && !mbar_wait(b.waiter, Wait::kTile, true, tile_here(b, n - window))) break;
    const u64 tile = b.index + (u64)(n % each) * shape().num_blocks;
    u64* full = tile_here(b, n).bar;
    mbar_arrive_expect(full, kStageBytes);
    bulk_copy(ring_stage(b, n % shape().ring_stages), (const char*)job_of(b).data + tile * kStageBytes, kStageBytes, full);
  }
  for (u32 m = n > window ? n - window : 0; m < n; m++) mbar_drain(tile_here(b, m));
}
DEV void read_tiles(Block& b) {
  const u32 count = num_tiles(b);
  note_time(b, 0);
  for (u32 n = 0; n < count; n++) {
    if (!mbar_wait(b.waiter, Wait::kTile, true, tile_here(b, n))) return;
    warp_arrive(b, &b.shared->empty[n % shape().ring_stages]);
  }
  note_time(b, 1);
}

// What a phase's gather costs when everything is there already: every block reads all words, as pairs in flight eight at a time.
DEV void gather_words(Block& b) {
  const u64* words = (const u64*)job_of(b).data;
  const int pairs = (int)(job_of(b).bytes / 16), mine = divide_up(pairs, kConsumerThreads);
  u32 sum = 0;
  time_loop(b, [&](u32) {
    gather(
        b, 1, mine, [&](int i) { return words + 2 * smaller(b.thread + i * kConsumerThreads, pairs - 1); },
        [&](int) { return b.params->rank; }, [&](int, u32 first, u32 second) { sum += first + second; });
    return all_well(b);
  });
  if (b.thread == 0) ((u32*)job_of(b).result)[b.index] = sum;
}

// A barrier of the grid made of words. Two sets by parity: a block stores for barrier e + 2 after it passed e + 1, for which it had a
// word of every block, and each stored that after it had read all words of e.
DEV void pass_barriers(Block& b) {
  const int blocks = shape().num_blocks, pairs = divide_up(blocks, 2);
  time_loop(b, [&](u32 epoch) {
    const u32 at = (epoch & 1) * 2 * pairs;
    if (b.thread == 0) {
      store_word(own_words(b, at + b.index), epoch, epoch);
      if (b.index == blocks - 1 && blocks % 2)
        store_word(own_words(b, at + blocks), epoch, epoch);  // its pair has no other half
    }
    gather<1>(
        b, epoch, divide_up(pairs, kConsumerThreads),
        [&](int i) { return own_words(b, at + 2 * smaller(b.thread + i * kConsumerThreads, pairs - 1)); },
        [&](int) { return b.params->rank; }, [](int, u32, u32) {});
    return all_well(b);
  });
}

// One thread answers what comes with what goes out: the host's line, or another rank's word in the own memory.
DEV void answer(Block& b, const u64* from, u64* to, u32 source, bool first) {
  time_loop(b, [&](u32 epoch) {
    u32 words[1][2];
    if (first) store_words(to, epoch, epoch, epoch);
    wait_words<1>(b.waiter, Wait::kWords, false, epoch, 1, [&](int) { return from; }, [&](int) { return source; }, words);
    if (!first) store_words(to, epoch, epoch, epoch);
    return !b.waiter.failed;
  });
}
DEV void echo(Block& b) {
  u64* host = (u64*)job_of(b).host;
  answer(b, host, host + 16, b.params->rank, false);
}
DEV void ping(Block& b) {
  const u32 rank = b.params->rank, partner = job_of(b).partner;
  if (partner != rank) answer(b, own_words(b, 0), words_of(b, partner, 0), partner, rank < partner);
}

DEV void measure(Block& b) {
  switch ((Probe)job_of(b).probe) {
    case Probe::kRead: read_tiles(b); break;
    case Probe::kGather: gather_words(b); break;
    case Probe::kBarrier: pass_barriers(b); break;
    default:
      if (b.thread || b.index) return;
      job_of(b).probe == (u32)Probe::kEcho ? echo(b) : ping(b);
  }
}

}  // namespace imex

KERNEL decode(const GRID_CONSTANT imex::LaunchParams launch) {
  using namespace imex;
  Block b = this_block(launch);
  if (b.thread == 0) {
    b.shared->fault.set = 0;
    for (u32 i = 0; i < shape().ring_stages; i++) {
      mbar_init(&b.shared->full[i], 1);
      mbar_init(&b.shared->empty[i], kConsumerWarps * kWarpArrivals);
    }
    mbar_init_done();
  }
  block_sync();
  if (b.warp < kConsumerWarps) {
    measure(b);
    report_fault(b);
  } else if (b.warp == kConsumerWarps + kAdderWarps && b.lane == 0 && job_of(b).probe == (u32)Probe::kRead) {
    produce_tiles(b);
  }
}
