// The implicit exchange: o_proj and down_proj end in partial sums that every rank needs summed. Each unit's sums leave the SM that
// made them as tagged words, straight into the memory of whoever adds, as soon as they exist; the next phase waits for them.
//
//   ONE_SHOT        every block of every rank reads every rank's words and adds them itself: one hop, most reads
//   ONE_SHOT_LOCAL  in each rank, a block owns a slice of the vector: it adds the words of all ranks and publishes the slice to the
//                   blocks of its own GPU: two hops, one of them short, few reads
//   TWO_SHOT        a slice has one owner in the whole group, which publishes to all ranks: the fewest words over the links
//   SEMAPHORE       ONE_SHOT without tagged words, for comparison (semaphore.cuh)
//
// Sums run over the sources in rank order, so all ranks hold the same bits, and all four give the same bits: the residual stays
// fp32 and is never rounded, what the next phase sees of it is rounded to bf16 whoever added.
// The residual lives where it is summed: replicated [rows, hidden] (ONE_SHOT, SEMAPHORE), or the owned slice [rows, owned].
// With Shape.float24_partials a partial sum is rounded to 24 bits before it is sent, and a wide word carries two: half the bytes, other bits.
//
// Condition C, why one buffer each is enough. A block may overwrite words of layer l (as it does in layer l + 1) only when every
// block has read them. Let X be a block that writes o_part of layer l + 1. It has passed the receive of down_part of layer l, so
// (directly, or through owners who did) it has waited for down_part words from every block of every rank: each block publishes in
// both projections, its first unit being its own (stream.cuh; the planner keeps grid <= hidden / 8). A block publishes those only
// after all its consumers left the gather of gate words, hence after they read o_part (and o_sum) of layer l: a consumer barrier
// lies between, and a store is never performed before a load whose value decided the loop before it. The same argument with the
// names exchanged covers down_part, qkv and split. Bare words have a set a layer (bare.cuh). o_sum and down_sum are two places in it because the
// owner of a slice waits only for that slice's words: with one, it could publish down sums while a late block still reads o sums.
// A step without logits has no down_part of the last layer (multiplies_in, block.cuh). Then X has passed `sample` before it writes anything,
// so it has a word of every block, which each sent after it had taken in o_part, appended its keys and values, and read all before.
#pragma once
#include "bare.cuh"
#include "norm.cuh"
#include "semaphore.cuh"
#include "trace.cuh"
#include "words.cuh"

