// KV pages: where they are, the order inside, and the one fence on the token path, which is the sets' too (bare.cuh).
//
// A page belongs to one KV head of one layer: page_size positions in chunks of 32 (chunk.cuh).
//
// The KV rule. A step's k and v travel to its own attention as words; pages are written by plain stores (append_kv) and read in
// later steps by bulk copies, the async proxy, of other SMs. Words order nothing but themselves, so:
//   writer: all its stores, consumer barrier, fence.proxy.async + fence.acq_rel.gpu (fence_step), then its word of `sample`;
//   reader: has that word of every block, fence.acq_rel.gpu, mbarrier to its producer, fence.proxy.async, then the copy.
// Weights never wait for this: the producer meets it at the first attention of a step, with layer 0's QKV already in the ring.
// A page is never written while a copy of it is in flight: append_kv runs after o_proj's exchange, which every block enters only
// after its attention of the layer, and its copies, are done (condition C, exchange.cuh).
#pragma once
#include "block.cuh"

namespace imex {

DEV int chunk_bytes() { return kChunk * (int)shape().head_dim * 4; }
DEV int page_bytes() { return shape().page_size * (int)shape().head_dim * 4; }
DEV char* page_at(const Block& b, u32 layer, u32 page, u32 kv_head) {
  return (char*)b.params->kv + (((u64)layer * shape().num_pages + page) * shape().num_kv_heads + kv_head) * page_bytes();
}

// How a context is cut into runs that blocks attend to on their own: by the row's position alone, so that its bits do not depend on what
// else is in the step.
constexpr int kSoloChunks = 8;    // contexts up to here are one run: one chunk a warp, and no second merge
constexpr int kMinRunChunks = 4;  // longer ones are cut into runs of at least so many chunks
DEV int pages_per_run(u32 position) {
  const int page_chunks = shape().page_size / kChunk, pages = position / shape().page_size + 1;
  if ((int)position / kChunk < kSoloChunks) return pages;
  return larger(divide_up(kMinRunChunks, page_chunks), divide_up(pages, shape().max_splits));
}
DEV int num_runs(u32 position) { return divide_up(position / shape().page_size + 1, pages_per_run(position)); }

// The words of a row's k (or v) of one KV head in the QKV buffer: bf16 pairs [head_dim / 2].
DEV u32 qkv_width() { return (shape().num_heads + 2 * shape().num_kv_heads) * shape().head_dim / 2; }
DEV const u64* key_words(const Block& b, int row, int kv_head) {
  return own_words(b, shape().off_qkv + row * qkv_width() + (shape().num_heads + kv_head) * (shape().head_dim / 2));
}
DEV const u64* value_words(const Block& b, int row, int kv_head) {
  return key_words(b, row, kv_head) + shape().num_kv_heads * (shape().head_dim / 2);
}

// u32 [num_slots, pages_per_slot] in a rank's symmetric memory: which page holds which part of a slot's sequence. Rank 0's mailbox
// writes it when a request is admitted (write_page_table, mailbox.cuh, says why readers see it).
DEV u32* page_table(const RankParams* p, u32 rank) { return (u32*)((u64*)p->peers[rank] + shape().off_page_table); }

// The physical page of a slot's page number `number`, as row `r` needs it: from the plan, where the step has a row of that page, which
// saves short contexts a round trip to memory, else from the table.
DEV u32 find_page(const Block& b, int r, u32 number) {
  const Row& row = b.shared->rows[r];
  ROLLED for (int i = r; i >= (int)row.first_row; i--)
    if (b.shared->rows[i].position / shape().page_size == number) return b.shared->rows[i].page;
  return load_global(page_table(b.params, b.params->rank) + row.slot * shape().pages_per_slot + number);
}

}  // namespace imex
