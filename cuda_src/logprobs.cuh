// Log-probabilities of drawn rows that ask for them: of the token, and of the most probable ones, from the raw logits. After `sample`
// every block finds what its part of the vocabulary has, rank 0's block 0 merges that, and the mailbox writes the records.
//
// Words: [world_size, num_blocks, max_rows, 2 + MAX_LOGPROBS] pairs in rank 0's memory, in the step's epoch. A block writes those of
// step s + 1 after `sample` of s + 1, for which rank 0's block 0 has sent a word after it had read those of s. What block 0 leaves for
// its mailbox has two buffers by step parity: it writes step s + 2's after the plan of s + 2, which the mailbox publishes after
// finish_step of s.
#pragma once
#include "draw.cuh"

namespace imex {

constexpr int kLogprobWords = 4;  // token id, log-probability, rank, nothing
constexpr int kLogprobRowWords = (1 + kMaxLogprobs) * kLogprobWords;

DEV u32 logprob_words(u32 source, int row, int pair) {
  return shape().off_logprob + ((source * shape().max_rows + row) * (2 + kMaxLogprobs) + pair) * 2;
}

// The largest of the consumers' values, for all of them; `turn` names one of two places, so that one barrier is enough.
DEV u64 consumer_max(Block& b, u64 value, int turn) {
  const u64 of_warp = warp_max(value);
  if (b.lane == 0) b.shared->best[turn & 1][b.warp] = of_warp;
  consumer_sync();
  u64 all = 0;
  for (int w = 0; w < kConsumerWarps; w++) all = b.shared->best[turn & 1][w] > all ? b.shared->best[turn & 1][w] : all;
  return all;
}
// The sums of the consumers' values, for all of them; the same whoever asks.
DEV void consumer_sums(Block& b, DrawRow& r, float& sum, u32& count) {
  const float of_warp = warp_sum(sum);
  const u64 counts = warp_sum((u64)count);
  if (b.lane == 0) r.part_masses[b.warp][0] = float_bits(of_warp), r.part_counts[b.warp][0] = (u32)counts;
  consumer_sync();
  sum = 0.f, count = 0;
  for (int w = 0; w < kConsumerWarps; w++) sum += bits_float((u32)r.part_masses[w][0]), count += r.part_counts[w][0];
  consumer_sync();  // read: they may be written again
}

// The block's own part of a row: its largest logit, the sum of e^(logit - largest), how many are at least the token's, the best.
DEV void publish_part(Block& b, int row, u32 token) {
  DrawRow& r = draw_row(b, row);
  const u32 epoch = layer_epoch(b.step, shape().num_layers), of_rank = token / shape().vocab_rows;
  const u32 at = logits_offset(row) + token % shape().vocab_rows, source = b.params->rank * shape().num_blocks + b.index;
  consumer_sync();  // consumer_max's places may still be read
  const int wanted = r.sampling.num_logprobs - 1;
  float chosen = 0.f;
  gather(  // of whoever owns the token: it has read the word itself, before it sent its best
      b, epoch, 1, [&](int) { return words_of(b, of_rank, at & ~1u); }, [&](int) { return of_rank; },
      [&](int, u32 first, u32 second) { chosen = bits_float(at & 1 ? second : first); });
  u64 best = 0;
  fetch_logits(b, 1, [&](int) { return row; });  // drawn from already: the raw ones again
  each_quad(b, row, [&](int quad, u32 id, const float(&v)[4]) {
    float values[4];
  UNROLL for (int i = 0; i < 4; i++) {
      values[i] = id + i < shape().vocab_size ? v[i] : minus_infinity();
      const u64 key = candidate_key(values[i], id + i);
      best = key > best ? key : best;
    }
    scaled_logits(b, row)[quad] = make_float4(values[0], values[1], values[2], values[3]);
  });
  best = consumer_max(b, best, 0);
  const float largest = key_float((u32)(best >> 32));
  float sum = 0.f;
  u32 count = 0;
  each_quad(b, row, [&](int, u32, const float(&values)[4]) {
    UNROLL for (int i = 0; i < 4; i++) {
      sum += values[i] > minus_infinity() ? fast_exp(values[i] - largest) : 0.f;
      count += values[i] >= chosen;
    }
  });
  consumer_sums(b, r, sum, count);
  auto publish = [&](int pair, u32 first, u32 second) {
    if (b.thread == 0) store_words(words_of(b, 0, logprob_words(source, row, pair)), first, second, epoch);
  };
  publish(0, float_bits(best ? largest : minus_infinity()), float_bits(sum));
  publish(1, count, float_bits(chosen));
  ROLLED for (int n = 0; n < wanted; n++) {
    publish(2 + n, (u32)(best >> 32), (u32)best);
    u64 next = 0;
    each_quad(b, row, [&](int, u32 id, const float(&values)[4]) {
      UNROLL for (int i = 0; i < 4; i++) {
        const u64 key = id + i < shape().vocab_size ? candidate_key(values[i], id + i) : 0;
        if (key < best && key > next) next = key;
      }
    });
    best = consumer_max(b, next, n + 1);
  }
}

// Rank 0's block 0: from all blocks' parts to what the mailbox hands out. Each block's best come in order, so a head of each list is
// enough: one byte a source behind the row's pivots in shared memory, written and read by one thread (the planner checks the room).
DEV void merge_parts(Block& b, int row, u32 token) {
  DrawRow& r = draw_row(b, row);
  const u32 epoch = layer_epoch(b.step, shape().num_layers), blocks = shape().num_blocks, rank = b.params->rank;
  const int sources = shape().world_size * blocks, per = divide_up(sources, kConsumerThreads), wanted = r.sampling.num_logprobs - 1;
  u32* out = (u32*)b.params->logprobs + ((b.step & 1) * shape().max_rows + row) * kLogprobRowWords;
  auto source_of = [&](int i) { return b.thread + i * kConsumerThreads; };
  auto words = [&](int i, int pair) { return words_of(b, rank, logprob_words(smaller(source_of(i), sources - 1), row, pair)); };
  auto owes = [&](int i) { return smaller(source_of(i), sources - 1) / blocks; };
  u64 best = 0;
  consumer_sync();  // consumer_max's places may still be read
  gather(b, epoch, per, [&](int i) { return words(i, 0); }, owes, [&](int, u32 first, u32) {
    const u64 key = order_key(bits_float(first));
    best = key > best ? key : best;
  });
  const float largest = key_float((u32)consumer_max(b, best, 1));
  float sum = 0.f, chosen = 0.f;
  u32 count = 0;
  gather(b, epoch, per, [&](int i) { return words(i, 0); }, owes, [&](int i, u32 first, u32 second) {
    if (source_of(i) < sources) sum += bits_float(second) * fast_exp(bits_float(first) - largest);
  });
  gather(b, epoch, per, [&](int i) { return words(i, 1); }, owes, [&](int i, u32 first, u32 second) {
    if (source_of(i) < sources) count += first;
    chosen = bits_float(second);
  });
  consumer_sums(b, r, sum, count);
  const float norm = largest + natural_log(sum);
  auto put = [&](int entry, u32 id, float logit, u32 rank_of) {
    if (b.thread) return;
    store_global(out + entry * kLogprobWords, id);
    store_global(out + entry * kLogprobWords + 1, float_bits(logit - norm));
    store_global(out + entry * kLogprobWords + 2, rank_of);
  };
  put(0, token, chosen, count);
  unsigned char* heads = (unsigned char*)r.counts;
  for (int i = 0; source_of(i) < sources; i++) heads[source_of(i)] = 0;
  ROLLED for (int n = 0; n < wanted; n++) {
    u64 mine = 0;
    int from = 0;
    auto head = [&](int i) { return source_of(i) < sources ? (int)heads[source_of(i)] : 0; };
    gather(b, epoch, per, [&](int i) { return words(i, 2 + head(i)); }, owes, [&](int i, u32 first, u32 second) {
      const u64 key = (u64)first << 32 | second;
      if (source_of(i) < sources && key > mine) mine = key, from = i;
    });
    const u64 next = consumer_max(b, mine, n);
    if (mine == next && heads[source_of(from)] + 1 < wanted) heads[source_of(from)]++;
    put(1 + n, candidate_id(next), key_float((u32)(next >> 32)), n + 1);
  }
}

// All consumers, once the step's tokens are known; false when the block must leave.
DEV_CALL bool find_logprobs(int index, u32 step) {
  Block b = called_block(index, step);
  const Shared& s = *b.shared;
  ROLLED for (u32 d = 0; d < s.num_drawn; d++) {
    const int row = s.drawn[d];
    if (!draw_row(b, row).sampling.num_logprobs) continue;
    const u32 token = s.tokens[step & 1][row];
    publish_part(b, row, token);
    if (b.params->rank == 0 && index == 0) merge_parts(b, row, token);
  }
  return all_well(b);
}

}  // namespace imex
