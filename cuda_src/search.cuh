// The search for what min_p, top_k and top_p leave of a row: the threshold is a key (a logit's order as an integer), and every block of
// every rank finds the same one, exactly.
//
// First all blocks exchange their largest and smallest key. Then, in rounds, each publishes for 16 keys, the pivots, how many of its
// tokens are above and how much they weigh; all add up the same numbers and keep the interval in which the threshold is, a 16th of
// the one before. Weights are integers, floor(2^30 e^(x - largest)), so sums do not depend on an order. The first round of a stage has
// its pivots evenly between values, the others between keys, so at most 9 rounds a stage; it ends earlier when no token is left to
// decide about, mostly after three or four.
//
//   top_k  keeps the k largest, and what equals the last of them
//   top_p  of what top_k leaves, the largest until their mass reaches top_p of it, and what equals the last of them
//   min_p  before both: what is at least min_p times as probable as the largest
//
// Words: [2, world_size, num_blocks, max_rows, SEARCH_PIVOTS] pairs, a buffer for each parity of a count of rounds, which gives
// them their epochs (an epoch space of its own) and begins again where words are zeroed (renew.cuh). Two are enough: a block writes round
// n + 2 after it has gathered round n + 1 of every block, and each sends that after its consumers left the gather of round n, with a barrier
// in between. All blocks run the same rounds, as they decide from the same words.
#pragma once
#include "sampling.cuh"

