// Every primitive on its own, against NumPy (test_primitives.py), and the smallest kernel a device can launch (test_device.py).
// The simulator cannot see wrong PTX; this file can. Every wait ends: by the deadline in RankParams.
#include "faults.cuh"

using namespace imex;

// The head of shared memory is struct Shared, where a wait that gives up leaves its note; tests use what follows.
DEV char* scratch() { return shared_memory() + kSharedHeaderBytes; }
DEV Waiter waiter_of(const RankParams* params, u32 layer, Phase phase) {
  Waiter w{};
  w.params = params;
  w.layer = layer;
  w.phase = phase;
  return w;
}
DEV int thread_index() { return warp_index() * LANES + lane_index(); }
DEV void copy_in(char* shared, const char* global, int bytes) {
  for (int i = thread_index(); i < bytes / 4; i += kThreads) ((u32*)shared)[i] = ((const u32*)global)[i];
}

// ---------------------------------------------------------------------------------------------- numbers
// in: float [n, 2]; pairs: u32 [n]; back: float [n, 2] after rounding; exps, roots, logs: float [n] of the first of each pair
KERNEL numbers(const float* in, u32* pairs, float* back, float* exps, float* roots, float* logs, int n) {
  for (int i = thread_index(); i < n; i += kThreads) {
    const u32 pair = pack_bf16(in[2 * i], in[2 * i + 1]);
    pairs[i] = pair;
    back[2 * i] = bf16_low(pair);
    back[2 * i + 1] = bf16_high(pair);
    exps[i] = fast_exp(in[2 * i]);
    roots[i] = reciprocal_sqrt(in[2 * i]);
    logs[i] = natural_log(in[2 * i]);
  }
}

// in: float, keys: u64 [warps, 32]; sums: float, tops, totals: u64 [warps, 32]: what each lane was told
KERNEL warps(const float* in, const u64* keys, float* sums, u64* tops, u64* totals) {
  const int i = thread_index();
  sums[i] = warp_sum(in[i]);
  tops[i] = warp_max(keys[i]);
  totals[i] = warp_sum(keys[i]);
}

// The same over groups of `lanes` lanes; sums of integers over the warp, and whether all of them are odd: [warps, 32] each.
KERNEL groups(const float* in, const u32* numbers, float* sums, float* maxima, u32* totals, u32* odd, int lanes) {
  const int i = thread_index();
  sums[i] = lanes_sum(in[i], lanes);
  maxima[i] = lanes_max(in[i], lanes);
  totals[i] = warp_sum(numbers[i]);
  odd[i] = warp_all(numbers[i] & 1);
}

// above, below, quotients: float [count]
KERNEL quotients(const float* above, const float* below, float* quotients, int count) {
  for (int i = thread_index(); i < count; i += kThreads) quotients[i] = fast_divide(above[i], below[i]);
}

// above, below, quotients: int [count]
KERNEL whole_quotients(const int* above, const int* below, int* quotients, int count) {
  for (int i = thread_index(); i < count; i += kThreads) quotients[i] = quotient(above[i], below[i]);
}

// flags: u32 [rounds, consumer threads]; any: u32 [rounds, consumer threads]
KERNEL votes(const u32* flags, u32* any, int rounds) {
  if (warp_index() >= kConsumerWarps) return;
  for (int r = 0; r < rounds; r++) {
    const int i = r * kConsumerWarps * LANES + thread_index();
    any[i] = consumer_any(flags[i] != 0);
  }
}

// counter, flag: u32; tickets: u32 [threads]; firsts: how many threads found the flag at 0
KERNEL atomics(u32* counter, u32* flag, u32* tickets, u32* firsts) {
  tickets[thread_index()] = atomic_add_gpu(counter, 1);
  if (atomic_exchange_sys(flag, 1) == 0) atomic_add_gpu(firsts, 1);
}

