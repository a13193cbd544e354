// attention: q, KV pages -> head outputs. Work is dealt in items: (rows, KV head, run of pages). Pages come through the ring; within a
// block each warp attends to whole chunks of 32 positions on its own, and the block merges once. A context longer than one run is
// merged again across blocks, by whoever owns the output. How a context is cut depends on the row's position alone, so its bits do
// not depend on what else is in the step.
//
// Rows of a prompt see the same pages. Neighbours whose last position is in the same chunk are one item, as many as the tensor core's
// operand has room for: each sees every chunk of the run, and of the last one its own positions only.
#pragma once
#include "../kv.cuh"
#include "../stream.cuh"
#include "../tap.cuh"
#include "../words.cuh"

namespace imex {

constexpr int kMaxHeads = 16;  // queries of one item: the tensor core's m = 16 operand

struct Item {
  int row, rows;                   // neighbours
  int kv_head, first_head, heads;  // query heads first_head .. + heads of each row, all of this KV head
  int queries;                     // rows * heads: the heads of one row after another
  int position;                    // of the last row
  int split, splits;
  int first_page, end_page;
  int in_step;  // positions up to the last row's that come with this step; 0 if they are not in this run
};

DEV int group_size() { return shape().num_heads / shape().num_kv_heads; }
DEV int head_blocks() { return divide_up(group_size(), kMaxHeads); }  // items of one KV head: more than one only above 16 heads
// Item number `index` of the step; false when there is none.
DEV bool find_item(const Block& b, int index, Item& item) {
  const int groups = shape().num_kv_heads * head_blocks();
  ROLLED for (int row = 0; row < num_rows(b); row += item.rows) {
    item.rows = b.shared->rows[row].together;
    const int splits = b.shared->rows[row].runs, items = groups * splits;
    if (index >= items) {
      index -= items;
      continue;
    }
    const u32 position = b.shared->rows[row].position;
    const int group = quotient(index, splits), per = pages_per_run(position), part = group % head_blocks();
    item.row = row;
    item.kv_head = group / head_blocks();
    item.first_head = item.kv_head * group_size() + part * kMaxHeads;
    item.heads = smaller(kMaxHeads, group_size() - part * kMaxHeads);
    item.queries = item.rows * item.heads;
    item.position = position + item.rows - 1;
    item.split = index - group * splits;
    item.splits = splits;
    item.first_page = item.split * per;
    item.end_page = smaller(item.first_page + per, position / shape().page_size + 1);
    const u32 step_first = b.shared->rows[b.shared->rows[row].first_row].position;
    item.in_step = item.end_page * shape().page_size > step_first ? item.position + 1 - step_first : 0;
    return true;
  }
  return false;
}

// Items are dealt from the last block on: the first ones have one more unit of the matrices around.
DEV int first_item(const Block& b) { return shape().num_blocks - 1 - b.index; }

DEV int scratch_stages() { return shape().scratch_warps ? 1 : 0; }  // of an item: behind its pages
DEV void stream_pages(Block& b, Producer& p) {
  if (!runs(Phase::kAttention)) return;
  Item item;
  for (int i = first_item(b); find_item(b, i, item); i += shape().num_blocks) {
    for (int number = item.end_page - 1; number >= item.first_page && !b.waiter.failed; number--)  // the newest first, see `attend`
      push_tile(b, p, kUnitPage, page_at(b, b.waiter.layer, find_page(b, item.row, number), item.kv_head), page_bytes());
    if (scratch_stages() && !b.waiter.failed) push_mark(b, p, kUnitScratch);
  }
}

// Where the block keeps an item, in place of the activations: bf16 q [head_dim / 32, queries, 32]; bf16 k and v [in_step, 2, head_dim]
// of the positions this step brings; float [CONSUMER_WARPS, queries, head_dim + 2] of what the warps merge. Where that is more than the
// activations take, the first scratch_warps of it are in a stage of the ring that is nobody else's meanwhile: only a few blocks have items,
// and all would have a stage less.
DEV char* item_query(const Block& b) { return activations(b); }
DEV char* item_fresh(const Block& b, const Item& item) { return item_query(b) + item.queries * (int)shape().head_dim * 2; }
DEV float* item_merge(const Block& b, const Item& item, int warp, int scratch) {
  const int each = item.queries * ((int)shape().head_dim + 2), away = shape().scratch_warps;
  float* here = (float*)(item_fresh(b, item) + item.in_step * (int)shape().head_dim * 4);
  return warp < away ? (float*)ring_stage(b, scratch) + warp * each : here + (warp - away) * each;
}

// All consumers fetch the item's q and the step's k and v, in one round trip.
DEV void gather_item(Block& b, const Item& item, u32 epoch) {
  const int quads = shape().head_dim / 4, of_row = item.heads * quads, query = item.rows * of_row;
  const int total = query + item.in_step * 2 * quads;
  gather<2>(
      b, epoch, divide_up(total, kConsumerThreads),
      [&](int i) {
        const int at = smaller(b.thread + i * kConsumerThreads, total - 1), fresh = at - query;
        const u64* q = own_words(b, shape().off_qkv + (item.row + at / of_row) * qkv_width() + item.first_head * (2 * quads));
        if (fresh < 0) return q + 2 * (at % of_row);
        const int row = b.shared->rows[item.row].first_row + fresh / (2 * quads);
        return (fresh / quads % 2 ? value_words(b, row, item.kv_head) : key_words(b, row, item.kv_head)) + 2 * (fresh % quads);
      },
      [&](int) { return b.params->rank; },
      [&](int i, u32 first, u32 second) {
        const int at = b.thread + i * kConsumerThreads, of = at / quads, d = at % quads * 4;
        if (at >= total) return;
        char* to = at < query ? item_query(b) + ((d / 32 * item.queries + of) * 32 + d % 32) * 2 : item_fresh(b, item) + (at - query) * 8;
        *(u64*)to = (u64)second << 32 | first;
      });
}

// One warp clears a chunk's values of positions beyond `valid`: a weight of zero does not erase what is not a number.
DEV void clear_tail(Block& b, char* chunk, int valid) {
  ROLLED for (int i = b.lane; i < (int)shape().head_dim * (kChunk / 4); i += LANES) {  // four positions of a dim at a time
    const int keep = valid - i % (kChunk / 4) * 4;
    if (keep < 4) *(u64*)(chunk + value_offset(0, 0) + 8 * i) &= keep <= 0 ? 0 : ((u64)1 << (16 * keep)) - 1;
  }
}
// One warp completes a chunk in the ring: k and v of this step's positions are not in the page yet.
DEV void complete_chunk(Block& b, const Item& item, char* chunk, int first_position, int valid) {
  const int dim = shape().head_dim, step_first = item.position + 1 - item.in_step;
  for (int p = step_first > first_position ? step_first - first_position : 0; p < valid; p++) {
    const char* fresh = item_fresh(b, item) + (first_position + p - step_first) * dim * 4;
    for (int d = 2 * b.lane; d < dim; d += 2 * LANES) {
      const u32 value = *(const u32*)(fresh + dim * 2 + d * 2);
      *(u32*)(chunk + key_offset(p, d)) = *(const u32*)(fresh + d * 2);
      *(u16*)(chunk + value_offset(p, d)) = (u16)value;
      *(u16*)(chunk + value_offset(p, d + 1)) = (u16)(value >> 16);
    }
  }
  warp_sync();
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

DEV bool attend(Block& b, const Item& item, u32 epoch) {
  const int dim = shape().head_dim, pairs = item.queries * dim / 2, position = item.position;
  const int page_chunks = shape().page_size / kChunk, last_chunk = position / kChunk;
  consumer_sync();  // the activations have been read: the item takes their place
  mark(b, Mark::kMet);
  // Pages are here before q is, and what can be done to them is done while q is on its way. A run of at most a chunk a warp that fits the
  // ring is awaited whole, so that each warp then goes straight to its chunk; of a longer one only the newest page, which comes first.
  const int run_pages = item.end_page - item.first_page;
  const int stages = run_pages + scratch_stages();
  const bool whole = run_pages * page_chunks <= kConsumerWarps && stages < (int)shape().ring_stages;
  const RingCursor begin = b.ring;
  bool here = wait_stage(b);
  if (here && last_chunk / page_chunks == item.end_page - 1 && last_chunk % kConsumerWarps == b.warp)
    clear_tail(b, ring_stage(b, b.ring.stage) + last_chunk % page_chunks * chunk_bytes(), position + 1 - last_chunk * kChunk);
  ROLLED for (int i = 1; i < stages && whole && here; i++) {
    b.ring = ahead(b.ring, 1);
    here = wait_stage(b);
  }
  b.ring = begin;
  gather_item(b, item, epoch);
  if (!all_well(b)) return false;
  mark(b, Mark::kInput, take_word_clocks(b));

  Flash flash;
  flash_zero(flash);
  int passed = 0;  // pages of the run that this warp has left behind
  auto leave_page = [&] {
    release_stage(b);
    if (++passed < stages) here = wait_stage(b);
  };
  // The warp's chunks of the run: the newest first, then each kConsumerWarps before it. No two are in one page.
  const int end_chunk = smaller(item.end_page * page_chunks, last_chunk + 1);
  int chunk = end_chunk - 1 - (int)((u32)(end_chunk - 1 - b.warp) % kConsumerWarps);
  ROLLED for (; here && chunk >= item.first_page * page_chunks; chunk -= kConsumerWarps) {
    const int number = item.end_page - 1 - chunk / page_chunks;  // of its page, in the ring's order
    ROLLED while (!whole && here && passed < number) leave_page();
    if (!here) break;
    const int first = chunk * kChunk;
    char* at = ring_stage(b, ahead(b.ring, number - passed).stage) + chunk % page_chunks * chunk_bytes();
    const bool completes = item.in_step && first + kChunk > position + 1 - item.in_step;
    if (completes) complete_chunk(b, item, at, first, smaller(kChunk, position + 1 - first));
    flash_chunk(flash, item_query(b), at, item.queries, item.heads, position + 2 - item.rows - first, shape().attn_scale);
    if (completes) fence_async_shared();  // this warp's plain writes to the stage, before a later bulk copy into it
  }
  ROLLED while (!whole && here && passed < run_pages) leave_page();
  const int scratch = ahead(b.ring, whole ? run_pages : 0).stage;
  if (here) flash_store(flash, item_merge(b, item, b.warp, scratch), item.queries);
  consumer_sync();
  for (int i = b.thread; i < pairs && !b.waiter.failed; i += kConsumerThreads) {
    const int query = i / (dim / 2), d = i % (dim / 2) * 2, row = item.row + query / item.heads,
              head = item.first_head + query % item.heads;
    float2 part[kConsumerWarps], scale[kConsumerWarps], v = {0.f, 0.f};  // scale: a warp's maximum and sum
    UNROLL for (int w = 0; w < kConsumerWarps; w++) {
      const float* of = item_merge(b, item, w, scratch) + query * (dim + 2);
      part[w] = *(const float2*)(of + d);
      scale[w] = *(const float2*)(of + dim);
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
      u64* to = own_words(b, split_words(row, head, item.split));
      store_words(to + d, float_bits(v.x), float_bits(v.y), epoch);
      if (d == 0) store_words(to + dim, float_bits(top), float_bits(sum), epoch);
    }
  }
  if (b.warp < (int)shape().scratch_warps) fence_async_shared();        // as above
  if (here) release_stages(b, whole ? stages : scratch_stages());  // only now: everybody waits for the words above
  return true;
}

// Merges the runs of long contexts: a lane takes a run of a pair of outputs, so a warp merges as many pairs as it has lanes for. All rows'
// pairs are dealt to the warps of all blocks, and all is done in one hop.
DEV void merge_splits(Block& b, u32 epoch) {
  constexpr int kPerLane = kMaxSplits / LANES, kLaneBits = LANES == 32 ? 5 : 0;
  const int dim = shape().head_dim, pairs = shape().num_heads * dim / 2;
  int turn = b.index + shape().num_blocks * b.warp, row = 0;  // of the warp, among the row's
  ROLLED while (row < num_rows(b)) {
    const int splits = b.shared->rows[row].runs;
    int bits = 0;  // 1 << bits lanes take a pair
    while (1 << bits < splits && 1 << bits < LANES) bits++;
    const int lanes = 1 << bits, at_once = LANES >> bits, turns = splits > 1 ? (pairs + at_once - 1) >> (kLaneBits - bits) : 0;
    if (turn >= turns) {
      turn -= turns, row++;
      continue;
    }
    const int mine = turn * at_once + (b.lane >> bits), pair = smaller(mine, pairs - 1), head = pair / (dim / 2), d = pair % (dim / 2) * 2;
    float top = kMinusInfinity, sum = 0.f;
    float2 part[kPerLane], scale[kPerLane], v = {0.f, 0.f};
    UNROLL for (int j = 0; j < kPerLane; j++) {
      part[j] = {0.f, 0.f}, scale[j] = {kMinusInfinity, 0.f};
      const int split = (b.lane & (lanes - 1)) + j * lanes;
      if (j * lanes >= splits) continue;
      const u64* from = own_words(b, split_words(row, head, smaller(split, splits - 1)));
      u32 words[2][2];
      wait_words<2, true>(
          b.waiter, Wait::kWords, false, epoch, 2, [&](int i) { return from + (i ? dim : d); }, [&](int) { return b.params->rank; },
          words);
      if (split >= splits) continue;
      part[j] = {bits_float(words[0][0]), bits_float(words[0][1])};
      scale[j] = {bits_float(words[1][0]), bits_float(words[1][1])};
      top = fmaxf(top, scale[j].x);
    }
    top = lanes_max(top, lanes);
    UNROLL for (int j = 0; j < kPerLane; j++) {
      const float weight = scale[j].y > 0.f ? fast_exp(scale[j].x - top) : 0.f;
      v.x += weight * part[j].x;
      v.y += weight * part[j].y;
      sum += weight * scale[j].y;
    }
    v.x = lanes_sum(v.x, lanes);
    v.y = lanes_sum(v.y, lanes);
    sum = lanes_sum(sum, lanes);
    if ((b.lane & (lanes - 1)) == 0 && mine < pairs && !b.waiter.failed) put_output(b, row, head, d, {fast_divide(v.x, sum), fast_divide(v.y, sum)});
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
  for (int i = first_item(b); find_item(b, i, item); i += shape().num_blocks) {
    if (!attend(b, item, epoch)) return false;
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
  const u32 epoch = layer_epoch(b.step, b.waiter.layer);
  for (int i = b.index; i < items; i += shape().num_blocks) {
    const int row = i / kv_heads, kv_head = i % kv_heads;
    const u32 in_page = b.shared->rows[row].position % shape().page_size;
    char* chunk = page_at(b, b.waiter.layer, b.shared->rows[row].page, kv_head) + in_page / kChunk * chunk_bytes();
    const int p = in_page % kChunk, total = 2 * quads;
    gather<2>(
        b, epoch, divide_up(total, kConsumerThreads),
        [&](int j) {
          const int at = smaller(b.thread + j * kConsumerThreads, total - 1);
          return (at < quads ? key_words(b, row, kv_head) : value_words(b, row, kv_head)) + at % quads * 2;
        },
        [&](int) { return b.params->rank; },
        [&](int j, u32 first, u32 second) {
          const int at = b.thread + j * kConsumerThreads, d = at % quads * 4;
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
