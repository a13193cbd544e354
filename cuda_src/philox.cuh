// Random numbers that depend on nothing but what they are for: Philox4x32-10 (Salmon et al., SC 2011), keyed by a request's seed and
// counted by the token's index and id. So a draw is the same whoever makes it, whatever else is in the batch.
#pragma once
#include "primitives.cuh"

namespace imex {

// Takes a counter to four random words.
DEV void philox(u32 (&c)[4], u32 key0, u32 key1) {
  ROLLED for (int round = 0; round < 10; round++) {
    const u64 p0 = (u64)0xD2511F53u * c[0], p1 = (u64)0xCD9E8D57u * c[2];
    const u32 c1 = c[1], c3 = c[3];
    c[0] = (u32)(p1 >> 32) ^ c1 ^ key0;
    c[1] = (u32)p1;
    c[2] = (u32)(p0 >> 32) ^ c3 ^ key1;
    c[3] = (u32)p0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// A sample of Gumbel's distribution: -log(E) with E = -log(1 - v), v uniform. Small v, the long tail, keeps all of its 32 bits: near 1
// a float has no more than 24.
DEV float gumbel(u32 bits) {
  const float u = ((float)bits + 0.5f) * 2.3283064365386963e-10f, v = u < 0.99999994f ? u : 0.99999994f;
  const float e = v < 0.0078125f ? v * (1.f + v * (0.5f + v * (0.33333334f + v * 0.25f))) : -natural_log(1.f - v);
  return -natural_log(e);
}

}  // namespace imex