// ---------------------------------------------------------------------------------------------- tensor cores
// tile: bf16 [chunks, 8, 32]; x: bf16 [chunks, max_rows, 32]; part: float [consumer warps, max_rows, 8], set before
KERNEL accumulate(const char* tile, const char* x, float* part, int chunks, int rows) {
  char* memory = scratch();
  char* activation = memory + chunks * 512;
  const int values = kConsumerWarps * shape().max_rows * kUnitRows;
  float* sums = (float*)(activation + chunks * shape().max_rows * 64);
  copy_in(memory, tile, chunks * 512);
  copy_in(activation, x, chunks * shape().max_rows * 64);
  copy_in((char*)sums, (const char*)part, values * 4);
  block_sync();
  if (warp_index() < kConsumerWarps) {
    Accum acc;
    accum_zero(acc);
    Share share;
    constexpr int kFar = 1 << 20;  // too wide to be held: the kernel's own K is not this test's
    Operand<kFar> operand;
    share_weights(share, memory, activation, 0, chunks, warp_index());
    share_activations(share, operand, activation, 0, chunks, warp_index(), rows);
    accum_multiply(acc, share, operand, 0, rows);
    accum_store(acc, sums + warp_index() * shape().max_rows * kUnitRows, rows);
  }
  block_sync();
  for (int i = thread_index(); i < values; i += kThreads) part[i] = sums[i];
}

// q: bf16 [head_dim / 32, queries, 32]; chunks: [count] of K and V as packed; merge: float [warps, queries, merge_width()]
// Each of the first `workers` warps takes every workers-th chunk; `valid` positions in all, for each `heads` queries one more.
KERNEL attend(const char* q, const char* chunks, float* merge, int queries, int heads, int count, int valid, int workers,
              float scale) {
  const int q_bytes = shape().head_dim * queries * 2, chunk_bytes = shape().head_dim * kChunk * 4;
  const int stride = queries * merge_width();
  char* memory = scratch();
  float* merged = (float*)(memory + count * chunk_bytes + q_bytes);
  copy_in(memory, chunks, count * chunk_bytes);
  copy_in(memory + count * chunk_bytes, q, q_bytes);
  block_sync();
  if (warp_index() < workers) {
    Flash f;
    if (warp_index() >= count) flash_zero(f);
    for (int c = warp_index(); c < count; c += workers) {
      const char *of = memory + count * chunk_bytes, *chunk = memory + c * chunk_bytes;
      if (c < workers) flash_chunk<true>(f, of, chunk, queries, heads, valid - c * kChunk, scale);
      else flash_chunk<false>(f, of, chunk, queries, heads, valid - c * kChunk, scale);
    }
    flash_store(f, merged + warp_index() * stride, queries);
  }
  block_sync();
  for (int i = thread_index(); i < workers * stride; i += kThreads) merge[i] = merged[i];
}

// bf16 pairs: one, other, product [count].
KERNEL products(const u32* one, const u32* other, u32* product, int count) {
  for (int i = thread_index(); i < count; i += kThreads) product[i] = multiply_bf16(one[i], other[i]);
}

// Plain loads and stores: from, to: float4 [count].
KERNEL plain(const float4* from, float4* to, int count) {
  for (int i = thread_index(); i < count; i += kThreads) {
    const float4 v = load_global(from + i);
    store_global((float2*)(to + i), make_float2(v.x, v.y));
    store_global((float2*)(to + i) + 1, make_float2(v.z, v.w));
  }
}

// ---------------------------------------------------------------------------------------------- words
DEV u32 payload_of(u32 round, u32 index) { return round * 2654435761u ^ index * 40503u; }

// Two blocks play ping-pong: there, back: u64 [128]. Each lane owns four words: a pair stored together, and two stored singly.
KERNEL words(const RankParams* params, u64* there, u64* back, u32* errors, int rounds) {
  Waiter w = waiter_of(params, 0, Phase::kQkv);
  if (warp_index() != 0) return;
  const int lane = lane_index(), first = grid_block() == 0;
  u64* mine = first ? there : back;
  const u64* other = first ? back : there;
  for (u32 round = 1; round <= (u32)rounds && !w.failed; round++) {
    u32 got[2][2];
    if (!first)
      wait_words<2>(
          w, Wait::kWords, false, round, 2, [&](int i) { return other + 2 * lane + 64 * i; }, [](int) { return 0u; }, got);
    store_words(mine + 2 * lane, payload_of(round, 2 * lane), payload_of(round, 2 * lane + 1), round);
    store_word(mine + 2 * lane + 64, payload_of(round, 2 * lane + 64), round);
    store_word(mine + 2 * lane + 65, payload_of(round, 2 * lane + 65), round);
    if (first)
      wait_words<2>(
          w, Wait::kWords, false, round, 2, [&](int i) { return other + 2 * lane + 64 * i; }, [](int) { return 0u; }, got);
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 2; j++)
        if (!w.failed && got[i][j] != payload_of(round, 2 * lane + 64 * i + j)) atomic_add_gpu(errors, 1);
    // A lane overwrites its words in the next round; the other block's same lane has read them, or it would not have answered.
  }
  if (w.failed) atomic_add_gpu(errors, 1u << 16);
}

