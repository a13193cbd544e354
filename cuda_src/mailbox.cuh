// The mailbox: one warp of rank 0's block 0 talks to the host and decides what every step computes. It reads descriptors from mapped
// host memory, keeps the slots, publishes each step's plan to all ranks one step ahead, and writes the tokens back. It runs beside
// the compute: nothing waits for it but the plan after next.
//
// The plan of step s + 1 leaves before the tokens of s are known. A sequence that ends at s therefore has one more row in s + 1, a
// ghost: computed, its token dropped here, its k and v written to a position of its own that nobody reads. Its slot and pages go
// back to the host (RELEASE) when the last step with a row of it is done.
#pragma once
#include "faults.cuh"
#include "kv.cuh"
#include "plan.cuh"

namespace imex {

struct SlotState {
  u32 active;  // 0: free; 1: running; 2: ended, waiting for its last step
  u32 request, arena, prompt_len, max_tokens, min_tokens, num_stop;
  u32 next_position;  // the next position to plan
  u32 num_planned;    // tokens whose row is planned
  u32 num_emitted;
  u32 last_step, last_row;  // the last planned step with a row of this slot, and that row (its last)
  u32 last_token;           // sampled by it, once that step is done
  u32 finish;
  u32 ticket;  // admission order
  u32 stop[kMaxStopIds];
};

struct PlannedRow {
  u32 slot, position, samples, from_row;  // from_row: token source, or kArenaToken / kKnownToken
};
constexpr u32 kArenaToken = ~0u;
constexpr u32 kKnownToken = ~1u;

struct MailboxState {
  u32 line[16];  // the descriptor being looked at
  SlotState slots[kMaxSlots];
  PlannedRow planned[2][kMaxRows];  // by step parity
  u32 num_planned[2];
  u32 num_sampling;
};
static_assert(sizeof(MailboxState) <= kSharedMailboxBytes, "raise SHARED_MAILBOX_BYTES in abi.py");

constexpr u32 kRecordMargin = 4 * kMaxRows + 2 * kMaxSlots;  // records that steps already published may still write
constexpr u64 kHostSilenceNs = 30000000000ull;               // a host whose heartbeat stops for so long is gone

struct MailboxWarp {
  const RankParams* params;
  Shared* shared;
  MailboxState* state;
  Mailbox* host;
  int lane;
  u32 next_sequence;    // of descriptors
  u32 next_record;      // of records
  u32 records_read;     // as last read from the host
  u32 done, published;  // steps whose tokens were handled, plans published
  u32 tickets;
  u32 heartbeat;  // the host's, and when it last changed
  u64 heard_ns;
  u32 next_align;          // trace.cuh
  u32 turn = 0;            // the slot that is dealt a row first (choose_rows)
  bool new_pages = false;  // a page table was written since the last plan
};

DEV u32* arena_of(const MailboxWarp& m) { return (u32*)(m.host + 1); }

// One record. The sequence word is stored last, with release: whoever sees it sees the rest.
DEV void write_record(MailboxWarp& m, Record kind, u32 request, u32 token, u32 index, Finish finish) {
  const u32 sequence = m.next_record++;
  TokenRecord* r = &m.host->records[(sequence - 1) % kRecordSlots];
  const u64 now = timer_ns();
  store_relaxed_sys(&r->kind, (u32)kind);
  store_relaxed_sys(&r->request, request);
  store_relaxed_sys(&r->token, token);
  store_relaxed_sys(&r->index, index);
  store_relaxed_sys(&r->finish, (u32)finish);
  store_relaxed_sys((u32*)&r->time_ns, (u32)now);
  store_relaxed_sys((u32*)&r->time_ns + 1, (u32)(now >> 32));
  store_release_sys(&r->sequence, sequence);
}
// Room for what published steps may still write, and for one more step; the host's counter is read only when it matters.
DEV bool has_room(MailboxWarp& m) {
  auto room = [&] { return kRecordSlots - (m.next_record - 1 - m.records_read) >= kRecordMargin; };
  if (!room()) m.records_read = load_relaxed_sys(&m.host->header.records_read);
  return room();
}

// ---------------------------------------------------------------------------------------------- descriptors
DEV void release_if_over(MailboxWarp& m, SlotState& slot) {
  if (slot.active != 2 || (slot.last_step != ~0u && slot.last_step >= m.done)) return;
  slot.active = 0;
  write_record(m, Record::kRelease, slot.request, 0, slot.num_emitted, (Finish)slot.finish);
}
DEV void admit(MailboxWarp& m, const Descriptor& d) {
  SlotState& slot = m.state->slots[d.slot];
  slot.request = d.request;
  slot.arena = d.arena;
  slot.prompt_len = d.prompt_len;
  slot.max_tokens = d.max_tokens;
  slot.min_tokens = d.min_tokens;
  slot.num_stop = smaller(d.num_stop, kMaxStopIds);
  slot.next_position = d.cached_len;
  slot.num_planned = slot.num_emitted = 0;
  slot.last_step = ~0u;
  slot.finish = (u32)Finish::kNone;
  slot.ticket = m.tickets++;
  fence_sys();  // the descriptor was seen: now what the host wrote before it is, too
  ROLLED for (u32 i = 0; i < slot.num_stop; i++) slot.stop[i] = load_relaxed_sys(arena_of(m) + d.arena + d.prompt_len + d.num_pages + i);
  slot.active = 1;
}
// As in abi.py: one-to-one in every word, so that a line of which a part is old does not fit.
DEV u32 descriptor_check(const u32* line) {
  u32 check = kDescriptorMagic;
  ROLLED for (int i = 0; i < 15; i++) {
    check = (check ^ line[i]) * kDescriptorFactor;
    check ^= check >> 15;
  }
  return check;
}
// All lanes write a new request's page table in every rank, whole: all its pages are reserved. Only this warp writes page tables; the
// producers of all ranks read them (find_page, kv.cuh). Nobody reads this slot's now: the last step with a row of its last request is
// done, so every block has sent the word that follows its copies, and the next step with a row of it is planned after this.
// Words order nothing but themselves, so the other direction takes two fences: here, between the stores of all lanes and the header of
// the next plan, which says kPlanNewPages; and by whoever reads such a header, before its block's producer goes on (begin_step).
DEV void write_page_table(MailboxWarp& m) {
  constexpr int kBatch = 4;  // reads of host memory under way
  const Descriptor& d = *(const Descriptor*)m.state->line;
  warp_sync();  // after lane 0's fence in `admit`: what the host wrote before the descriptor is there for all lanes
  const u32* pages = arena_of(m) + d.arena + d.prompt_len;
  ROLLED for (u32 base = m.lane; base < d.num_pages; base += kBatch * LANES) {
    u32 page[kBatch];
    UNROLL for (int i = 0; i < kBatch; i++) page[i] = load_relaxed_sys(pages + smaller(base + i * LANES, d.num_pages - 1));
    ROLLED for (u32 rank = 0; rank < shape().world_size; rank++) {
      u32* table = page_table(m.params, rank) + d.slot * shape().pages_per_slot;
      UNROLL for (int i = 0; i < kBatch; i++)
        if (base + i * LANES < d.num_pages) store_global(table + base + i * LANES, page[i]);
    }
  }
  warp_sync();
  fence_sys();
  m.new_pages = true;
}
// Looks at the next descriptor: the poll is the read. One 64-byte line by one warp-wide load, taken if sequence and check match;
// a line half-written is simply not taken yet. Returns the command, kNone when there is nothing; lane 0's answer counts.
DEV Command poll_descriptor(MailboxWarp& m) {
  const u32* line = (const u32*)&m.host->descriptors[(m.next_sequence - 1) % kDescriptorSlots];
  ROLLED for (int i = m.lane; i < 16; i += LANES) m.state->line[i] = load_relaxed_sys(line + i);
  warp_sync();
  if (m.lane) return Command::kNone;
  const Descriptor& d = *(const Descriptor*)m.state->line;
  if (d.sequence != m.next_sequence || d.check != descriptor_check(m.state->line) || !has_room(m)) return Command::kNone;
  if (d.command == (u32)Command::kSubmit) admit(m, d);
  if (d.command == (u32)Command::kCancel)
    ROLLED for (u32 i = 0; i < shape().num_slots; i++) {
      SlotState& slot = m.state->slots[i];
      if (slot.active != 1 || slot.request != d.request) continue;
      slot.active = 2;
      slot.finish = (u32)Finish::kCancelled;
      release_if_over(m, slot);
    }
  write_record(m, Record::kAck, d.request, d.sequence, 0, Finish::kNone);
  return (Command)d.command;
}

// ---------------------------------------------------------------------------------------------- steps
// The slot of the prompt that has waited longest, of those with this ticket or a later one; ~0u: there is none.
DEV u32 oldest_prompt(const MailboxState& s, u32 ticket) {
  u32 best = ~0u;
  ROLLED for (u32 i = 0; i < shape().num_slots; i++) {
    const SlotState& slot = s.slots[i];
    if (slot.active != 1 || slot.next_position >= slot.prompt_len || slot.ticket < ticket) continue;
    if (best == ~0u || slot.ticket < s.slots[best].ticket) best = i;
  }
  return best;
}
// Lane 0 fills `planned` for step m.published. Returns the number of rows.
//
// Rows are dealt one at a time, in turn, to each sequence that decodes and to the oldest prompt; what is left then goes to prompts, the
// oldest first. Where there are as many rows as slots everybody has a row in every step: a prompt never costs a sequence one, and a
// gap between two tokens is one step of at most max_rows rows. With more slots than rows the next step's dealing goes on where this
// one's ended, so nobody waits for more than ceil(num_slots / max_rows) steps, a prompt no more than a sequence that decodes: without a
// turn of its own it would wait as long as others fill the step. Prompts share one turn, not one each: however many wait, sequences that
// decode lose no more by them, and the first to come is answered first. The order of a step's rows, and which step a row is in, change
// none of its bits.
DEV u32 choose_rows(MailboxWarp& m) {
  MailboxState& s = *m.state;
  const u32 step = m.published, prompt = oldest_prompt(s, 0), first = m.turn;
  PlannedRow* rows = s.planned[step & 1];
  u32 count = 0, dealt = 0;  // rows of `planned`; with the prompt's, which come last to be neighbours
  s.num_sampling = 0;
  auto add = [&](SlotState& slot, u32 index, u32 source) {
    PlannedRow& row = rows[count];
    row.slot = index;
    row.position = slot.next_position++;
    row.samples = row.position + 1 >= slot.prompt_len;
    row.from_row = source;
    slot.last_step = step;
    slot.last_row = count++;
    slot.num_planned += row.samples;
    s.num_sampling += row.samples;
  };
  m.turn = 0;
  ROLLED for (u32 i = 0; i < shape().num_slots; i++) {
    const u32 index = (first + i) % shape().num_slots;
    SlotState& slot = s.slots[index];
    if (index != prompt) {
      if (slot.active != 1 || slot.next_position < slot.prompt_len || slot.num_planned == slot.max_tokens) continue;
      add(slot, index, slot.last_step < m.done ? kKnownToken : slot.last_row);
    }
    if (++dealt < shape().max_rows) continue;
    m.turn = (index + 1) % shape().num_slots;
    break;
  }
  ROLLED for (u32 next = dealt > count ? prompt : ~0u; next != ~0u && count < shape().max_rows;) {
    SlotState& slot = s.slots[next];
    while (count < shape().max_rows && slot.next_position < slot.prompt_len) add(slot, next, kArenaToken);
    next = oldest_prompt(s, slot.ticket + 1);
  }
  s.num_planned[step & 1] = count;
  return count;
}
// All lanes fetch their rows' tokens and pages from the host, and store them to every rank.
DEV void publish_plan(MailboxWarp& m, u32 rows, Command command) {
  const u32 step = m.published, epoch = plan_epoch(step);
  ROLLED for (u32 r = m.lane; r < shape().max_rows; r += LANES) {
    u32 token = 0, position = 0, where = 0, page = 0;
    if (r < rows) {
      const PlannedRow& row = m.state->planned[step & 1][r];
      const SlotState& slot = m.state->slots[row.slot];
      position = row.position;
      where = row.slot | (row.samples ? kRowSamples : 0);
      const u32* arena = arena_of(m) + slot.arena;
      page = load_relaxed_sys(arena + slot.prompt_len + position / shape().page_size);
      token = row.from_row == kArenaToken ? load_relaxed_sys(arena + position)
              : row.from_row == kKnownToken ? slot.last_token
                                            : kTokenFromRow | row.from_row;
    }
    ROLLED for (u32 rank = 0; rank < shape().world_size; rank++) {
      u64* to = (u64*)m.params->peers[rank] + plan_offset(step) + kPlanHeaderWords + r * kPlanRowWords;
      store_words(to, token, position, epoch);
      store_words(to + 2, where, page, epoch);
    }
  }
  if (m.lane == 0) {
    const u32 aligns = rows && plan_aligns(step, m.published == m.done, m.next_align) ? kPlanAligns : 0;
    ROLLED for (u32 rank = 0; rank < shape().world_size; rank++)
      store_words((u64*)m.params->peers[rank] + plan_offset(step), rows | (u32)command << 16 | (m.new_pages ? kPlanNewPages : 0),
                  m.state->num_sampling | aligns, epoch);
  }
  m.new_pages = false;
  m.published++;
}
// Lane 0 hands the tokens of step m.done to the host and ends what ends.
DEV void finish_step(MailboxWarp& m) {
  MailboxState& s = *m.state;
  const u32 parity = m.done & 1;
  ROLLED for (u32 r = 0; r < s.num_planned[parity]; r++) {
    const PlannedRow& row = s.planned[parity][r];
    SlotState& slot = s.slots[row.slot];
    if (!row.samples || slot.active != 1) continue;
    const u32 token = m.shared->tokens[parity][r];
    slot.last_token = token;
    u32 finish = (u32)Finish::kNone;
    if (slot.num_emitted >= slot.min_tokens)
      ROLLED for (u32 i = 0; i < slot.num_stop; i++)
        if (slot.stop[i] == token) finish = (u32)Finish::kStop;
    if (finish == (u32)Finish::kNone && slot.num_emitted + 1 == slot.max_tokens) finish = (u32)Finish::kLength;
    write_record(m, Record::kToken, slot.request, token, slot.num_emitted++, (Finish)finish);
    if (finish != (u32)Finish::kNone) slot.active = 2, slot.finish = finish;
  }
  m.done++;
  ROLLED for (u32 i = 0; i < shape().num_slots; i++) release_if_over(m, s.slots[i]);
  store_relaxed_sys(&m.host->header.steps, m.done);
}

// Steps are counted in 32 bits: two weeks at 0.3 ms each. The step after the last is never planned.
constexpr u32 kLastStep = 0xfffffffeu;

// Whether the kernel must end without being asked in the ring: another block gave up, the host says stop, or the host is gone.
DEV bool must_abort(MailboxWarp& m) {
  if (aborted(m.params)) return true;
  if (m.done >= kLastStep) {
    m.shared->fault = {1, 0, 0, (u32)Wait::kCount, kLastStep, m.done, 0, m.params->rank};
    fence_sys();  // the note, before the consumers see the abort word and look for it
    raise_abort(m.params);
    return true;
  }
  const u32 beat = load_relaxed_sys(&m.host->header.heartbeat);
  const u64 now = timer_ns();
  if (beat != m.heartbeat) m.heartbeat = beat, m.heard_ns = now;
  if (!load_relaxed_sys(&m.host->header.stop) && now - m.heard_ns < kHostSilenceNs) return false;
  raise_abort(m.params);
  return true;
}

DEV bool all_free(const MailboxWarp& m) {
  ROLLED for (u32 i = 0; i < shape().num_slots; i++)
    if (m.state->slots[i].active) return false;
  return true;
}

// Rank 0's block 0, the last warp. Lane 0 decides; the others help to read lines and to publish plans.
DEV void run_mailbox(Block& b) {
  MailboxState* state = (MailboxState*)b.shared->mailbox;
  MailboxWarp m = {b.params, b.shared, state, (Mailbox*)b.params->mailbox, b.lane, 1, 1, 0, 0, 0, 0, 0, timer_ns()};
  ROLLED for (u32 i = b.lane; i < kMaxSlots; i += LANES) state->slots[i].active = 0;
  ROLLED for (u32 i = b.lane; i < 2; i += LANES) state->num_planned[i] = 0;
  warp_sync();
  if (m.lane == 0) store_release_sys(&m.host->header.resident, 1);
  constexpr u32 kAbort = ~0u;
  bool leaving = false;
  u32 idle_polls = 0;
  ROLLED for (u32 polls = 1;; polls++, idle_polls++) {
    u32 rows = 0, news = 0;
    if (m.lane == 0 && m.done < m.published && mbar_test_now({&b.shared->step_end[m.done & 1], m.done >> 1 & 1})) {
      finish_step(m);
      news = 1;
    }
    u32 command = (u32)poll_descriptor(m);
    command = shuffle(command, 0);
    if (command) m.next_sequence++;
    if (command == (u32)Command::kSubmit) write_page_table(m);
    leaving |= command == (u32)Command::kShutdown;
    if (m.lane == 0) {
      const bool may_publish = m.published <= m.done + 1 && m.published < kLastStep;  // every block has read its buffer's last plan
      if (may_publish && has_room(m)) rows = choose_rows(m);
      if (may_publish && leaving && all_free(m)) news = 2;
      if (polls % kPollsPerCheck == 0 && must_abort(m)) news = kAbort;
    }
    rows = shuffle(rows, 0);
    news = shuffle(news, 0);
    warp_sync();  // lane 0's choice of rows, before every lane publishes
    if (news == kAbort) break;
    if (rows) publish_plan(m, rows, Command::kNone);
    if (news == 2) {
      publish_plan(m, 0, Command::kShutdown);
      break;
    }
    warp_sync();  // before lane 0 chooses again
    if (command || rows || news) idle_polls = 0;
    mailbox_pause(idle_polls);
  }
  if (m.lane == 0) store_release_sys(&m.host->header.resident, 2);
}

}  // namespace imex
