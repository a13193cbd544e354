// Weak memory. Stores wait in a buffer of their block and reach memory late and out of order (only per address in order); a fence lets
// those land that it covers. Loads that no fence orders may be stale, and so may bulk copies, which read through the async proxy:
//
//   plain store -> [block's buffer] -> memory, logged with the value it replaced
//   generic load:  fresh for stores up to the fiber's `view`, the last fence that it made or learnt of by a barrier or mbarrier; for a
//                  store of another rank both fences, the writer's and the reader's, must be fence_sys
//   bulk copy:     fresh for stores up to `view_async` whose block fenced the proxy; else possibly the value from before (KV rule)
//   host's stores: words of the rings are fresh, what they speak of (the arena) only after a fence_sys or fence_acquire_sys
//   shared memory: a copy into bytes that plain stores have changed since the last one needs a fence_async_shared between the two
#include <stdlib.h>

#include "machine.h"

namespace imex {
namespace sim {

struct PendingStore {
  char* to;
  u64 value[2];
  u32 size;
  bool plain;    // else a word or a relaxed store, which is never stale once it has landed
  bool shared;   // a barrier has made it the whole block's
  bool proxied;  // a fence_async_global followed it
  Fiber* owner;
};

namespace {

struct Landed {  // a plain store in memory
  char* to;
  u64 old;
  u32 size;
  bool shared;
  Fiber* owner;
  u64 sequence;
  u64 proxied;  // sequence at which the async proxy sees it, ~0: not yet
  u64 sys;      // sequence at which other ranks see it, ~0: not yet
};
struct Copy {
  char* to;
  const char* from;
  u32 left;
  u64* bar;
  Block* block;
  u64 view;
};

constexpr u32 kMaxCopies = 1u << 16, kLog = 2048;
constexpr u32 kVeryLong =
    1u << 14;  // chances: where somebody polls all the time, "until nothing else can run" would be for ever
PendingStore* pending_memory;
Landed* landed;  // [kLog], a ring: what is older than it is seen by everybody
u64 num_landed;
Copy* copies;
u32 num_copies, num_pending;
char* host;         // the arena, as of the mailbox's last fence or later
const char* arena;  // [arena_bytes], the host's own
u64 arena_bytes;
char fenced_of_rank[kMaxRanks], fenced_of_all;  // what ThreadSanitizer knows fences by

bool overlap(const char* a, u64 a_size, const char* b, u64 b_size) { return a < b + b_size && b < a + a_size; }
bool covered(Fiber* owner, bool shared) {
  return owner == machine.current || (shared && owner->block == machine.current->block);
}
u64 read_sized(const char* p, u32 size) {
  u64 v = 0;
  memcpy(&v, p, size);
  return v;
}
void write_sized(char* p, u64 v, u32 size) {
  switch (size) {
    case 8: return __atomic_store_n((u64*)p, v, __ATOMIC_RELAXED);
    case 4: return __atomic_store_n((u32*)p, (u32)v, __ATOMIC_RELAXED);
    default: return __atomic_store_n((u16*)p, (u16)v, __ATOMIC_RELAXED);
  }
}

void land(Block* b, u32 i) {
  for (u32 j = 0; j < i; j++)  // stores to one address stay in order
    if (overlap(b->pending[j].to, b->pending[j].size, b->pending[i].to, b->pending[i].size)) i = j;
  const PendingStore s = b->pending[i];
  b->num_pending--, num_pending--;
  memmove(b->pending + i, b->pending + i + 1, (b->num_pending - i) * sizeof s);
  machine.drains++;
  if (s.plain) {
    const u64 sequence = ++machine.sequence;
    landed[num_landed++ % kLog] =
        Landed{s.to, read_sized(s.to, s.size), s.size, s.shared, s.owner, sequence, s.proxied ? sequence : ~0ull, ~0ull};
  }
  if (s.size < 16) return write_sized(s.to, s.value[0], s.size), wake_pair(s.to);
  write_sized(s.to, s.value[0], 8);
  write_sized(s.to + 8, s.value[1], 8);
  wake_pair(s.to);
}

void delay(const PendingStore& s) {
  Block* b = s.owner->block;
  if (b->num_pending == kMaxPending) land(b, 0);
  b->pending[b->num_pending++] = s;
  num_pending++;
  s.owner->private_stores++;
  if ((s.plain ? b->hold_plain : b->hold) == 1) land(b, b->num_pending - 1);
}

// Puts back, in the `size` bytes at `copy` read from `from`, what stores not seen for sure replaced; newest first, and once a store is
// seen all before it are.
void make_stale(char* copy, const char* from, u64 size, View view, bool async, Block* block) {
  if (!block->stale) return;
  const u64 oldest = num_landed > kLog ? num_landed - kLog : 0;
  for (u64 i = num_landed; i-- > oldest;) {
    const Landed& s = landed[i % kLog];
    if (!overlap(s.to, s.size, from, size)) continue;
    const Block* writer = s.owner->block;
    const bool certain =
        async ? s.proxied <= view.gpu
              : writer == block || (writer->rank_idx == block->rank_idx ? s.sequence <= view.gpu : s.sys <= view.sys);
    if (certain || (block->stale == 1 && (random_u64() & 1))) return;
    for (u32 k = 0; k < s.size; k++)
      if (s.to + k >= from && s.to + k < from + size) copy[s.to + k - from] = (char)(s.old >> 8 * k);
  }
}

// The async proxy's own thread, as ThreadSanitizer sees it: after the issue, before the mbarrier's completion.
void move_bytes(char* to, const char* from, u32 bytes, u64* bar, Block* block, u64 view) {
  void* self = tsan_self();
  tsan_switch(block->tsan_async);
  tsan_acquire((char*)bar + 2);
  tsan_read(from, bytes);
  tsan_write(to, bytes);
  memcpy(to, from, bytes);
  if (machine.weak) make_stale(to, from, bytes, View{view, 0}, true, block);
  if (block->landed_shared) memcpy(block->landed_shared + (to - block->shared), to, bytes);
  machine.copies++;
  mbarrier_complete(block, bar, bytes);
  tsan_switch(self);
}

void land_copy(u32 i, u32 bytes) {
  Copy& c = copies[i];
  const Copy part = c;
  c.to += bytes, c.from += bytes, c.left -= bytes;
  if (!c.left) copies[i] = copies[--num_copies];
  move_bytes(part.to, part.from, bytes, part.bar, part.block, part.view);
}

bool may_land(u32 hold, bool must) { return must || hold == 1 || one_in(hold ? hold : kVeryLong); }

// Lets a store of the block land if one may; of all that it holds only if it `must`.
bool land_one(Block* b, bool must) {
  u32 i = random_u64() % b->num_pending;
  for (u32 n = 0; n < (must ? b->num_pending : 1); n++, i = (i + 1) % b->num_pending) {
    const bool plain = b->pending[i].plain;
    if (plain && !b->hold_plain) continue;
    if (may_land(plain ? b->hold_plain : b->hold, must)) return land(b, i), true;
  }
  return false;
}

void host_setup() {
  arena_bytes = 0;
  if (!machine.config.host_bytes) return;
  for (u32 r = 0; r < machine.params.num_ranks; r++)
    if (machine.params.ranks[r].mailbox) arena = (const char*)machine.params.ranks[r].mailbox + sizeof(Mailbox);
  arena_bytes = arena && machine.config.host_bytes > sizeof(Mailbox) ? machine.config.host_bytes - sizeof(Mailbox) : 0;
}

}  // namespace

bool memory_setup() {
  num_landed = num_copies = num_pending = 0;
  arena = nullptr;
  host_setup();
  if (arena_bytes && !(host = (char*)malloc(arena_bytes))) return false;
  if (arena_bytes) memcpy(host, arena, arena_bytes);
  copies = machine.config.delay_copies ? (Copy*)malloc(kMaxCopies * sizeof(Copy)) : nullptr;
  if (machine.config.delay_copies && !copies) return false;
  if (!machine.weak) return true;
  landed = (Landed*)malloc(kLog * sizeof(Landed));
  pending_memory = (PendingStore*)malloc((size_t)machine.num_blocks * kMaxPending * sizeof(PendingStore));
  if (!landed || !pending_memory) return false;
  for (u32 i = 0; i < machine.num_blocks; i++) machine.blocks[i].pending = pending_memory + (size_t)i * kMaxPending;
  return true;
}

void memory_teardown() {
  // What a finished launch still holds has to be in memory when it returns.
  for (u32 i = 0; i < machine.num_blocks && machine.weak && machine.status == kOk; i++)
    while (machine.blocks[i].num_pending) land(&machine.blocks[i], 0);
  free(copies), free(landed), free(pending_memory), free(host);
  copies = nullptr, landed = nullptr, pending_memory = nullptr, host = nullptr;
}

void delay_words(u64* p, u64 first, u64 second, int count) {
  Fiber* f = machine.current;
  PendingStore s{(char*)p, {first, second}, 8u * count, false, false, false, f};
  if (count == 1 || !machine.config.split_words) return delay(s);
  s.size = 8;
  PendingStore right = s;
  right.to += 8, right.value[0] = second;
  const bool swap = random_u64() & 1;
  delay(swap ? right : s);
  delay(swap ? s : right);
}

void delay_plain(void* p, u64 value, u32 size) {
  delay(PendingStore{(char*)p, {value, 0}, size, true, false, false, machine.current});
}

void delay_relaxed(u32* p, u32 value) { delay(PendingStore{(char*)p, {value, 0}, 4, false, false, false, machine.current}); }

u32 load_delayed(const u32* p) {
  Fiber* f = machine.current;
  char v[4];
  memcpy(v, p, 4);
  make_stale(v, (const char*)p, 4, f->view, false, f->block);
  for (u32 i = 0; i < f->block->num_pending; i++) {  // and what the block itself is still holding
    const PendingStore& s = f->block->pending[i];
    if (!covered(s.owner, s.shared) || !overlap(s.to, s.size, (const char*)p, 4)) continue;
    for (u32 k = 0; k < s.size; k++)
      if (s.to + k >= (const char*)p && s.to + k < (const char*)p + 4)
        v[s.to + k - (const char*)p] = (char)(s.value[k / 8] >> 8 * (k % 8));
  }
  u32 result;
  memcpy(&result, v, 4);
  return result;
}

void flush_visible() {
  Block* b = machine.current->block;
  for (u32 i = 0; i < b->num_pending;)
    if (covered(b->pending[i].owner, b->pending[i].shared)) land(b, i), i = 0;  // land may take an earlier one first
    else i++;
}

// Any two fences are ordered as they ran, if each one's scope has the other's thread: more than a GPU promises, so this hides, but
// invents nothing.
void fence(bool sys) {
  Fiber* f = machine.current;
  const u32 rank = f->block->rank_idx;
  if (machine.weak) {
    flush_visible();
    for (u32 i = 0; sys && i < kLog && i < num_landed; i++) {  // also what others of the rank had shown to this thread
      Landed& s = landed[i];
      const bool known = covered(s.owner, s.shared) || (s.owner->block->rank_idx == rank && s.sequence <= f->view.gpu);
      if (s.sys == ~0ull && known) s.sys = machine.sequence;
    }
  }
  acquire(sys);
  if (sys) tsan_release(&fenced_of_all);
  tsan_release(fenced_of_rank + rank);
}

void acquire(bool sys) {
  Fiber* f = machine.current;
  tsan_acquire(fenced_of_rank + f->block->rank_idx);
  if (sys) tsan_acquire(&fenced_of_all);
  if (!machine.weak) return;
  f->view.gpu = machine.sequence;
  if (sys) f->view.sys = machine.sequence;
  if (sys && arena_bytes && f->thread / LANES == kNumWarps - 1) memcpy(host, arena, arena_bytes);
}

u32 load_host(const u32* p) {
  const u64 at = (const char*)p - arena;
  const u32 now = __atomic_load_n(p, __ATOMIC_RELAXED);
  if (!arena_bytes || at >= arena_bytes) return now;
  const u32 stale = machine.current->block->stale;
  if (stale == 2 || (stale == 1 && (random_u64() & 1))) return *(u32*)(host + at);
  return *(u32*)(host + at) = now;
}

void flush_overlap(const void* p, u32 size) {
  Block* b = machine.current->block;
  for (u32 i = 0; i < b->num_pending;)
    if (overlap(b->pending[i].to, b->pending[i].size, (const char*)p, size)) land(b, i), i = 0;
    else i++;
}

void share_stores() {
  Fiber* f = machine.current;
  if (!f->private_stores) return;
  f->private_stores = 0;
  for (u32 i = 0; i < f->block->num_pending; i++)
    if (f->block->pending[i].owner == f) f->block->pending[i].shared = true;
  for (u32 i = 0; i < kLog && i < num_landed; i++)
    if (landed[i].owner == f) landed[i].shared = true;
}

void proxy_fence() {
  Fiber* f = machine.current;
  f->view_async = f->view.gpu;
  for (u32 i = 0; i < f->block->num_pending; i++)
    if (covered(f->block->pending[i].owner, f->block->pending[i].shared)) f->block->pending[i].proxied = true;
  for (u32 i = 0; i < kLog && i < num_landed; i++)
    if (landed[i].proxied == ~0ull && covered(landed[i].owner, landed[i].shared)) landed[i].proxied = machine.sequence;
}

bool drain_some(bool must) {
  if (num_copies) {
    const u32 i = random_u64() % num_copies;
    if (may_land(copies[i].block->copy_hold, must)) return land_copy(i, 16 * (1 + random_u64() % (copies[i].left / 16))), true;
  }
  if (!num_pending) return false;
  u32 i = random_u64() % machine.num_blocks;
  for (u32 tried = 0; tried < machine.num_blocks; tried++, i = (i + 1) % machine.num_blocks) {
    Block* b = &machine.blocks[i];
    if (b->num_pending && land_one(b, must)) return true;
    if (!must && tried == 3) return false;
  }
  return false;
}

void shared_proxy_fence() {  // of one thread, but what others have written counts as fenced too
  Block* b = machine.current->block;
  if (b->landed_shared)
    memcpy(b->landed_shared + machine.shape.smem_ring, b->shared + machine.shape.smem_ring,
           machine.shape.smem_bytes - machine.shape.smem_ring);
}

// Nothing may land in shared memory once the block is gone: it may be another's by then.
void block_ends(Block* block) {
  u32 count = 0;
  for (u32 i = 0; i < num_copies; i++) count += copies[i].block == block;
  if (count) misuse("the block ends while %u copies into its shared memory are in flight", count);
}

void start_copy(void* shared, const void* global, u32 bytes, u64* bar) {
  Fiber* f = machine.current;
  const size_t to = (char*)shared - f->block->shared;
  if (((uintptr_t)shared | (uintptr_t)global | bytes) & 15)
    misuse("bulk_copy of %u bytes from %p to shared + %zu: not multiples of 16", bytes, global, to);
  if (to + bytes > machine.shape.smem_bytes)
    misuse("bulk_copy of %u bytes to shared + %zu leaves the block's shared memory", bytes, to);
  if (!bytes) misuse("bulk_copy of no bytes");
  tsan_release((char*)bar + 2);
  if (machine.config.delay_copies) {
    const Block* b = f->block;
    if (memcmp(shared, b->landed_shared + to, bytes))
      misuse("bulk_copy of %u bytes to shared + %zu: plain stores wrote there and no fence_async_shared followed", bytes, to);
    memset(shared, 0xff, bytes);  // from now on anything may be there
    memset(b->landed_shared + to, 0xff, bytes);
    if (num_copies == kMaxCopies) land_copy(0, copies[0].left);
    copies[num_copies++] = Copy{(char*)shared, (const char*)global, bytes, bar, f->block, f->view_async};
    return;
  }
  move_bytes((char*)shared, (const char*)global, bytes, bar, f->block, f->view_async);
}

}  // namespace sim
}  // namespace imex