// Lane p of block 0 asks block p, whose answer takes it p * 2 µs; trips: u32 [blocks], the shortest of each lane in clocks. Lanes poll
// together, but each must see its own answer's time. words: u64 [2, blocks, 2].
KERNEL clocks(const RankParams* params, u64* words, u32* trips, u32* errors, int blocks, int rounds) {
  Waiter w = waiter_of(params, 0, Phase::kQkv);
  const int block = grid_block(), partner = block ? block : lane_index();
  if (warp_index() != 0 || partner == 0 || partner >= blocks || (block && lane_index())) return;
  u64 *question = words + 2 * partner, *answer = words + 2 * (blocks + partner);
  u32 shortest = ~0u, got;
  for (u32 round = 1; round <= (u32)rounds && !w.failed; round++) {
    if (block) {
      const u32 clock = wait_word_clock(w, round, question, 0, got);
      stand_still(partner * 2000);
      store_words(answer, clock, 0, round);
      if (got != payload_of(round, partner)) atomic_add_gpu(errors, 1);
    } else {
      const u32 began = clock_low();
      store_words(question, payload_of(round, partner), 0, round);
      const u32 trip = wait_word_clock(w, round, answer, 0, got) - began;
      shortest = trip < shortest ? trip : shortest;
    }
  }
  if (!block) trips[partner] = shortest;
  if (w.failed) atomic_add_gpu(errors, 1u << 16);
}

// Waits for words [0, 1] with `epoch`; result: {failed, payload, payload, microseconds}
KERNEL wait_for(const RankParams* params, const u64* words, u32* result, u32 epoch) {
  if (thread_index() != 0) return;
  Block b{};
  b.params = params;
  b.shared = (Shared*)shared_memory();
  b.shared->fault.set = 0;
  b.index = 3;
  Waiter w = waiter_of(params, 5, Phase::kDownProj);
  u32 got[1][2];
  const u64 began = timer_ns();
  wait_words<1>(w, Wait::kWords, false, epoch, 1, [&](int) { return words; }, [](int) { return 6u; }, got);
  report_fault(b);
  result[0] = w.failed;
  result[1] = got[0][0];
  result[2] = got[0][1];
  result[3] = (u32)((timer_ns() - began) / 1000);
}

// ---------------------------------------------------------------------------------------------- bulk copies
// tiles: u32 [count, 4096], the last one `last_bytes` long; sums: u32 [consumer warps]. A ring of `kStages` as the kernel has it.
KERNEL ring(const RankParams* params, const char* tiles, u32* sums, int count, u32 last_bytes) {
  constexpr int kStages = 4;
  u64* full = (u64*)scratch();
  u64* empty = full + kStages;
  char* stages = scratch() + 1024;
  Waiter w = waiter_of(params, 0, Phase::kQkv);
  if (thread_index() == 0) {
    for (int i = 0; i < kStages; i++) mbar_init(full + i, 1), mbar_init(empty + i, kConsumerWarps);
    mbar_init_done();
  }
  block_sync();
  const int stage_words = kStageBytes / 4;
  if (warp_index() == kConsumerWarps && lane_index() == 0) {
    for (int k = 0; k < count; k++) {
      const int stage = k % kStages;
      const u32 bytes = k == count - 1 ? last_bytes : kStageBytes;
      if (k >= kStages) mbar_wait(w, Wait::kStage, false, Pending{empty + stage, (u32)((k / kStages - 1) & 1)});
      if (w.failed) break;
      mbar_arrive_expect(full + stage, bytes);
      bulk_copy(stages + stage * kStageBytes, tiles + (u64)k * kStageBytes, bytes, full + stage);
    }
  } else if (warp_index() < kConsumerWarps) {
    u32 sum = 0;
    for (int k = 0; k < count; k++) {
      const int stage = k % kStages, live = (k == count - 1 ? (int)last_bytes : kStageBytes) / 4;
      mbar_wait(w, Wait::kTile, false, Pending{full + stage, (u32)((k / kStages) & 1)});
      if (w.failed) break;
      for (int i = thread_index(); i < stage_words; i += kConsumerWarps * LANES)
        if (i < live) sum += ((const u32*)(stages + stage * kStageBytes))[i] * (u32)(k + 1);
      warp_sync();
      if (lane_index() == 0) mbar_arrive(empty + stage);
    }
    if (w.failed) sum = 0;
    atomic_add_gpu(sums + warp_index(), sum);
  }
}

