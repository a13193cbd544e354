// What drawing needs of a row and of the vocabulary: its parameters, its logits, how often tokens have come, and who looks after which.
//
// Who owns what: unit u of the rank's vocabulary (8 tokens) is block u % num_blocks's, as lm_head deals its first rounds; a quad of
// tokens is one thread's. Counts and scaled logits are touched by that thread alone, so program order is all they need.
//
// Reuse of the logits' words: an adder stores those of step s + 1 in lm_head, so after an exchange of o_proj of that step, for which its block
// has a word of every block of every rank; each sends it after it drew and after find_logprobs of step s, with consumer barriers in between.
// Of the sampling words: as of the plan's.
#pragma once
#include "philox.cuh"
#include "words.cuh"

namespace imex {

// ---------------------------------------------------------------------------------------------- keys
// Floats in their order as integers. Candidates compare by the logit's order first, then the lower id.
DEV u32 order_key(float v) {
  const u32 bits = float_bits(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEV float key_float(u32 key) { return bits_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }
DEV u64 candidate_key(float logit, u32 id) { return (u64)order_key(logit) << 32 | (0xffffffffu - id); }
DEV u32 candidate_id(u64 key) { return 0xffffffffu - (u32)key; }
DEV float minus_infinity() { return bits_float(0xff800000u); }  // of what is never drawn
constexpr u32 kNeverKey = 0x007fffffu;                          // its key

// ---------------------------------------------------------------------------------------------- places
DEV u32 logits_offset(int row) { return shape().off_logits + row * shape().vocab_rows; }
DEV u32 sampling_offset(u32 step) { return shape().off_sampling + (step & 1) * shape().max_rows * kSamplingWords; }

// What the search keeps of a row. The threshold is in (lo, hi]; f(lo) >= target > f(hi), f(t) being what is above key t.
struct Search {
  u32 stage;     // kDecided, kTopK, kTopP
  u32 begun;     // whether this stage has had a round
  u32 lo, hi;    // keys; in the end, what is above lo may be drawn
  u32 above_hi;  // tokens above hi
  u32 largest;   // the largest key
  u64 target;    // of kTopP: mass to be reached
};
// A drawn row in shared memory, in the place of the activations, which nobody needs after lm_head.
struct DrawRow {
  Sampling sampling;
  Search search;
  u32 pivots[kSearchPivots];
  u32 counts[kSearchPivots];                       // tokens above each pivot, of all blocks
  u64 masses[kSearchPivots];                       // their mass
  u64 part_masses[kConsumerWarps][kSearchPivots];  // each warp's share
  u32 part_counts[kConsumerWarps][kSearchPivots];
};
static_assert(sizeof(Sampling) == kSamplingWords * 4 && sizeof(DrawRow) <= kDrawRowBytes, "raise DRAW_ROW_BYTES in abi.py");
DEV DrawRow& draw_row(const Block& b, int row) { return *(DrawRow*)(activations(b) + row * kDrawRowBytes); }

// A block's tokens: quads 0 .. own_quads() - 1, the last of which may be beyond the rank's vocabulary.
DEV int vocab_units() { return shape().vocab_rows / kUnitRows; }
DEV int own_quads() { return 2 * divide_up(vocab_units(), shape().num_blocks); }
DEV int own_tokens() { return 4 * own_quads(); }
DEV int quads_per_consumer() { return divide_up(own_quads(), kConsumerThreads); }
DEV u32 quad_token(const Block& b, int quad) {  // its first token in the rank's vocabulary
  return (quad / 2 * shape().num_blocks + b.index) * kUnitRows + quad % 2 * 4;
}
DEV u32 global_id(const Block& b, u32 token) { return b.params->rank * shape().vocab_rows + token; }
// float4 [own_quads()] of a row: logits as the draw sees them.
DEV float4* scaled_logits(const Block& b, int row) {
  const int rows = shape().max_rows, fixed = rows * kDrawRowBytes, bytes = own_tokens() * 4;
  char* shared = activations(b) + fixed + row * bytes;
  char* global = (char*)b.params->scaled + ((u64)b.index * rows + row) * bytes;
  return (float4*)(fixed + rows * bytes <= (int)(shape().smem_part - shape().smem_x) ? shared : global);
}
// Hands the thread's quads of a row's scaled logits to use(quad, id of the first token, values).
template <class Use>
DEV void each_quad(const Block& b, int row, Use use) {
  const float4* x = scaled_logits(b, row);
  ROLLED for (int quad = b.thread; quad < own_quads(); quad += kConsumerThreads) {
    const u32 token = quad_token(b, quad);
    if (token >= shape().vocab_rows) continue;  // nobody has written there
    const float4 v = x[quad];
    const float values[4] = {v.x, v.y, v.z, v.w};
    use(quad, global_id(b, token), values);
  }
}
// uint4 [own_quads()] of a slot: how often each token was generated, and whether it is in the prompt.
constexpr u32 kInPrompt = 0x80000000u;
DEV uint4* token_counts(const Block& b, u32 slot) {
  return (uint4*)b.params->counts + ((u64)b.index * shape().num_slots + slot) * own_quads();
}

DEV bool penalizes(const Sampling& s) {
  return s.repetition_penalty != 1.f || s.presence_penalty != 0.f || s.frequency_penalty != 0.f;
}
DEV u32 token_index(const Sampling& s, u32 position) {
  return position + 1 - s.prompt_len;
}  // of the token drawn from this row

// ---------------------------------------------------------------------------------------------- what the draw starts from
// The rows that draw, those of them that sample, and the Sampling of each.
DEV bool fetch_sampling(Block& b) {
  Shared& s = *b.shared;
  if (b.thread == 0) {
    u32 drawing = 0, drawn = 0;
  ROLLED for (int row = 0; row < num_rows(b); row++) {
      if (!(s.rows[row].flags & kRowDraws)) continue;
      s.drawing[drawing++] = row;
      if (s.rows[row].flags & kRowSamples) s.drawn[drawn++] = row;
    }
    s.num_drawn = drawn;
  }
  consumer_sync();
  constexpr int kPairs = kSamplingWords / 2;
  const int total = s.num_drawing * kPairs;
  gather<2>(
      b, plan_epoch(b.step), divide_up(total, kConsumerThreads),
      [&](int i) {
        const int at = smaller(b.thread + i * kConsumerThreads, total - 1);
        return own_words(b, sampling_offset(b.step) + (s.drawing[at / kPairs] * kPairs + at % kPairs) * 2);
      },
      [&](int) { return 0u; },
      [&](int i, u32 first, u32 second) {
        const int at = b.thread + i * kConsumerThreads;
        if (at >= total) return;
        u32* to = (u32*)&draw_row(b, s.drawing[at / kPairs]).sampling + at % kPairs * 2;
        to[0] = first;
        to[1] = second;
      });
  return all_well(b);
}

// The row's own token is counted, for penalties of this row and later ones; a request's first row starts anew. A ghost's row counts
// too, in a slot whose next request starts anew.
DEV void count_token(const Block& b, int row) {
  const Row& r = b.shared->rows[row];
  const Sampling& s = draw_row(b, row).sampling;
  if (!penalizes(s)) return;
  uint4* counts = token_counts(b, r.slot);
  const bool first = s.repetition_penalty != 1.f ? r.position == 0 : r.position + 1 == s.prompt_len;
  if (first)
    ROLLED for (int quad = b.thread; quad < own_quads(); quad += kConsumerThreads) counts[quad] = make_uint4(0, 0, 0, 0);
  const u32 token = r.token - global_id(b, 0), unit = token / kUnitRows;
  if (token >= shape().vocab_rows || unit % shape().num_blocks != (u32)b.index) return;
  const int quad = unit / shape().num_blocks * 2 + token % kUnitRows / 4;
  if (quad % kConsumerThreads != b.thread) return;
  u32* count = (u32*)(counts + quad) + token % 4;
  *count = r.position < s.prompt_len ? *count | kInPrompt : *count + 1;
}

// A logit as the draw sees it: penalties, mask, temperature, as vLLM applies them.
DEV float scale_logit(const Sampling& s, float logit, u32 count, u32 id, bool masks) {
  const u32 generated = count & ~kInPrompt;
  if (count && s.repetition_penalty != 1.f) logit = logit > 0.f ? logit / s.repetition_penalty : logit * s.repetition_penalty;
  if (generated) {
    logit -= s.frequency_penalty * (float)generated;
    logit -= s.presence_penalty;
  }
  bool never = id >= shape().vocab_size;
  ROLLED for (u32 i = 0; i < s.num_masked && masks; i++) never |= s.masked[i] == id;
  if (never) return minus_infinity();
  return s.temperature > 0.f ? logit / s.temperature : logit;
}

// Leaves the block's raw logits of rows row_of(0) .. row_of(rows - 1) where scaled_logits are. Each thread its own quads: what it reads
// there afterwards it has written itself.
template <class RowOf>
DEV void fetch_logits(Block& b, int rows, RowOf row_of) {
  const int per = quads_per_consumer();
  auto quad_of = [&](int i) { return b.thread + i / 2 % per * kConsumerThreads; };
  auto exists = [&](int quad) { return quad < own_quads() && quad_token(b, quad) < shape().vocab_rows; };
  gather<4>(
      b, layer_epoch(b.step, shape().num_layers), rows * per * 2,
      [&](int i) {
        const int quad = quad_of(i);  // threads without one read another's
        const u32 token = exists(quad) ? quad_token(b, quad) : (vocab_units() - 1) * kUnitRows;
        return own_words(b, logits_offset(row_of(i / (2 * per))) + token + i % 2 * 2);
      },
      [&](int) { return b.params->rank; },
      [&](int i, u32 first, u32 second) {
        float2* to = (float2*)(scaled_logits(b, row_of(i / (2 * per))) + quad_of(i)) + i % 2;
        if (exists(quad_of(i))) *to = make_float2(bits_float(first), bits_float(second));
      });
}

}  // namespace imex
