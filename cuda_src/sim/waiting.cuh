// Waits for words and for the host on a CPU: the fiber parks with its condition. Part of primitives.cuh, which includes it.
#pragma once

namespace imex {

// Called when the deadline has passed or the rank was aborted; true when the wait must end without what it waited for.
DEV bool give_up(const RankParams* params, Phase phase, u32 layer, Wait kind, bool idle, u32 source, u32 expected, u32 seen,
                 u64 began_ns);
DEV u64 timer_ns() { return sim::now_ns(); }
DEV u32 clock_low() { return (u32)timer_ns(); }  // a clock of 1 GHz
DEV void stand_still(u32 ns) { sim::stand_still(ns); }

// One stay in the parking lot; true when give_up has ended the wait.
DEV_CALL bool park_once(Waiter& w, sim::Park how, sim::WaitNote& note) {
  note.phase = w.phase, note.layer = w.layer;
  if (!note.began_ns) {
    note.began_ns = timer_ns();
    note.deadline_ns = note.idle ? ~0ull : note.began_ns + w.params->deadline_us * 1000ull;
  }
  if (!sim::park_wait(how, note)) return false;
  w.failed = give_up(w.params, w.phase, w.layer, note.kind, note.idle, note.source, note.expected, note.seen, note.began_ns);
  if (w.failed) return true;
  if (!note.idle) note.deadline_ns = timer_ns() + 1'000'000;  // it knows better: do not ask again at once
  return false;
}

// The wait for words whose first missing one missing() names, and describes in `note`; its loads are a poll.
template <class Missing>
DEV void park_until(Waiter& w, sim::WaitNote& note, Missing missing) {
  sim::point();
  const u32 began = shape().trace ? clock_low() : 0;
  bool late = false;
  while ((note.address = missing()) && !w.failed) {
    late = true;
    if (park_once(w, sim::Park::kWord, note)) break;
  }
  if (late && shape().trace) w.word_clocks += clock_low() - began;
}

DEV bool warp_any(bool v);
template <int N, bool kTogether = false, class Address, class Source, class Payload>
DEV void wait_words(Waiter& w, Wait kind, bool idle, u32 epoch, int count, Address address, Source source,
                    Payload (&out)[N][2]) {
  constexpr int kPayloadBits = kBitsOfPayload<Payload>;
  u64 word[N][2];
  sim::WaitNote note{};
  note.kind = kind, note.idle = idle, note.expected = epoch & ~(u32)0 >> (kPayloadBits - 32), note.payload_bits = kPayloadBits;
  auto missing = [&]() -> const u64* {  // the first word that is not there yet
    const u64* first = nullptr;
    for (int i = 0; i < count; i++) {
      load_words(address(i), word[i][0], word[i][1]);
      for (int j = 0; j < 2 && !first; j++)
        if ((u32)(word[i][j] >> kPayloadBits) != note.expected)
          first = address(i) + j, note.source = source(i), note.seen = (u32)(word[i][j] >> kPayloadBits);
    }
    return first;
  };
  park_until(w, note, missing);
  if (kTogether) w.failed = warp_any(w.failed);  // as on a GPU: who calls it is the whole warp
  if (sim::kTsan)
    for (int i = 0; i < 2 * count; i++) sim::tsan_word_awaited(address(i / 2) + i % 2);
  for (int i = 0; i < N; i++)
    for (int j = 0; j < 2; j++) out[i][j] = i < count ? (Payload)(word[i][j] & ((u64)1 << kPayloadBits) - 1) : 0;
}
template <int N, class Address>
DEV void wait_bare_words(Waiter& w, u32 epoch, int count, Address address, u32 source, u32 (&out)[N][4]) {
  sim::WaitNote note{};
  note.kind = Wait::kWords, note.expected = epoch, note.source = source;
  auto missing = [&]() -> const u32* {  // the first word that is not there yet
    const u32* first = nullptr;
    for (int i = 0; i < count; i++) {
      load_bare_words(address(i), out[i]);
      for (int j = 0; j < 4 && !first; j++)
        if (!out[i][j]) first = address(i) + j;
    }
    return first;
  };
  park_until(w, note, missing);
  w.failed = warp_any(w.failed);
  if (sim::kTsan)
    for (int i = 0; i < 4 * count; i++) sim::tsan_word_awaited(address(i / 4) + i % 4);
}
DEV u32 wait_word_clock(Waiter& w, u32 epoch, const u64* p, u32 source, u32& payload) {
  u32 words[1][2];
  wait_words<1>(w, Wait::kWords, false, epoch, 1, [&](int) { return p; }, [&](int) { return source; }, words);
  payload = words[0][0];
  return clock_low();
}
constexpr u32 kPollsPerCheck = 8;  // the mailbox looks at the abort and stop words this seldom
constexpr int kTestsPerPoll = 1;
DEV void mailbox_pause() { sim::pause_idle(); }

}  // namespace imex