// The KV rule: block 0 writes a page with plain stores, block 1 reads it with a bulk copy; words carry the news both ways.
// page: u32 [4096]; words: u64 [2, 2], 16-byte aligned
KERNEL kv_rule(const RankParams* params, u32* page, u64* news, u32* errors, int rounds) {
  u64* full = (u64*)scratch();
  char* stage = scratch() + 1024;
  Waiter w = waiter_of(params, 0, Phase::kAttention);
  if (thread_index() == 0) mbar_init(full, 1), mbar_init_done();
  block_sync();
  for (u32 round = 1; round <= (u32)rounds; round++) {
    u32 got[1][2];
    if (grid_block() == 0) {
      for (int i = thread_index(); i < kStageBytes / 4; i += kThreads) store_global(page + i, payload_of(round, i));
      block_sync();
      if (thread_index() == 0) {
        fence_async_global();
        fence_gpu();
        store_words(news, round, round, round);
      }
      wait_words<1>(w, Wait::kWords, false, round, 1, [&](int) { return news + 2; }, [](int) { return 0u; }, got);
    } else {
      if (thread_index() == 0) {
        wait_words<1>(w, Wait::kWords, false, round, 1, [&](int) { return (const u64*)news; }, [](int) { return 0u; }, got);
        if (!w.failed) {
          fence_gpu();
          fence_async_global();
          mbar_arrive_expect(full, kStageBytes);
          bulk_copy(stage, page, kStageBytes, full);
        }
      }
      mbar_wait(w, Wait::kTile, false, Pending{full, (u32)((round - 1) & 1)});
      u32 wrong = 0;
      for (int i = thread_index(); i < kStageBytes / 4; i += kThreads) wrong += ((const u32*)stage)[i] != payload_of(round, i);
      if (wrong) atomic_add_gpu(errors, wrong);
      block_sync();
      if (thread_index() == 0) {
        fence_async_shared();
        store_words(news + 2, round, round, round);
      }
    }
    if (w.failed) break;
  }
  if (w.failed) atomic_add_gpu(errors + 1, 1);
}

// ---------------------------------------------------------------------------------------------- a launch
// Every block tells what it was given. Rank 0's block 0 then echoes: mailbox[0] is the bell, [1] asks it to end, [16] the answer.
KERNEL echo(const GRID_CONSTANT LaunchParams launch) {
  const int rank = grid_block() / (int)shape().num_blocks, block = grid_block() % (int)shape().num_blocks;
  const RankParams& me = launch.ranks[rank];
  char* memory = shared_memory();
  if (thread_index() != 0) return;
  memory[shape().smem_bytes - 1] = (char)block;  // the last byte of what was asked for is ours
  u32* told = (u32*)me.tap + block * 4;
  store_relaxed_sys(told, me.rank);
  store_relaxed_sys(told + 1, launch.num_ranks);
  store_relaxed_sys(told + 2, memory[shape().smem_bytes - 1] & 0xff);
  store_relaxed_sys(told + 3, me.deadline_us);
  if (rank != 0 || block != 0) return;
  u32* mail = (u32*)me.mailbox;
  const u64 began = timer_ns();
  u32 seen = 0;
  while (!load_relaxed_sys(mail + 1) && (timer_ns() - began) / 1000 < me.deadline_us) {
    const u32 bell = load_relaxed_sys(mail);
    if (bell != seen) store_release_sys(mail + 16, seen = bell);
    mailbox_pause();
  }
}

// Stores `count` words to a peer's memory with the store the exchange uses: how ranks verify a mapping before they trust it.
KERNEL push(const GRID_CONSTANT LaunchParams launch) {
  const RankParams& me = launch.ranks[0];
  if (grid_block() != 0) return;
  u64* to = (u64*)me.peers[me.rank ^ 1];
  for (int i = thread_index(); i < 1024; i += kThreads)
    store_words(to + 2 * i, payload_of(me.rank, 2 * i), payload_of(me.rank, 2 * i + 1), 9);
}
