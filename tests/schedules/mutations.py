"""Planted synchronisation bugs: each is a patch of a copy of cuda_src, which the schedules, ThreadSanitizer or a drill must catch.

A patch names the exact text it replaces; when that is no longer there, once, the mutation says so instead of testing nothing.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from imex_persist.device import sources


@dataclass(frozen=True)
class Mutation:
    name: str
    breaks: str
    patches: tuple[tuple[str, str, str], ...]  # (file, old, new)
    by: str = "schedules"  # who catches it: schedules, threads (schedules of LANES=32), tsan, or drill

    def apply(self, folder: Path) -> Path:
        """Writes the patched kernel into a folder of its own below `folder`; its decode.cu."""
        root, texts = sources.cuda_src(), {}
        for path in root.rglob("*.cu*"):
            name = path.relative_to(root)
            if name.parts[0] not in ("sim", "cuda") and name.name not in ("primitives.cuh", "abi.cuh"):
                texts[str(name)] = path.read_text()
        for file, old, new in self.patches:
            count = texts[file].count(old)
            if count != 1:
                raise ValueError(f"mutation {self.name}: {file} has its text {count} times, not once; adapt it:\n{old}")
            texts[file] = texts[file].replace(old, new)
        digest = hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()[:16]
        to = folder / f"{self.name}-{digest}"
        if not to.is_dir():
            scratch = folder / f".{self.name}"
            shutil.rmtree(scratch, ignore_errors=True)
            for name, text in texts.items():
                (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                (scratch / name).write_text(text)
            scratch.rename(to)
        return to / "decode.cu"


def one(name: str, breaks: str, file: str, old: str, new: str, **more) -> Mutation:
    return Mutation(name, breaks, ((file, old, new),), **more)


def gone(name: str, breaks: str, file: str, old: str, **more) -> Mutation:
    return one(name, breaks, file, old, "", **more)


SYNC = "  consumer_sync();"
TSAN, DRILL, THREADS = {"by": "tsan"}, {"by": "drill"}, {"by": "threads"}
BLOCK = (
    gone("gather_without_barrier", "activations are overwritten while a warp still multiplies with them", "bare.cuh",
         SYNC + "  // the phase before has read what stood there\n"),
    gone("attention_without_barrier", "an item takes the place of activations still being read", "phases/attention.cuh",
         SYNC + "  // the activations have been read: the item takes their place\n"),
    one("merge_without_barrier", "warps' results are merged before all are there", "phases/attention.cuh",
        "item_merge(b, item, b.warp, scratch), item.queries);\n" + SYNC, "item_merge(b, item, b.warp, scratch), item.queries);"),
    one("norm_sums_put_early", "sums of squares are overwritten before words of every slice say that adders have read them", "exchange.cuh",
        "  if (sums) {\n    receive_slice", "  if (multiplies) put_row_sum(b, 0, 0.f);\n  if (sums) {\n    receive_slice"),
    gone("receive_without_barrier", "the next activations overwrite the last phase's", "exchange.cuh",
         SYNC + "  // the phase before has read the activations\n"),
    one("receive_without_vote", "multiplies before all of the vector has arrived", "norm.cuh",
        "  if (!all_well(b)) return false;\n  if (norm.weighs &&", "  if (b.waiter.failed) return false;\n  if (norm.weighs &&"),
    one("begin_without_barrier", "warps read the step's rows before they are written", "plan.cuh",
        SYNC + "\n  if (b.thread == 0) deal_items(b);", "  if (b.thread == 0) deal_items(b);"),
    one("sample_without_vote", "takes the best of warps that have not brought theirs", "phases/sample.cuh",
        "if (!all_well(b)) return false;", "if (b.waiter.failed) return false;"),
    one("step_end_without_barrier", "the mailbox reads tokens before they are written", "phases/sample.cuh",
        SYNC + "\n  if (b.shared->num_drawing", "  if (b.shared->num_drawing"),
    one("candidates_not_awaited", "publishes a block's best before the adders have it", "phases/lm_head.cuh",
        "mbar_wait(b.waiter, Wait::kPartial, false, Pending{&b.shared->candidates_ready, b.num_lm_heads++ & 1});", "b.num_lm_heads++;"),
)  # fmt: skip
WARP = (
    one("stage_without_warp_sync", "lane 0 frees a ring stage that other lanes still read", "stream.cuh",
        "  warp_sync();\n  for (int i = b.lane / kWarpArrivals; i < count;",
        "  for (int i = b.lane / kWarpArrivals; i < count;", **TSAN),
    one("hand_over_without_warp_sync", "lane 0 announces partial sums of lanes that have not stored them", "stream.cuh",
        "warp_arrive(b, &b.shared->done[slot]);", "if (b.lane == 0) mbar_arrive(&b.shared->done[slot]);", **TSAN),
    one("adder_without_warp_sync", "lane 0 frees a part slot that other lanes still add", "adders.cuh",
        "warp_arrive(b, &b.shared->free[slot]);", "if (b.lane == 0) mbar_arrive(&b.shared->free[slot]);", **TSAN),
    one("candidates_without_warp_sync", "lane 0 announces candidates of lanes that have not stored them", "phases/lm_head.cuh",
        "warp_arrive(b, &b.shared->candidates_ready);", "if (b.lane == 0) mbar_arrive(&b.shared->candidates_ready);", **TSAN),
    one("item_without_barrier", "an item is attended to before all of q, and this step's keys, are in place", "phases/attention.cuh",
        "gather_item(b, item, epoch);\n    if (!all_well(b))", "gather_item(b, item, epoch);\n    if (b.waiter.failed)"),
    one("scales_without_warp_sync", "an adder's lanes scale by what other lanes have not written", "norm.cuh",
        "  warp_sync();\n}\nDEV float row_scale", "}\nDEV float row_scale", **TSAN),
    gone("mailbox_without_warp_sync", "lanes publish a plan that lane 0 is still choosing", "mailbox.cuh",
         "    warp_sync();  // lane 0's choice of rows, before every lane publishes\n", **TSAN),
)  # fmt: skip
RING = (
    one("expect_too_few_bytes", "a stage is full before its last bytes are there", "stream.cuh",
        "mbar_arrive_expect(full, bytes);", "mbar_arrive_expect(full, bytes - 16);"),
    Mutation("stage_freed_early", "a stage is refilled while it is multiplied",
             (("stream.cuh", "    take_weights(b, to, b.ring, k, group);\n",
               "    const RingCursor here = b.ring;\n    release_stages(b, tiles_in(k, group));\n"
               "    take_weights(b, to, here, k, group);\n"),
              ("stream.cuh", "    pending = tiles_in(k, group);\n", "")), **TSAN),
    Mutation("ahead_freed_early", "a stage is refilled while a warp takes its weights ahead",
             (("stream.cuh", "  take_weights(b, taken.even, b.ring, k, 0);\n",
               "  const RingCursor first_at = b.ring;\n  release_stages(b, first);\n  take_weights(b, taken.even, first_at, k, 0);\n"),
              ("stream.cuh", "here(first), here(both - 1)", "here(0), here(both - first - 1)"),
              ("stream.cuh", "const RingCursor at = ahead(b.ring, first);", "const RingCursor at = b.ring;"),
              ("stream.cuh", "  release_stages(b, second ? both : first);", "  release_stages(b, second ? both - first : 0);")), **TSAN),
    one("ahead_not_awaited", "the first groups are taken before their tiles have landed", "stream.cuh",
        "warp_all(mbar_test_now(here(0), here(smaller(1, both - 1)), here(smaller(2, both - 1)), here(both - 1)));", "true;"),
    one("second_not_awaited", "the second group is taken before its tiles have landed", "stream.cuh",
        "(all || warp_all(mbar_test_now(here(first), here(both - 1))))", "true"),
    one("scratch_not_awaited", "attention gives a stage back that the producer has not taken yet", "phases/attention.cuh",
        "awaited = whole ? stages :", "awaited = whole ? run_pages :"),
    gone("scratch_without_proxy_fence", "a tile is overwritten by results that attention left in its stage before", "phases/attention.cuh",
         "  fence_async_shared();  // as above, and what was stored to be merged\n"),
    one("empty_counts_one", "the first warp that leaves a stage frees it", "decode.cu",
        "mbar_init(&s.empty[i], kConsumerWarps * kWarpArrivals);", "mbar_init(&s.empty[i], 1);"),
    one("empty_parity", "the producer waits for the wrong lap", "stream.cuh",
        "&b.shared->empty[p.ring.stage], p.ring.parity ^ 1};", "&b.shared->empty[p.ring.stage], p.ring.parity};"),
    one("stage_not_awaited", "the producer overwrites stages that are in use", "stream.cuh",
        "if (!mbar_wait(b.waiter, Wait::kStage, true, left, landed))",
        "if (p.num_filled == shape().window && !mbar_wait(b.waiter, Wait::kStage, true, landed))"),
    one("page_stage_not_awaited", "attends to a page that has not landed", "phases/attention.cuh",
        "bool here = wait_run(b, awaited);", "bool here = true;"),
    one("lanes_keep_their_stages", "a lane reads a page that another lane alone has seen land", "stream.cuh",
        "  warp_sync();\n  return here;", "  return here;", **TSAN),
    one("dealt_after_the_arrival", "the producer looks for its items while they are dealt", "plan.cuh",
        "  consumers_arrive(b, &s.step_begin);\n",
        "  consumers_arrive(b, &s.step_begin);\n  if (b.thread == 0) deal_items(b);\n", **TSAN),
    one("slot_not_awaited", "partial sums overwrite those of a unit still being added", "stream.cuh",
        "wait_stages(b, tiles_in(k, 0), free_slot(b, units++))", "(units++, wait_stages(b, tiles_in(k, 0)))"),
    one("first_slot_not_awaited", "the same by a phase's first unit", "stream.cuh",
        "  if (!mbar_wait_warp(b.waiter, Wait::kPartial, false, free_slot(b, units++))) return;\n  add_activations(taken.even",
        "  units++;\n  add_activations(taken.even"),
    one("second_slot_not_awaited", "the same by a phase's second unit, taken ahead", "stream.cuh",
        "if (groups == 1 && !mbar_wait_warp(b.waiter, Wait::kPartial, false, free_slot(b, units++))) return;",
        "units += groups == 1;"),
    one("slot_freed_early", "an adder frees a slot before it has read it", "adders.cuh",
        "    b.waiter.phase = note.phase;\n",
        "    if (b.lane == 0) mbar_arrive(&b.shared->free[slot]);\n    b.waiter.phase = note.phase;\n"),
    one("done_counts_seven", "a unit is added before the last warp's share is there", "decode.cu",
        "mbar_init(&s.done[i], kConsumerWarps * kWarpArrivals);", "mbar_init(&s.done[i], kConsumerWarps - 1);"),
    gone("producer_begins_early", "pages are streamed for a plan not read yet", "decode.cu",
         "        if (!mbar_wait(b.waiter, Wait::kStep, true, Pending{&b.shared->step_begin, b.step & 1})) break;\n"),
    one("producer_reads_plan_late", "the producer looks at the next step's plan (a race that was here once)", "decode.cu",
        "multiplies_in(phase, b.waiter.layer, p.num_sampling)", "multiplies_in(phase, b.waiter.layer, b.shared->num_sampling)", **TSAN),
    gone("copies_not_drained", "a block leaves while copies into its shared memory are in flight", "decode.cu",
         "  drain_copies(b, p);\n"),
)  # fmt: skip
