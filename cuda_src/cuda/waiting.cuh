// Waits for words on a GPU: they poll. Part of primitives.cuh, which includes it where its own primitives are there.
#pragma once

namespace imex {

// Called every so many failed polls, with when the wait began; true when the wait must end without what it waited for.
// `idle` waits (for the next plan, and for whoever waits for those who do) have no deadline: only the abort word ends them.
// With plain numbers, so that no Waiter needs an address and the fast path keeps everything in registers.
DEV bool give_up(const RankParams* params, Phase phase, u32 layer, Wait kind, bool idle, u32 source, u32 expected, u32 seen,
                 u64 began_ns);
DEV bool aborted(const RankParams* params);  // has anybody given up?
DEV void stand_still(u32 ns) {
  for (const u64 began = timer_ns(); timer_ns() - began < ns;) {}
}
constexpr u32 kPollsPerCheck = 256;  // the abort word and the clock are looked at this seldom, off the fast path

// The loop of all waits for words. ready() polls; missing(expected, seen) names the rank that owes a word that is still not there, what of it is
// expected and what is there instead. With kTogether, whole warps call it and all lanes leave at once: one that left alone would go on alone,
// and what follows be done once for each.
template <bool kTogether, class Ready, class Missing>
DEV void poll_until(Waiter& w, Wait kind, bool idle, Ready ready, Missing missing) {
  u64 began_ns = 0;
  u32 polls = 0, began = 0;
  for (;;) {
    const bool here = ready();
    if (kTogether ? warp_all(here) : here) break;
    if (kTogether) w.failed = warp_any(w.failed);
    if (w.failed) break;
    if (shape().trace && polls == 0) began = clock_low();  // a wait is timed only if its first poll fails
    if (++polls % kPollsPerCheck) continue;
    if (!began_ns) began_ns = timer_ns();
    u32 expected = 0, seen = 0;
    const u32 owes = missing(expected, seen);
    if (seen == expected) continue;  // they have come by now
    w.failed = give_up(w.params, w.phase, w.layer, kind, idle, owes, expected, seen, began_ns);
  }
  if (shape().trace && polls) w.word_clocks += clock_low() - began;
}
// Waits until the words at address(0) .. address(count - 1) and their right neighbours all carry `epoch`; payloads in `out`, of u32 for
// tagged words and of u64 for wide ones.
// All loads of a poll are in flight together. count <= N; source(i) names the rank that owes word i.
template <int N, bool kTogether = false, class Address, class Source, class Payload>
DEV void wait_words(Waiter& w, Wait kind, bool idle, u32 epoch, int count, Address address, Source source,
                    Payload (&out)[N][2]) {
  constexpr int kPayloadBits = kBitsOfPayload<Payload>, kShared = kPayloadBits - 32;  // of the word's high half, payload too
  const u32 tag = epoch << kShared;
  u64 word[N][2] = {};
  auto ready = [&] {  // all again each time: to remember which are there costs more than their loads (docs/performance.md)
  UNROLL for (int i = 0; i < N; i++)
      if (i < count) load_words(address(i), word[i][0], word[i][1]);
    u32 differs[2] = {0, 0};
    UNROLL for (int i = 0; i < N; i++) UNROLL for (int j = 0; j < 2; j++)
      if (i < count) differs[j] |= (u32)(word[i][j] >> 32) ^ tag;
    return (differs[0] | differs[1]) >> kShared == 0;
  };
  poll_until<kTogether>(w, kind, idle, ready, [&](u32& expected, u32& seen) {
    expected = tag >> kShared;
    u32 owes = source(0);
    seen = expected;
    ROLLED for (int i = 0; i < count && seen == expected; i++) {  // short: this stands inline in each wait, and code must be fetched
      u64 there[2];
      load_words(address(i), there[0], there[1]);
      owes = source(i), seen = (u32)(there[0] >> kPayloadBits);
      if (seen == expected) seen = (u32)(there[1] >> kPayloadBits);
    }
    return owes;
  });
  UNROLL for (int i = 0; i < N; i++) UNROLL for (int j = 0; j < 2; j++) out[i][j] = (Payload)(word[i][j] & ((u64)1 << kPayloadBits) - 1);
}
// Waits until none of the bare words at address(0) .. address(count - 1), four neighbours each, is zero; all lanes of a warp. count <= N;
// `source` owes them.
template <int N, class Address>
DEV void wait_bare_words(Waiter& w, u32 epoch, int count, Address address, u32 source, u32 (&out)[N][4]) {
  UNROLL for (int i = 0; i < N; i++) UNROLL for (int j = 0; j < 4; j++) out[i][j] = 0;
  auto ready = [&] {
    UNROLL for (int i = 0; i < N; i++)
      if (i < count) load_bare_words(address(i), out[i]);
    u32 least[2] = {~0u, ~0u};
    UNROLL for (int i = 0; i < N; i++) UNROLL for (int j = 0; j < 4; j++)
      if (i < count) least[j % 2] = min(least[j % 2], out[i][j]);
    return min(least[0], least[1]) != 0;
  };
  poll_until<true>(w, Wait::kWords, false, ready, [&](u32& expected, u32& seen) {
    expected = seen = epoch;
    ROLLED for (int i = 0; i < count && seen; i++) {
      u32 there[4];
      load_bare_words(address(i), there);
      UNROLL for (int j = 0; j < 4; j++) seen = there[j] ? seen : 0;
    }
    return source;
  });
}
// Waits for one word; returns the clock at which it was there, each lane its own though they poll together: the predicate waits for it.
DEV u32 wait_word_clock(Waiter& w, u32 epoch, const u64* p, u32 source, u32& payload) {
  u32 clock = 0;
  u64 word, unused, began_ns = 0;
  for (u32 polls = 1;; polls++) {
    load_words(p, word, unused);
    const u32 tag = (u32)(word >> 32);
    payload = (u32)word;
    clock_when(tag, epoch, clock);
    if (tag == epoch || w.failed) return clock;
    if (polls % kPollsPerCheck) continue;
    if (!began_ns) began_ns = timer_ns();
    w.failed = give_up(w.params, w.phase, w.layer, Wait::kWords, false, source, epoch, tag, began_ns);
  }
}
constexpr int kTestsPerPoll = 64;  // of a running step's end, between two polls of the descriptor ring: 2 us or so, a poll takes 1.2
DEV void mailbox_pause() {}        // between two polls, also of an idle kernel: a warp that waits for a load takes nothing from others

}  // namespace imex
