// The device's end of the mailbox's two rings, in host memory that rank 0's GPU maps: descriptors come in, records go out. A load from
// there takes more than a microsecond; a store costs nothing, as long as nobody waits until it has arrived.
#pragma once
#include "faults.cuh"

namespace imex {

constexpr int kLineWords = sizeof(Descriptor) / 4;
constexpr int kLanePart = (kLineWords + LANES - 1) / LANES;  // words of a line that a lane holds: lane, lane + LANES, …

// Records that steps already published may still write; a token may have its own and kMaxLogprobs other log-probabilities.
constexpr u32 kRecordMargin = 4 * kMaxRows * (2 + kMaxLogprobs) + 2 * kMaxSlots;
static_assert(2 * kRecordMargin <= kRecordSlots, "raise RECORD_SLOTS in abi.py");

struct Rings {
  Mailbox* host;
  int lane;
  u32 next_sequence;  // of descriptors
  u32 next_record;    // of records; lane 0's
  u32 records_read;   // as last read from the host; lane 0's
  u32 num_polls;      // since somebody set it to 0
};

DEV u32* arena_of(const Rings& rings) { return (u32*)(rings.host + 1); }

// One record, by lane 0: eight words that each carry the record's number, so none of them needs an order. The host takes it when all eight
// do. What else it must not see too early is none of the record's business: release_if_over fences, and log-probabilities are records.
DEV void write_record(Rings& rings, Record kind, u32 request, u32 token, u32 index, Finish finish) {
  const u32 sequence = rings.next_record++;
  TokenRecord* r = &rings.host->records[(sequence - 1) % kRecordSlots];
  const u64 now = timer_ns();
  store_words((u64*)&r->kind, (u32)kind, request, sequence);
  store_words((u64*)&r->token, token, index, sequence);
  store_words((u64*)&r->finish, (u32)finish, 0, sequence);
  store_words((u64*)&r->time_low, (u32)now, (u32)(now >> 32), sequence);
}
// Room for what published steps may still write, and for one more step; lane 0's. The host's counter is read only when it matters.
DEV bool has_room(Rings& rings) {
  auto room = [&] { return kRecordSlots - (rings.next_record - 1 - rings.records_read) >= kRecordMargin; };
  if (!room()) rings.records_read = load_relaxed_sys(&rings.host->header.records_read);
  return room();
}

// As in abi.py: one-to-one in every word, so that a line in which one word is old does not fit. All lanes; each brings its words.
DEV bool check_fits(const u32 (&words)[kLanePart], int lane) {
  u32 sum = 0;
  UNROLL for (int j = 0; j < kLanePart; j++) {
    const int i = lane + j * LANES;
    u32 mixed = (words[j] ^ (i + 1) * kDescriptorMagic) * kDescriptorFactor;
    mixed = (mixed ^ mixed >> 15) * kDescriptorFactor;
    if (i < kLineWords - 1) sum += mixed;
  }
  return warp_sum(sum) == shuffle(words[(kLineWords - 1) / LANES], (kLineWords - 1) % LANES);
}
// Looks for the next descriptor, whose line then is in `line`, in shared memory; all lanes. The poll is the read: one 64-byte line by one
// warp-wide load, taken if sequence and check match; a line half-written is simply not taken yet. One poll is under way at a time: several
// would share a scoreboard, and whoever looks at the oldest would wait for the youngest (docs/performance.md).
DEV bool poll_descriptor(Rings& rings, u32* line) {
  const u32* from = (const u32*)&rings.host->descriptors[(rings.next_sequence - 1) % kDescriptorSlots];
  u32 words[kLanePart];
  UNROLL for (int j = 0; j < kLanePart; j++)
    words[j] = rings.lane + j * LANES < kLineWords ? load_relaxed_sys(from + rings.lane + j * LANES) : 0;
  rings.num_polls++;
  if (shuffle(words[0], 0) != rings.next_sequence || !check_fits(words, rings.lane)) return false;
  if (!shuffle(rings.lane == 0 && has_room(rings), 0)) return false;
  UNROLL for (int j = 0; j < kLanePart; j++)
    if (rings.lane + j * LANES < kLineWords) line[rings.lane + j * LANES] = words[j];
  rings.next_sequence++;
  warp_sync();
  return true;
}

}  // namespace imex
