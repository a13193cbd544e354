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
    by: str = "schedules"  # who catches it: schedules, tsan, drill, or nobody
    why: str = ""  # nobody: why

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
TSAN, DRILL, NOBODY = {"by": "tsan"}, {"by": "drill"}, {"by": "nobody"}
BLOCK = (
    gone("gather_without_barrier", "activations are overwritten while a warp still multiplies with them", "words.cuh",
         SYNC + "  // the phase before has read what stood there\n"),
    gone("attention_without_barrier", "an item takes the place of activations still being read", "phases/attention.cuh",
         SYNC + "  // the activations have been read: the item takes their place\n"),
    one("merge_without_barrier", "warps' results are merged before all are there", "phases/attention.cuh",
        "item_merge(b, item, b.warp), item.heads);\n" + SYNC, "item_merge(b, item, b.warp), item.heads);"),
    one("normalize_without_barrier", "products begin before every warp has normalised", "norm.cuh",
        "    release_stage(b);\n  }\n" + SYNC, "    release_stage(b);\n  }"),
    gone("receive_without_barrier", "the next activations overwrite the last phase's", "exchange.cuh",
         SYNC + "  // the phase before has read the activations\n"),
    one("receive_without_vote", "normalises before all of the vector has arrived", "exchange.cuh",
        "  return all_well(b);\n}\n\n// Puts a value", "  return !b.waiter.failed;\n}\n\n// Puts a value"),
    one("begin_without_barrier", "warps read the step's rows before they are written", "plan.cuh",
        SYNC + "\n  if (b.thread == 0) mbar_arrive(&s.step_begin);", "  if (b.thread == 0) mbar_arrive(&s.step_begin);"),
    one("sample_without_vote", "takes the best of warps that have not brought theirs", "phases/sample.cuh",
        "if (!all_well(b)) return false;", "if (b.waiter.failed) return false;"),
    one("step_end_without_barrier", "the mailbox reads tokens before they are written", "phases/sample.cuh",
        SYNC + "\n  if (b.thread == 0) mbar_arrive(&b.shared->step_end", "  if (b.thread == 0) mbar_arrive(&b.shared->step_end"),
    one("candidates_not_awaited", "publishes a block's best before the adders have it", "phases/lm_head.cuh",
        "mbar_wait(b.waiter, Wait::kPartial, false, &b.shared->candidates_ready, b.num_lm_heads++ & 1);", "b.num_lm_heads++;"),
)  # fmt: skip
WARP = (
    gone("stage_without_warp_sync", "lane 0 frees a ring stage that other lanes still read", "stream.cuh",
         "  warp_sync();  // every lane has read it\n", **TSAN),
    one("hand_over_without_warp_sync", "lane 0 announces partial sums of lanes that have not stored them", "stream.cuh",
        "  warp_sync();\n  if (b.lane == 0) mbar_arrive(&b.shared->done[slot]);",
        "  if (b.lane == 0) mbar_arrive(&b.shared->done[slot]);", **TSAN),
    gone("adder_without_warp_sync", "lane 0 frees a part slot that other lanes still add", "adders.cuh",
         "    warp_sync();\n", **TSAN),
    gone("candidates_without_warp_sync", "lane 0 announces candidates of lanes that have not stored them", "phases/lm_head.cuh",
         "  warp_sync();\n", **TSAN),
    one("chunk_without_warp_sync", "values are cleared after this step's were put in", "phases/attention.cuh",
        "  warp_sync();\n  for (int p = step_first >", "  for (int p = step_first >", **TSAN),
    gone("mailbox_without_warp_sync", "lanes publish a plan that lane 0 is still choosing", "mailbox.cuh",
         "    warp_sync();  // lane 0's choice of rows, before every lane publishes\n", **TSAN),
    gone("mailbox_chooses_early", "lane 0 chooses rows while lanes still publish the last choice", "mailbox.cuh",
         "    warp_sync();  // before lane 0 chooses again\n", **TSAN),
)  # fmt: skip
RING = (
    one("expect_too_few_bytes", "a stage is full before its last bytes are there", "stream.cuh",
        "mbar_arrive_expect(full, bytes);", "mbar_arrive_expect(full, bytes - 16);"),
    Mutation("stage_freed_early", "a stage is refilled while it is multiplied",
             (("stream.cuh", "        accum_multiply(acc, ring_stage(b, b.ring.stage), operand,",
               "        const int stage = b.ring.stage;\n        unit = b.shared->unit[stage];\n        release_stage(b);\n"
               "        accum_multiply(acc, ring_stage(b, stage), operand,"),
              ("stream.cuh", "        release_stage(b);\n        if (unit == kUnitEnd) return;", "        if (unit == kUnitEnd) return;"),
              ("stream.cuh", "unit = b.shared->unit[b.ring.stage];  ", "")), **TSAN),
    one("empty_counts_one", "the first warp that leaves a stage frees it", "decode.cu",
        "mbar_init(&s.empty[i], kConsumerWarps);", "mbar_init(&s.empty[i], 1);"),
    one("empty_parity", "the producer waits for the wrong lap", "stream.cuh",
        "&b.shared->empty[p.ring.stage], p.ring.parity ^ 1);", "&b.shared->empty[p.ring.stage], p.ring.parity);"),
    gone("stage_not_awaited", "the producer overwrites stages that are in use", "stream.cuh",
         "  mbar_wait(b.waiter, Wait::kStage, true, &b.shared->empty[p.ring.stage], p.ring.parity ^ 1);\n"),
    one("page_stage_not_awaited", "attends to a page that has not landed", "phases/attention.cuh",
        "    wait_stage(b);\n    if (", "    if ("),
    gone("slot_not_awaited", "partial sums overwrite those of a unit still being added", "stream.cuh",
         "  mbar_wait(b.waiter, Wait::kPartial, false, &b.shared->free[slot], (b.num_units / kPartSlots & 1) ^ 1);\n"),
    one("slot_freed_early", "an adder frees a slot before it has read it", "adders.cuh",
        "    b.waiter.phase = note.phase;\n",
        "    if (b.lane == 0) mbar_arrive(&b.shared->free[slot]);\n    b.waiter.phase = note.phase;\n"),
    one("done_counts_seven", "a unit is added before the last warp's share is there", "decode.cu",
        "mbar_init(&s.done[i], kConsumerWarps);", "mbar_init(&s.done[i], kConsumerWarps - 1);"),
    gone("producer_begins_early", "pages are streamed for a plan not read yet", "decode.cu",
         "        mbar_wait(b.waiter, Wait::kStep, true, &b.shared->step_begin, b.step & 1);\n"),
    one("producer_reads_plan_late", "the producer looks at the next step's plan (a race that was here once)", "decode.cu",
        "phase != Phase::kLmHead || p.num_sampling", "phase != Phase::kLmHead || b.shared->num_sampling", by="nobody",
        why="254 schedules do not: the producer warp alone must stand still for half a step, and the simulator stalls whole blocks; "
        "ThreadSanitizer keeps four accesses a word, and the consumers' many reads push the producer's out"),
    one("adder_reads_rows_late", "an adder looks at the next step's rows after its last word (a race that was here once)",
        "exchange.cuh", "i < rows * (kUnitRows / 2); i += LANES", "i < num_rows(b) * (kUnitRows / 2); i += LANES", by="nobody",
        why="as above, and for o_proj it is harmless: later units of the step order it"),
    gone("copies_not_drained", "a block leaves while copies into its shared memory are in flight", "decode.cu",
         "  drain_copies(b, p);\n", by="nobody",
         why="the simulator lets a launch end with copies in flight; it could count them (memory.cpp) and call that a misuse"),
)  # fmt: skip
