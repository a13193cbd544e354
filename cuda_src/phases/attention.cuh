// attention: q, KV pages -> head outputs. Work is dealt in items: (rows, KV head, one run of pages or two), deal.cuh. Pages come through the
// ring; within a block each warp attends to whole chunks of 32 positions on its own, and the block merges each run once. A context longer than
// one run is merged again across blocks, by whoever owns the output. How a context is cut depends on the row's position alone, so its bits do
// not depend on what else is in the step.
//
// Rows of a prompt see the same pages. Neighbours whose last position is in the same chunk are one item, as many as the tensor core's
// operand has room for: each sees every chunk of the run, and of the last one its own positions only.
#pragma once
#include "../deal.cuh"
#include "../stream.cuh"
#include "../tap.cuh"
#include "../words.cuh"

namespace imex {

struct Item {
  int row, rows;                   // neighbours
  int kv_head, first_head, heads;  // query heads first_head .. + heads of each row, all of this KV head
  int queries;                     // rows * heads: the heads of one row after another
  int position;                    // of the last row
  int split, runs, splits;         // runs split .. + runs of `splits`
  int first_page, end_page;
  int in_step;  // positions up to the last row's that come with this step, some of which are in this run; 0: none is
};

// Item number `index` of the step, which has so many.
DEV void find_item(const Block& b, int index, Item& item) {
  ROLLED for (int row = 0;; row += item.rows) {
    item.rows = shape().attention_rows > 1 ? b.shared->rows[row].together : 1;
    const Row& first = b.shared->rows[row];
    const int items = items_of(first);
    if (index >= items) {
      index -= items;
      continue;
    }
    const int splits = first.runs, at_once = runs_at_once(first), of_group = items_of_group(first);
    const u32 position = first.position;
    const int group = quotient(index, of_group), per = pages_per_run(position), part = group % head_blocks();
    item.row = row;
    item.kv_head = group / head_blocks();
    item.first_head = item.kv_head * group_size() + part * kMaxHeads;
    item.heads = smaller(kMaxHeads, group_size() - part * kMaxHeads);
    item.queries = item.rows * item.heads;
    item.position = position + item.rows - 1;
    item.split = (index - group * of_group) * at_once;
    item.runs = smaller(at_once, splits - item.split);
    item.splits = splits;
    item.first_page = item.split * per;
    item.end_page = smaller(item.first_page + item.runs * per, position / shape().page_size + 1);
    const u32 step_first = b.shared->rows[b.shared->rows[row].first_row].position;
    item.in_step = item.end_page * shape().page_size > step_first ? item.position + 1 - step_first : 0;
    return;
  }
}

DEV int scratch_stages() { return shape().scratch_warps ? 1 : 0; }  // of an item: behind its pages
DEV void stream_pages(Block& b, Producer& p) {
  if (!runs(Phase::kAttention)) return;
  Item item;
  ROLLED for (int i = b.shared->first_item; i < (int)b.shared->end_item; i++) {
    find_item(b, i, item);
    for (int number = item.end_page - 1; number >= item.first_page && !b.waiter.failed; number--)  // the newest first, see `attend`
      push_tile(b, p, kUnitPage, page_at(b, b.waiter.layer, find_page(b, item.row, number), item.kv_head), page_bytes());
    if (scratch_stages() && !b.waiter.failed) push_mark(b, p, kUnitScratch);
  }
}

// Where the block keeps an item, in place of the activations: bf16 q [head_dim / 32, queries, 32]; float [CONSUMER_WARPS, queries,
// merge_width()] of what the warps merge. Where that is more than the activations take, the first scratch_warps of it are in a stage of the ring
// that is nobody else's meanwhile: only a few blocks have items, and all would have a stage less.
DEV char* item_query(const Block& b) { return activations(b); }
DEV float* item_merge(const Block& b, const Item& item, int warp, int scratch) {
  const int each = item.queries * merge_width(), away = shape().scratch_warps;
  float* here = (float*)(item_query(b) + item.queries * (int)shape().head_dim * 2);
  return warp < away ? (float*)ring_stage(b, scratch) + warp * each : here + (warp - away) * each;
}

// This step's k and v are not in the pages yet: four dims of a position's key (or value) go where they will be. The page is in the ring, or not
// of this run.
DEV void put_fresh(Block& b, const Item& item, int position, bool value, int d, u64 quad) {
  const int behind = item.end_page - 1 - position / (int)shape().page_size, p = position % kChunk;  // the newest page comes first
  if (behind < 0 || behind >= item.end_page - item.first_page) return;
  char* chunk = ring_stage(b, ahead(b.ring, behind).stage) + position % (int)shape().page_size / kChunk * chunk_bytes();
  if (!value) UNROLL for (int j = 0; j < 4; j += 2) *(u32*)(chunk + key_offset(p, d + j)) = (u32)(quad >> 16 * j);
  else UNROLL for (int j = 0; j < 4; j++) *(u16*)(chunk + value_offset(p, d + j)) = (u16)(quad >> 16 * j);
}
// All consumers fetch the item's q and the step's k and v, in one round trip. The ring is at the item's first stage.
DEV void gather_item(Block& b, const Item& item, u32 epoch) {
  const int quads = shape().head_dim / 4, of_row = item.heads * quads, query = item.rows * of_row;
  const int total = query + item.in_step * 2 * quads, thread = not_before(b.thread);
  gather<2>(
      b, epoch, divide_up(total, kConsumerThreads),
      [&](int i) {
        const int at = smaller(thread + i * kConsumerThreads, total - 1), fresh = at - query;
        const u64* q = own_words(b, shape().off_qkv + (item.row + at / of_row) * qkv_width() + item.first_head * (2 * quads));
        if (fresh < 0) return q + 2 * (at % of_row);
        const int row = b.shared->rows[item.row].first_row + fresh / (2 * quads);
        return (fresh / quads % 2 ? value_words(b, row, item.kv_head) : key_words(b, row, item.kv_head)) + 2 * (fresh % quads);
      },
      [&](int) { return b.params->rank; },
      [&](int i, u32 first, u32 second) {
        const int at = thread + i * kConsumerThreads, of = at / quads, d = at % quads * 4;
        if (at >= total || b.waiter.failed) return;  // who gave up may have no page to write to
        const u64 quad = (u64)second << 32 | first;
        if (at < query) *(u64*)(item_query(b) + ((d / 32 * item.queries + of) * 32 + d % 32) * 2) = quad;
        else put_fresh(b, item, item.position + 1 - item.in_step + (at - query) / (2 * quads), (at - query) / quads % 2, d, quad);
      });
}

// One warp clears a chunk's values of positions from `valid` on: a weight of zero does not erase what is not a number. It touches no others, which
// put_fresh may be writing.
DEV void clear_tail(Block& b, char* chunk, int valid) {
  ROLLED for (int i = not_before(b.lane); i < (int)shape().head_dim * 4; i += LANES) {  // pieces: two dims of positions 0 and 1, and of 2 and 3, of four
    char* piece = chunk + value_offset(0, 0) + 16 * i;
    const int keep = valid - (i % 4 * 8 + i / 32 % 2 * 4);
    UNROLL for (int j = 0; j < 2; j++) {
      if (keep <= 2 * j) *(u64*)(piece + 8 * j) = 0;
      if (keep == 2 * j + 1) *(u16*)(piece + 8 * j + 2) = *(u16*)(piece + 8 * j + 6) = 0;
    }
  }
}

DEV u32 split_words(int row, int head, int split) {
  return shape().off_split + ((row * shape().num_heads + head) * shape().max_splits + split) * (shape().head_dim + 2);
}

// Outputs d and d + 1 of a row's head.
DEV void put_output(Block& b, int row, int head, int d, float2 v) {
  const int n = head * shape().head_dim + d;
  store_bare(own_bare_words(b, shape().off_attn, b.waiter.layer, row) + n / 2, pack_bf16(v.x, v.y));
  tap(b, Phase::kAttention, row, n, v.x);
  tap(b, Phase::kAttention, row, n + 1, v.y);
}

// `asked`: q is here, of the item before. False when the block must leave.
DEV bool attend(Block& b, const Item& item, bool asked, u32 epoch) {
  const int dim = shape().head_dim, pairs = item.queries * dim / 2, position = item.position;
  const int page_chunks = shape().page_size / kChunk, last_chunk = position / kChunk;
  consumer_sync();  // the activations have been read: the item takes their place
  mark(b, Mark::kMet);
  // Pages are here before q is, and what can be done to them is done while q is on its way. A run of at most a chunk a warp that fits the
  // ring is awaited whole, so that each warp then goes straight to its chunk; of a longer one only pages with positions of this step, the newest.
  const int run_pages = item.end_page - item.first_page, step_page = (position + 1 - item.in_step) / (int)shape().page_size;
  const int stages = run_pages + scratch_stages();
  const bool whole = run_pages * page_chunks <= kConsumerWarps && stages < (int)shape().ring_stages;
  const int awaited = whole ? stages : item.in_step ? item.end_page - larger(item.first_page, step_page) : 1;
  bool here = wait_run(b, awaited);
  if (here && last_chunk / page_chunks == item.end_page - 1 && last_chunk % kConsumerWarps == b.warp)
    clear_tail(b, ring_stage(b, b.ring.stage) + last_chunk % page_chunks * chunk_bytes(), position + 1 - last_chunk * kChunk);
  if (!asked || item.in_step) {
    gather_item(b, item, epoch);
    if (!all_well(b)) return false;
  }
  mark(b, Mark::kInput, take_word_clocks(b));

  int passed = 0;  // pages of the run that this warp has left behind
  auto leave_page = [&] {
    if (passed == 0) fence_async_shared();  // what this thread put into pages, before a later copy
    release_stage(b);
    if (++passed < stages) here = wait_stage(b);
  };
  auto find_chunk = [&](int chunk) {  // where it is, unless the block must leave
    const int number = item.end_page - 1 - chunk / page_chunks;  // of its page, in the ring's order
    ROLLED while (!whole && here && passed < number) leave_page();
    return ring_stage(b, ahead(b.ring, number - passed).stage) + chunk % page_chunks * chunk_bytes();
  };
  auto seen = [&](int chunk) { return position + 2 - item.rows - chunk * kChunk; };  // of it, by the first row
  Flash flash;
  // The warp's chunks of the run: the newest first, then each kConsumerWarps before it. No two are in one page.
  const int end_chunk = smaller(item.end_page * page_chunks, last_chunk + 1), first_chunk = item.first_page * page_chunks;
  int chunk = end_chunk - 1 - (int)((u32)(end_chunk - 1 - b.warp) % kConsumerWarps);
  if (chunk < first_chunk) {
    flash_zero(flash);
  } else if (const char* at = find_chunk(chunk); here) {
    flash_chunk<true>(flash, item_query(b), at, item.queries, item.heads, seen(chunk), shape().attn_scale);
  }
  ROLLED while (here && (chunk -= kConsumerWarps) >= first_chunk)
    if (const char* at = find_chunk(chunk); here)
      flash_chunk<false>(flash, item_query(b), at, item.queries, item.heads, seen(chunk), shape().attn_scale);
  ROLLED while (!whole && here && passed < run_pages) leave_page();
  const int scratch = ahead(b.ring, whole ? run_pages : 0).stage;
  if (here) flash_store(flash, item_merge(b, item, b.warp, scratch), item.queries);
  consumer_sync();
  constexpr int kHalf = kConsumerWarps / 2;
  for (int i = not_before(b.thread); i < pairs * item.runs && !b.waiter.failed; i += kConsumerThreads) {
    const int run = i >= pairs, pair = i - run * pairs, query = pair / (dim / 2), d = pair % (dim / 2) * 2, row = item.row + query / item.heads,
              head = item.first_head + query % item.heads;
    float2 part[kConsumerWarps], scale[kConsumerWarps], v = {0.f, 0.f};  // scale: a warp's maximum and sum
    UNROLL for (int w = 0; w < kConsumerWarps; w++) {
      const bool halves = item.runs > 1;  // a run is in half of the warps; in the other's place stands what a warp without a chunk has
      const float* of = item_merge(b, item, halves ? run * kHalf + w % kHalf : w, scratch) + query * merge_width();
      const bool has = !halves || w < kHalf;
      part[w] = *(const float2*)(of + d);
      scale[w] = *(const float2*)(of + dim);
      part[w] = {has ? part[w].x : 0.f, has ? part[w].y : 0.f};
      scale[w] = {has ? scale[w].x : kMinusInfinity, has ? scale[w].y : 0.f};
    }
    float top = kMinusInfinity, sum = 0.f;
    UNROLL for (int w = 0; w < kConsumerWarps; w++) top = fmaxf(top, scale[w].x);
    UNROLL for (int w = 0; w < kConsumerWarps; w++) {
      const float weight = fast_exp(scale[w].x - top);
      v.x += weight * part[w].x;
      v.y += weight * part[w].y;
      sum += weight * scale[w].y;
    }
    if (item.splits == 1) {
      put_output(b, row, head, d, {fast_divide(v.x, sum), fast_divide(v.y, sum)});
    } else {
      u64* to = own_words(b, split_words(row, head, item.split + run));
      store_words(to + d, float_bits(v.x), float_bits(v.y), epoch);
      if (d == 0) store_words(to + dim, float_bits(top), float_bits(sum), epoch);
    }
  }
  fence_async_shared();  // as above, and what was stored to be merged
  if (here) release_stages(b, whole ? stages : scratch_stages());  // only now: everybody waits for the words above
  return true;
}

// Merges the runs of long contexts: a lane takes a run of four outputs, so a warp merges as many quads as it has lanes for. All rows'
// quads are dealt to the warps of all blocks, and all is done in one hop.
DEV void merge_splits(Block& b, u32 epoch) {
  constexpr int kPerLane = kMaxSplits / LANES, kLaneBits = LANES == 32 ? 5 : 0;
  const int dim = shape().head_dim, quads = shape().num_heads * dim / 4;
  int turn = b.index + shape().num_blocks * b.warp, row = 0;  // of the warp, among the row's
  ROLLED while (row < num_rows(b)) {
    const int splits = b.shared->rows[row].runs;
    int bits = 0;  // 1 << bits lanes take a quad
    while (1 << bits < splits && 1 << bits < LANES) bits++;
    const int lanes = 1 << bits, at_once = LANES >> bits, turns = splits > 1 ? (quads + at_once - 1) >> (kLaneBits - bits) : 0;
    if (turn >= turns) {
      turn -= turns, row++;
      continue;
    }
    const int mine = turn * at_once + (b.lane >> bits), quad = smaller(mine, quads - 1), head = quad / (dim / 4), d = quad % (dim / 4) * 4;
    float top = kMinusInfinity, v[5] = {};  // v[4]: the sum of weights
    float part[kPerLane][4] = {};
    float2 scale[kPerLane];
    UNROLL for (int j = 0; j < kPerLane; j++) {
      scale[j] = {kMinusInfinity, 0.f};
      const int split = (b.lane & (lanes - 1)) + j * lanes;
      if (j * lanes >= splits) continue;
      const u64* from = own_words(b, split_words(row, head, smaller(split, splits - 1)));
      u32 words[3][2];
      wait_words<3, true>(
          b.waiter, Wait::kWords, false, epoch, 3, [&](int i) { return from + (i < 2 ? d + 2 * i : dim); }, [&](int) { return b.params->rank; },
          words);
      if (split >= splits) continue;
      UNROLL for (int i = 0; i < 4; i++) part[j][i] = bits_float(words[i / 2][i % 2]);
      scale[j] = {bits_float(words[2][0]), bits_float(words[2][1])};
      top = fmaxf(top, scale[j].x);
    }
    top = lanes_max(top, lanes);
    UNROLL for (int j = 0; j < kPerLane; j++) {
      const float weight = scale[j].y > 0.f ? fast_exp(scale[j].x - top) : 0.f;
      UNROLL for (int i = 0; i < 4; i++) v[i] += weight * part[j][i];
      v[4] += weight * scale[j].y;
    }
    lanes_sums(v, lanes);
    if ((b.lane & (lanes - 1)) == 0 && mine < quads && !b.waiter.failed)
      UNROLL for (int i = 0; i < 4; i += 2) put_output(b, row, head, d + i, {fast_divide(v[i], v[4]), fast_divide(v[i + 1], v[4])});
    turn += shape().num_blocks * kConsumerWarps;
  }
}

DEV bool any_cut(const Block& b) {
  for (int row = 0; row < num_rows(b); row++)
    if (b.shared->rows[row].runs > 1) return true;
  return false;
}

DEV bool attention(Block& b) {
  if (!runs(Phase::kAttention)) return true;
  b.waiter.phase = Phase::kAttention;  // until it is done: the step's loop counts in matrix phases
  mark(b, Mark::kBegin);
  const u32 epoch = layer_epoch(b.step, b.waiter.layer);
  Item item;
  u32 pages = 0;
  int row = -1, head = 0;  // whose q is here
  ROLLED for (int i = b.shared->first_item; i < (int)b.shared->end_item; i++) {
    find_item(b, i, item);
    const bool asked = shape().max_rows > 1 && item.row == row && item.first_head == head;  // with one row a block seldom has two items
    if (!attend(b, item, asked, epoch)) return false;
    row = item.row, head = item.first_head;
    pages += item.end_page - item.first_page;
  }
  mark(b, Mark::kReady, pages | (shape().trace && any_cut(b) ? kTraceCut : 0));
  merge_splits(b, epoch);  // after all items of this block: no block waits for a run while one of its own is still to come
  mark(b, Mark::kEnd, take_tile_clocks(b));
  b.waiter.phase = Phase::kQkv;
  return true;
}

// Writes the step's k and v to their pages, in time for the next step. Called after gate_up, whose input every block could only make
// once all had finished this layer's attention; the words stay until down_proj's exchange, or `sample`.
DEV void append_kv(Block& b) {
  if (!runs(Phase::kAttention)) return;
  const int dim = shape().head_dim, quads = dim / 4, kv_heads = shape().num_kv_heads, items = num_rows(b) * kv_heads;
  const int thread = not_before(b.thread);
  const u32 epoch = layer_epoch(b.step, b.waiter.layer);
  for (int i = b.index; i < items; i += shape().num_blocks) {
    const int row = i / kv_heads, kv_head = i % kv_heads;
    const u32 in_page = b.shared->rows[row].position % shape().page_size;
    char* chunk = page_at(b, b.waiter.layer, b.shared->rows[row].page, kv_head) + in_page / kChunk * chunk_bytes();
    const int p = in_page % kChunk, total = 2 * quads;
    gather<2>(
        b, epoch, divide_up(total, kConsumerThreads),
        [&](int j) {
          const int at = smaller(thread + j * kConsumerThreads, total - 1);
          return (at < quads ? key_words(b, row, kv_head) : value_words(b, row, kv_head)) + at % quads * 2;
        },
        [&](int) { return b.params->rank; },
        [&](int j, u32 first, u32 second) {
          const int at = thread + j * kConsumerThreads, d = at % quads * 4;
          if (at >= total || b.waiter.failed) return;
          if (at < quads) {
            store_global((u32*)(chunk + key_offset(p, d)), first);
            store_global((u32*)(chunk + key_offset(p, d + 2)), second);
          } else {
            store_global((u16*)(chunk + value_offset(p, d)), (u16)first);
            store_global((u16*)(chunk + value_offset(p, d + 1)), (u16)(first >> 16));
            store_global((u16*)(chunk + value_offset(p, d + 2)), (u16)second);
            store_global((u16*)(chunk + value_offset(p, d + 3)), (u16)(second >> 16));
          }
        });
  }
}

}  // namespace imex
