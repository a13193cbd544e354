// Which block attends to what. Attention's items are (rows, KV head, one run of pages or two); a step deals them once, for all its layers.
#pragma once
#include "kv.cuh"

namespace imex {

constexpr int kMaxHeads = 16;  // queries of one item: twice the tensor core's n = 8
constexpr u32 kItemCost = 8;   // what an item takes beside its chunks, in chunks

DEV int group_size() { return shape().num_heads / shape().num_kv_heads; }
DEV int head_blocks() { return divide_up(group_size(), kMaxHeads); }  // items of one KV head: more than one only above 16 heads
DEV u32 item_groups() { return shape().num_kv_heads * head_blocks(); }
DEV u32 runs_at_once(const Row& row) { return shape().max_rows == 1 ? 1 : row.at_once; }
DEV u32 items_of_group(const Row& row) { return runs_at_once(row) == 2 ? divide_up(row.runs, 2) : row.runs; }
DEV u32 items_of(const Row& row) { return item_groups() * items_of_group(row); }
DEV u32 cost_of_item(const Row& row) {
  return kItemCost + runs_at_once(row) * pages_per_run(row.position) * (shape().page_size / kChunk);
}
// Two runs of half as many chunks as there are warps make an item that leaves no warp idle: an even one is in the chunks of the lower warps, the
// one after it in those of the upper.
DEV bool couples(const Row& row) {
  return row.runs > 1 && pages_per_run(row.position) * (shape().page_size / kChunk) * 2 == kConsumerWarps;
}

// Calls use(row) for the first of the rows that are attended to together.
template <class Use>
DEV void each_together(Block& b, Use use) {
  ROLLED for (int row = 0; row < num_rows(b); row += shape().attention_rows > 1 ? b.shared->rows[row].together : 1) use(b.shared->rows[row]);
}
// The first item that begins at this cost, counted over all items in order, or later.
DEV u32 item_at_cost(Block& b, u32 cost) {
  u32 passed = 0, before = 0, found = ~0u;
  each_together(b, [&](const Row& row) {
    const u32 items = items_of(row), each = cost_of_item(row), skipped = cost > passed ? divide_up(cost - passed, each) : 0;
    if (found == ~0u && skipped < items) found = before + skipped;
    passed += items * each;
    before += items;
  });
  return found == ~0u ? before : found;
}
// One thread, once the step's rows are known. As long as there are blocks enough each has one run: the last blocks, since the first ones have one
// more unit of the matrices around. Where there are not, neighbouring items are one block's, which then has most of its queries here already;
// so many of them as their cost says, since contexts differ.
DEV void deal_items(Block& b) {
  Shared& s = *b.shared;
  const u32 blocks = shape().num_blocks, number = blocks - 1 - b.index;
  u32 runs = 0, cost = 0;
  each_together(b, [&](Row& row) {
    row.at_once = 1;
    runs += items_of(row);
  });
  s.first_item = smaller(number, runs);
  s.end_item = smaller(number + 1, runs);
  if (runs <= blocks) return;
  each_together(b, [&](Row& row) {
    row.at_once = couples(row) ? 2 : 1;
    cost += items_of(row) * cost_of_item(row);
  });
  s.first_item = item_at_cost(b, divide_up(number * cost, blocks));
  s.end_item = item_at_cost(b, divide_up((number + 1) * cost, blocks));
}

}  // namespace imex
