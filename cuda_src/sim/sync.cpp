// What threads of a block wait for together: barriers, mbarriers with transaction counts, warp collectives.
#include "machine.h"

namespace imex {
namespace sim {

namespace {
struct Mbar {  // the 8 bytes in shared memory
  u16 pending, count;
  u32 phase : 1;
  int bytes16 : 31;  // expected less arrived, in 16 bytes; below zero while copies land before they are announced
};
static_assert(sizeof(Mbar) == 8);

void barrier_opens(Block* block, Barrier* b) {
  b->arrived = 0;
  b->generation++;
  b->result = b->any, b->any = false;
  b->view_result = b->view;
  for (Fiber* f = block->fibers; f < block->fibers + kThreads; f++)
    if (f->state == State::kParked && f->park == Park::kBarrier && f->note.address == b) make_ready(f);
}

View& view_of(Block* block, u64* bar) { return block->mbar_view[((char*)bar - block->shared) / 8]; }

Mbar* mbar_at(Block* block, u64* bar) {
  const size_t offset = (char*)bar - block->shared;
  if (offset % 8 || offset >= machine.shape.smem_bytes)
    misuse("mbarrier at %p is not in the block's shared memory", (void*)bar);
  return (Mbar*)bar;
}

constexpr u32 kAllLanes = ~0u >> (32 - LANES);
bool warp_opens(Warp* w) {  // a warp_sync at which all are who are still there
  if ((w->arrived | w->exited) != kAllLanes) return false;
  w->view_result = w->view, w->view = View{};
  w->syncing = false;
  warp_release();
  return true;
}

void mbar_check(Block* block, Mbar* m) {
  if (m->pending || m->bytes16) return;
  m->phase ^= 1;
  m->pending = m->count;
  for (Fiber** at = &block->mbar_waiters; *at;) {
    Fiber* f = *at;
    if (f->note.address == m && f->note.expected != m->phase) {
      *at = f->next;
      make_ready(f);
    } else {
      at = &f->next;
    }
  }
}
}  // namespace

bool block_barrier(int id, u32 count, bool vote) {
  point();
  Fiber* f = machine.current;
  Block* block = f->block;
  Barrier* b = &block->barriers[id];
  share_stores();
  const void* key = (char*)b + (b->generation & 1);
  tsan_release(key);
  b->any |= vote;
  b->view = later(b->view, f->view);
  if (++b->arrived == (id == 0 ? block->alive : count)) {
    barrier_opens(block, b);
  } else {
    f->note = WaitNote{};
    f->note.address = b;
    f->note.expected = id;
    park(Park::kBarrier);
  }
  tsan_acquire(key);
  f->view = later(f->view, b->view_result);
  return b->result;  // the next use needs this fiber's arrival, so it is still this one's
}

void fiber_exits() {
  Fiber* f = machine.current;
  Block* block = f->block;
  share_stores();
  f->warp->exited |= 1u << f->lane;
  if (f->warp->syncing) warp_opens(f->warp);
  if (!--block->alive) block_ends(block);
  Barrier* b = &block->barriers[0];
  if (b->arrived && b->arrived == block->alive) barrier_opens(block, b);  // __syncthreads does not wait for who has left
}

void mbarrier_init(u64* bar, u32 count) {
  Mbar* m = mbar_at(machine.current->block, bar);
  if (!count || count > 0xffff) misuse("mbar_init with count %u", count);
  *m = Mbar{(u16)count, (u16)count, 0, 0};
  view_of(machine.current->block, bar) = View{};
}

void mbarrier_arrive(u64* bar, u32 bytes, bool expect) {
  point();
  Fiber* f = machine.current;
  Mbar* m = mbar_at(f->block, bar);
  if (!m->pending || m->pending > m->count)
    misuse("mbarrier at shared + %zu: more arrivals than its count of %u", (size_t)((char*)bar - f->block->shared), m->count);
  if (expect && bytes % 16) misuse("mbar_arrive_expect of %u bytes: not a multiple of 16", bytes);
  share_stores();
  View& view = view_of(f->block, bar);
  view = later(view, f->view);
  tsan_release((char*)bar + m->phase);
  m->bytes16 += (int)(bytes / 16);
  m->pending--;
  mbar_check(f->block, m);
  point();  // those who were let go may overtake whatever comes next
}

void mbarrier_complete(Block* block, u64* bar, u32 bytes) {
  Mbar* m = mbar_at(block, bar);
  tsan_release((char*)bar + m->phase);
  m->bytes16 -= (int)(bytes / 16);
  mbar_check(block, m);
}

bool mbarrier_done(u64* bar, u32 parity) { return mbar_at(machine.current->block, bar)->phase != parity; }

void mbarrier_seen(u64* bar, u32 parity) {
  Fiber* f = machine.current;
  tsan_acquire((char*)bar + parity);
  f->view = later(f->view, view_of(f->block, bar));
}

void warp_synchronize() {
  Fiber* f = machine.current;
  share_stores();
  const void* key = (char*)f->warp->slot + (f->warp->turn & 1);
  tsan_release(key);
  Warp* w = f->warp;
  w->view = later(w->view, f->view);
  w->arrived |= 1u << f->lane;
  w->syncing = true;
  f->note = WaitNote{};
  if (!warp_opens(w)) park(Park::kWarp);
  tsan_acquire(key);
  f->view = later(f->view, w->view_result);  // the next one needs this lane, so it is still this one's
}

bool warp_arrive(void* mine) {
  Fiber* f = machine.current;
  Warp* w = f->warp;
  if (w->exited) misuse("a warp collective after lanes %08x of the warp returned", w->exited);
  w->slot[f->lane] = mine;
  w->arrived |= 1u << f->lane;
  if (w->arrived == kAllLanes) return true;
  f->note = WaitNote{};
  park(Park::kWarp);
  return false;
}

void warp_release() {
  Warp* w = machine.current->warp;
  const u32 arrived = w->arrived;
  w->arrived = 0;
  w->turn ^= 1;
  for (int i = 0; i < LANES; i++)
    if (w->fibers + i != machine.current && arrived >> i & 1) make_ready(w->fibers + i);
}

}  // namespace sim
}  // namespace imex