namespace imex {

struct Exchange {
  u32 part_offset;  // [sources, max_rows, part_width] fp32 words, or half as many wide ones
  u32 sum_offset;   // bare words [max_rows, hidden / 2]
  u32 slices;       // parts of K that are summed like ranks
};
DEV Exchange o_exchange() { return {shape().off_o_part, shape().off_o_sum, 1}; }
DEV Exchange down_exchange() { return {shape().off_down_part, shape().off_down_sum, shape().down_slices}; }

DEV u32 num_sources(Exchange x) { return shape().world_size * x.slices; }
DEV bool wide() { return shape().float24_partials; }

// Slices: pairs of the hidden vector, dealt in equal runs to the blocks of a rank, or of all ranks.
DEV int num_owners() { return shape().num_blocks * (two_shot() ? shape().world_size : 1); }
DEV int owned_pairs() {  // two words that travel together have one owner
  const int pairs = shape().hidden_size / 2;
  return wide() ? 2 * divide_up(pairs / 2, num_owners()) : divide_up(pairs, num_owners());
}
DEV int owner_index(const Block& b) { return b.index + (two_shot() ? b.params->rank * shape().num_blocks : 0); }

// Where partial sums n and n + 1 of a row are: of 32 quads (four values each) first all halves 0, then all halves 1. A warp that adds 32
// quads loads 512 bytes in a row twice, not every other 16 bytes of 1024, so half as many sectors.
constexpr int kPartGroup = 128;  // PARTIAL_GROUP of planner.py
DEV int part_width() { return divide_up(shape().hidden_size, kPartGroup) * kPartGroup; }
DEV int part_index(int n) { return n / kPartGroup * kPartGroup + n / 2 % 2 * (kPartGroup / 2) + n % kPartGroup / 4 * 2; }

// The word of partial sum n of a row; wide words have a pair each, and a quad's two are neighbours anyway.
DEV u32 part_word(Exchange x, u32 source, int row, int n) {
  const u32 at = (source * shape().max_rows + row) * part_width();
  return x.part_offset + (wide() ? (at + n) / 2 : at + part_index(n));
}

// Sends the partial sums of outputs n and n + 1 of a row to whoever adds them.
DEV void push_partial(const Block& b, Exchange x, int rows, u32 slice, int row, int n, float2 sum, u32 epoch) {
  const u32 source = b.params->rank * x.slices + slice;
  const u32 at = part_word(x, source, row, n);
  const bool to_one = two_shot() && !one_shot(rows);
  const u32 owner = to_one ? n / 2 / owned_pairs() / shape().num_blocks : 0;
  for (u32 r = to_one ? owner : 0; r < (to_one ? owner + 1 : shape().world_size); r++)
    if (semaphore()) {
      store_global((float2*)(plain_values(b, r, x.part_offset, source, row) + n),
                   wide() ? unpack_float24(pack_float24(sum.x, sum.y)) : sum);
    } else if (wide()) {
      store_wide_word(words_of(b, r, at), pack_float24(sum.x, sum.y), epoch);
    } else {
      store_words(words_of(b, r, at), float_bits(sum.x), float_bits(sum.y), epoch);
    }
}

// Sends a unit's partial sums: one warp, sum(row, pair) the sums of two neighbouring outputs.
template <class Sum>
DEV void send_unit(const Block& b, Exchange x, int rows, u32 slice, int unit, u32 epoch, Sum sum) {
  for (int i = b.lane; i < rows * (kUnitRows / 2); i += LANES) {
    const int row = i / (kUnitRows / 2), pair = i % (kUnitRows / 2);
    push_partial(b, x, rows, slice, row, unit * kUnitRows + 2 * pair, sum(row, pair), epoch);
  }
  if (semaphore()) raise_signals(b, x.part_offset, num_sources(x), b.params->rank * x.slices + slice, unit, epoch);
}

// Waits for pairs of words of partial sums, wide ones or tagged ones; use(i, live, first, second) takes their payloads as u64.
template <class Address, class Source, class Use>
DEV void gather_partials(Block& b, u32 epoch, int count, Address address, Source source, Use use) {
  if (wide()) gather_batches<8, u64>(b, epoch, count, address, source, use);
  else
    gather_batches<8, u32>(b, epoch, count, address, source,
                           [&](int i, bool live, u32 first, u32 second) { use(i, live, (u64)first, (u64)second); });
}

// A block's whole part in ONE_SHOT: adds every source's words to the replicated residual and puts it, rounded, among the activations.
// Returns the squares that put_residual does.
DEV float receive_whole(Block& b, const Norm& norm, Exchange x, u32 epoch) {
  const int quads = shape().hidden_size / 4, per_row = quads_per_thread(quads);
  const int parts = wide() ? 1 : 2, loads = parts * num_sources(x);  // of a quad: each source's, two words each
  float sum[4] = {0.f, 0.f, 0.f, 0.f}, squares = 0.f;
  gather_partials(
      b, epoch, num_rows(b) * per_row * loads,
      [&](int i) {
    const int item = i / loads, n = held_quad(quad_of(b, item % per_row), quads) * 4 + i % parts * 2;
    return own_words(b, part_word(x, i % loads / parts, item / per_row, n));
      },
      [&](int i) {
    return (u32)(i % loads / parts) / x.slices; },
      [&](int i, bool live, u64 first, u64 second) {
    const bool start = i % loads < parts;
    if (wide()) {
      const float2 low = unpack_float24(first), high = unpack_float24(second);
      const float v[4] = {low.x, low.y, high.x, high.y};
  UNROLL for (int j = 0; j < 4; j++) sum[j] = (start ? 0.f : sum[j]) + v[j];
        } else {
          float& s0 = i % 2 ? sum[2] : sum[0];
          float& s1 = i % 2 ? sum[3] : sum[1];
          s0 = (start ? 0.f : s0) + bits_float((u32)first);
          s1 = (start ? 0.f : s1) + bits_float((u32)second);
        }
        if (i % loads < loads - 1) return;
        const int item = i / loads, row = item / per_row, mine = item % per_row;
        const bool exists = live && is_quad(quad_of(b, mine), quads);
        squares += add_to_residual(b, norm, row, mine, {sum[0], sum[1], sum[2], sum[3]}, exists);
      });
  return squares;
}

// A slice owner's part in the others: adds every source's words of its slice to its residual and publishes them, rounded.
DEV void receive_slice(Block& b, Exchange x, int layer) {
  const int pairs = shape().hidden_size / 2, mine = owned_pairs(), begin = owner_index(b) * mine;
  if (begin >= pairs) return;
  const int total = num_rows(b) * mine;
  ROLLED for (int first = b.warp * LANES; first < total; first += kConsumerThreads) {  // by whole warps
    const int item = smaller(first + b.lane, total - 1), row = item / mine, pair = begin + item % mine;
    const int held = smaller(pair, pairs - 1);  // of the last owner some do not exist: it reads others' for them
    float2 sum = {0.f, 0.f};
    gather_partials(
        b, layer_epoch(b.step, layer), num_sources(x),
        [&](int i) { return own_words(b, part_word(x, i, row, 2 * held) & ~1u); },  // of a pair of wide words one is this thread's
        [&](int i) { return (u32)i / x.slices; },
        [&](int, bool live, u64 low, u64 high) {
          const float2 v = wide() ? unpack_float24(held % 2 ? high : low) : float2{bits_float((u32)low), bits_float((u32)high)};
          if (live) sum.x += v.x, sum.y += v.y;
        });
    if (first + b.lane >= total || pair >= pairs || b.waiter.failed) continue;
    float2* r = (float2*)(residual(b) + 2 * item);
    const float2 v = {r->x + sum.x, r->y + sum.y};
    *r = v;
    for (u32 p = 0; p < shape().world_size; p++)
      if (two_shot() || p == b.params->rank) store_bare(bare_words(b, p, x.sum_offset, layer, row) + pair, pack_bf16(v.x, v.y));
  }
}

// Takes in the exchange of a layer: adds it to the residual and leaves the residual, rounded to bf16, as the activations of every row; if
// a product follows, times the norm's weights, and with its sums of squares. If this block `sums` a slice for others, take() comes when its sums
// are on their way. All consumers; false when the block must leave.
template <class Take>
DEV bool receive(Block& b, Exchange x, int layer, bool multiplies, bool sums, Take take) {
  const u32 epoch = layer_epoch(b.step, layer);
  consumer_sync();  // the phase before has read the activations
  mark(b, Mark::kMet, take_tile_clocks(b));
  if (sums) {
    receive_slice(b, x, layer);
    mark(b, Mark::kSum, take_word_clocks(b));
    take();
    mark(b, Mark::kTaken, take_tile_clocks(b));
  }
  const Norm norm = load_norm(b, multiplies);
  float squares = 0.f;
  if (semaphore()) {
    if (!await_signals(b, x.part_offset, num_sources(x), epoch)) return false;
    squares = add_plain_values(b, norm, x.part_offset, num_sources(x));
  } else if (one_shot(num_rows(b))) {
    squares = receive_whole(b, norm, x, epoch);
  } else {
    gather_bare(b, x.sum_offset, layer, 0, shape().hidden_size);
    if (norm.weighs) consumer_sync();  // weights are dealt by quads
  }
  return end_residual(b, norm, squares);
}

// Puts a value of the residual where `receive` will look for it: outputs n .. n + 3 of a row. `embed` starts every step with it.
DEV void set_residual(Block& b, int row, int n, const float (&v)[4]) {
  if (replicated(num_rows(b))) {
    float* r = residual(b) + row * shape().hidden_size + n;
    for (int i = 0; i < 4; i++) r[i] = v[i];
    return;
  }
  const int mine = 2 * owned_pairs(), begin = owner_index(b) * mine;
  for (int i = 0; i < 4; i++)
    if (n + i >= begin && n + i < begin + mine) residual(b)[row * mine + n + i - begin] = v[i];
}

}  // namespace imex