namespace imex {

constexpr u32 kDecided = 0, kTopK = 1, kTopP = 2;  // Search.stage
constexpr u32 kMaxRounds = 1 + 2 * 9;
static_assert(kMaxRounds <= kSearchRounds, "raise SEARCH_ROUNDS in abi.py: epochs are renewed in time for so many a step");
constexpr u32 kCountBits =
    17;  // of a pair's 64 bits; the planner keeps a block's tokens below 2^17, so their mass is below 2^47
constexpr float kUnitMass = 1073741824.f;

DEV u64* search_words(const Block& b, u32 to, u32 source, int row, int pivot) {
  const u32 sources = shape().world_size * shape().num_blocks, parity = b.shared->num_rounds & 1;
  return words_of(b, to,
                  shape().off_search + (((parity * sources + source) * shape().max_rows + row) * kSearchPivots + pivot) * 2);
}
DEV u32 search_epoch(const Block& b) { return b.shared->num_rounds + 1; }
DEV u32 own_source(const Block& b) { return b.params->rank * shape().num_blocks + b.index; }
DEV void publish_search(const Block& b, int row, int pivot, u32 first, u32 second) {
  ROLLED for (u32 r = 0; r < shape().world_size; r++)
    store_words(search_words(b, r, own_source(b), row, pivot), first, second, search_epoch(b));
}

// Pivots of the row's next round: lo itself, and 15 more up to hi.
DEV void set_pivots(DrawRow& r) {
  const Search& s = r.search;
  const float from = key_float(s.lo), span = key_float(s.hi) - from;
  const u64 stride = divide_up(s.hi - s.lo, kSearchPivots);
  ROLLED for (int j = 0; j < kSearchPivots; j++) {
    u64 key = s.begun ? s.lo + j * stride : order_key(from + span * ((float)j / kSearchPivots));
    key = key < s.lo || j == 0 ? s.lo : key;
    r.pivots[j] = key > s.hi ? s.hi : (u32)key;
  }
}
DEV void begin_stage(DrawRow& r, u32 stage, u64 target) {
  Search& s = r.search;
  s.stage = stage;
  s.begun = 0;
  s.hi = s.largest;
  s.above_hi = 0;
  s.target = target;
  if (stage != kDecided) set_pivots(r);
}
// From the largest and smallest key of all blocks.
DEV void begin_search(DrawRow& r, u32 largest, u32 smallest) {
  const Sampling& p = r.sampling;
  Search& s = r.search;
  s.largest = largest;
  s.lo = largest ? smallest - 1 : kNeverKey;
  if (p.min_p && largest) {
    const u32 least = order_key(key_float(largest) + p.log_min_p);
    s.lo = larger(s.lo, smaller(least, largest) - 1);
  }
  begin_stage(r, !largest ? kDecided : p.top_k ? kTopK : p.top_p ? kTopP : kDecided, 0);
}
DEV u64 share_of(u64 mass, u32 p) {  // ceil(mass * p / 2^32), at least 1
  const u64 low = ((mass & 0xffffffffu) * p + 0xffffffffu) >> 32, share = (mass >> 32) * p + low;
  return share ? share : 1;
}
// After a round: the part of the interval that has the threshold.
DEV void narrow(DrawRow& r) {
  const Sampling& p = r.sampling;
  Search& s = r.search;
  if (s.stage == kTopP && !s.target) s.target = share_of(r.masses[0], p.top_p);
  int j = kSearchPivots - 1;
  const bool all = s.stage == kTopK && r.counts[0] <= p.top_k;
  ROLLED while (j && (all || (s.stage == kTopK ? r.counts[j] < p.top_k : r.masses[j] < s.target))) j--;
  s.lo = r.pivots[j];
  if (j + 1 < kSearchPivots) s.hi = r.pivots[j + 1], s.above_hi = r.counts[j + 1];
  s.begun = 1;
  const bool found = s.stage == kTopK ? r.counts[j] <= p.top_k : r.counts[j] - s.above_hi <= 1;
  if (!found && s.hi - s.lo > 1) return set_pivots(r);
  const bool next = s.stage == kTopK && p.top_p;
  begin_stage(r, next ? kTopP : kDecided, next ? share_of(r.masses[j], p.top_p) : 0);
}

// The list of rows that are still searched, and the count of rounds. Between barriers.
DEV void end_round(Block& b) {
  Shared& s = *b.shared;
  consumer_sync();
  if (b.thread == 0) {
    u32 searching = 0;
    ROLLED for (u32 d = 0; d < s.num_drawn; d++)
      if (draw_row(b, s.drawn[d]).search.stage != kDecided) s.searching[searching++] = s.drawn[d];
    s.num_searching = searching;
    s.num_rounds++;
  }
  consumer_sync();
}

// All blocks' largest and smallest key of every drawn row. The warps' own are in part_counts[warp][0], inverted the smallest in [1].
DEV bool exchange_extremes(Block& b) {
  const Shared& s = *b.shared;
  auto fold = [&](const DrawRow& r, int which) {
    u32 all = 0;
    ROLLED for (int w = 0; w < kConsumerWarps; w++) all = larger(all, r.part_counts[w][which]);
    return all;
  };
  ROLLED for (u32 d = b.thread; d < s.num_drawn; d += kConsumerThreads) {
    const DrawRow& r = draw_row(b, s.drawn[d]);
    publish_search(b, s.drawn[d], 0, fold(r, 0), fold(r, 1));
  }
  consumer_sync();  // the parts are read: others take their place
  const int sources = shape().world_size * shape().num_blocks, per = divide_up(sources, kConsumerThreads);
  auto source_of = [&](int i) { return smaller(b.thread + i % per * kConsumerThreads, sources - 1); };
  u32 largest = 0, smallest = 0;
  gather<2>(
      b, search_epoch(b), s.num_drawn * per,
      [&](int i) { return search_words(b, b.params->rank, source_of(i), s.drawn[i / per], 0); },
      [&](int i) { return source_of(i) / shape().num_blocks; },
      [&](int i, u32 first, u32 second) {
        largest = larger(i % per ? largest : 0, first);
        smallest = larger(i % per ? smallest : 0, second);
        if (i % per < per - 1) return;
        const u32 of_warp[2] = {(u32)warp_max((u64)largest), (u32)warp_max((u64)smallest)};
        DrawRow& r = draw_row(b, s.drawn[i / per]);
        if (b.lane == 0) r.part_counts[b.warp][0] = of_warp[0], r.part_counts[b.warp][1] = of_warp[1];
      });
  if (!all_well(b)) return false;
  ROLLED for (u32 d = b.thread; d < s.num_drawn; d += kConsumerThreads) {
    DrawRow& r = draw_row(b, s.drawn[d]);
    begin_search(r, fold(r, 0), ~fold(r, 1));
  }
  end_round(b);
  return true;
}

// What is above each pivot among the block's own tokens, in part_masses: mass << kCountBits | count.
DEV void count_above(Block& b, int row) {
  DrawRow& r = draw_row(b, row);
  const float largest = key_float(r.search.largest);
  u32 pivots[kSearchPivots];
  u64 sums[kSearchPivots];
  UNROLL for (int j = 0; j < kSearchPivots; j++) pivots[j] = r.pivots[j], sums[j] = 0;
  each_quad(b, row, [&](int, u32, const float(&values)[4]) {
    UNROLL for (int i = 0; i < 4; i++) {
      const u32 key = order_key(values[i]);
      if (key <= pivots[0]) continue;
      const float mass = fast_exp(values[i] - largest) * kUnitMass;
      const u64 sum = (u64)(mass > 0.f ? (u32)mass : 0) << kCountBits | 1;
      UNROLL for (int j = 0; j < kSearchPivots; j++) sums[j] += key > pivots[j] ? sum : 0;
    }
  });
  UNROLL for (int j = 0; j < kSearchPivots; j++) {
    const u64 of_warp = warp_sum(sums[j]);
    if (b.lane == 0) r.part_masses[b.warp][j] = of_warp;
  }
}

// Adds up what all blocks have published of a round. Where a warp has more lanes than there are pivots, they share the sources.
DEV bool add_up(Block& b) {
  const Shared& s = *b.shared;
  constexpr int kKinds = LANES < kSearchPivots ? kSearchPivots / LANES : 1;   // pivots of a lane
  constexpr int kAtOnce = LANES > kSearchPivots ? LANES / kSearchPivots : 1;  // sources of a warp
  const int sources = shape().world_size * shape().num_blocks;
  const int passes = divide_up(sources, kConsumerWarps * kAtOnce), per = passes * kKinds;
  auto pivot_of = [&](int i) { return (b.lane + i % kKinds * LANES) % kSearchPivots; };
  auto source_of = [&](int i) { return (i % per / kKinds * kConsumerWarps + b.warp) * kAtOnce + b.lane / kSearchPivots; };
  u32 counts[kKinds] = {};
  u64 masses[kKinds] = {};
  gather(
      b, search_epoch(b), s.num_searching * per,
      [&](int i) {
        const int source = smaller(source_of(i), sources - 1);
        return search_words(b, b.params->rank, source, s.searching[i / per], pivot_of(i));
      },
      [&](int i) { return smaller(source_of(i), sources - 1) / shape().num_blocks; },
      [&](int i, u32 first, u32 second) {
        const int kind = kKinds == 1 ? 0 : i % kKinds, pass = i % per / kKinds;
        const u64 both = source_of(i) < sources ? (u64)second << 32 | first : 0;
        counts[kind] = (pass ? counts[kind] : 0) + ((u32)both & ((1u << kCountBits) - 1));
        masses[kind] = (pass ? masses[kind] : 0) + (both >> kCountBits);
        if (pass < passes - 1) return;
        u32 count = counts[kind];
        u64 mass = masses[kind];
        for (int o = kSearchPivots; o < LANES; o *= 2) {
          count += shuffle(count, b.lane ^ o);
          mass += (u64)shuffle((u32)(mass >> 32), b.lane ^ o) << 32 | shuffle((u32)mass, b.lane ^ o);
        }
        DrawRow& r = draw_row(b, s.searching[i / per]);
        if (b.lane >= kSearchPivots) return;
        r.part_counts[b.warp][pivot_of(i)] = count;
        r.part_masses[b.warp][pivot_of(i)] = mass;
      });
  return all_well(b);
}

// Finds the threshold of every drawn row: Search.lo. All consumers; false when the block must leave.
DEV bool search(Block& b) {
  const Shared& s = *b.shared;
  if (!exchange_extremes(b)) return false;
  ROLLED while (s.num_searching) {
    ROLLED for (u32 d = 0; d < s.num_searching; d++) count_above(b, s.searching[d]);
    consumer_sync();
    auto row_of = [&](int i) { return (int)s.searching[i / kSearchPivots]; };
    const int items = s.num_searching * kSearchPivots;
    ROLLED for (int i = b.thread; i < items; i += kConsumerThreads) {
      const DrawRow& r = draw_row(b, row_of(i));
      u64 sum = 0;
      ROLLED for (int w = 0; w < kConsumerWarps; w++) sum += r.part_masses[w][i % kSearchPivots];
      publish_search(b, row_of(i), i % kSearchPivots, (u32)sum, (u32)(sum >> 32));
    }
    consumer_sync();  // the parts are read: others take their place
    if (!add_up(b)) return false;
    ROLLED for (int i = b.thread; i < items; i += kConsumerThreads) {
      DrawRow& r = draw_row(b, row_of(i));
      const int j = i % kSearchPivots;
      u32 count = 0;
      u64 mass = 0;
      ROLLED for (int w = 0; w < kConsumerWarps; w++) count += r.part_counts[w][j], mass += r.part_masses[w][j];
      r.counts[j] = count;
      r.masses[j] = mass;
    }
    consumer_sync();
    ROLLED for (u32 d = b.thread; d < s.num_searching; d += kConsumerThreads) narrow(draw_row(b, s.searching[d]));
    end_round(b);
  }
  return true;
}

}  // namespace imex
