"""`imex-persist bench decode`: step time at given contexts and numbers of rows, prompts of given lengths, as llama-bench lists them.

All rows run in one resident kernel. For each number of rows as many sequences start with one token and decode together past the
largest context; what a context's line shows is the median over the steps that begin there.
"""

from __future__ import annotations

import bisect
import gc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from imex_persist.bench.drive import Sequence, drive
from imex_persist.bench.floor import Ceiling
from imex_persist.bench.steps import StepBytes, least_us

WARMUP_TOKENS = 16
PROMPT_RUNS = 5


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    contexts: list[int]
    rows: list[int]
    prompts: list[int]
    steps: int

    def max_model_len(self) -> int:
        """Positions that a slot needs: a sequence that starts later goes as far as the others."""
        longest = max([*(c + self.steps + 2 for c in self.contexts), *(n + 2 for n in self.prompts), WARMUP_TOKENS + 2])
        return longest + 2

    def settings(self, max_rows: int) -> dict:
        """Of the engine: room for every sequence at its longest.

        Raises ValueError for too few `max_rows`: a token of every sequence would take several steps, and its bound is of one.
        """
        most = max(self.rows, default=1)
        if max_rows < most:
            raise ValueError(
                f"max_rows is {max_rows} but --rows has {most}: a step must hold them all, use --max-rows {most} or fewer rows"
            )
        return {"max_model_len": self.max_model_len(), "max_num_seqs": most, "max_rows": max_rows}


def measure(llm, plan: Plan, ceiling: Ceiling, in_the_middle: Callable[[], None]) -> list[dict]:
    """The table's rows. `in_the_middle` is called once in each generation, while the kernel runs."""
    sizes = StepBytes.of(llm.model.config, llm.shape)
    drive(llm, [1] * max(plan.rows, default=1), WARMUP_TOKENS)
    gc.collect()
    gc.disable()  # a pause of ours is no time of the kernel's
    try:
        out = [_prompt(llm, sizes, ceiling, length) for length in plan.prompts]
        for rows in plan.rows:
            sequences = drive(llm, [1] * rows, max(plan.contexts) + plan.steps + 1, in_the_middle)
            out += [_window(sizes, ceiling, sequences, context, plan.steps) for context in plan.contexts]
        return out
    finally:
        gc.enable()


def _window(sizes: StepBytes, ceiling: Ceiling, sequences: list[Sequence], context: int, steps: int) -> dict:
    """Token i of a sequence that began with one token comes from the step whose row attends to i earlier positions."""
    first = sequences[0]
    device, host = (
        [b - a for a, b in pairwise(times)][context - 1 : context - 1 + steps] for times in (first.device_ns, first.host_ns)
    )
    middle = first.device_ns[context + steps // 2]
    contexts = [float(bisect.bisect_right(s.device_ns, middle) - 1) for s in sequences]  # they began a step or two apart
    us, bound = median(device) / 1e3, least_us(sizes.decode(contexts), ceiling)
    return {
        "test": f"tg{steps} @ d{context}",
        "kind": "decode",
        "rows": len(sequences),
        "context": context,
        "steps": len(device),
        "us": us,
        "p99_us": sorted(device)[len(device) * 99 // 100] / 1e3,
        "host_us": median(host) / 1e3,
        "bytes": sizes.decode(contexts),
        "bound_us": bound,
        "ratio": us / bound,
        "tokens_per_s": len(sequences) * 1e6 / us,
    }


def _prompt(llm, sizes: StepBytes, ceiling: Ceiling, length: int) -> dict:
    """From the kernel's taking the request to its first token; on the host, from before the descriptor's store to the token seen."""
    runs = [drive(llm, [length], 1)[0] for _ in range(PROMPT_RUNS)]
    us = median(run.device_ns[0] - run.taken_ns for run in runs) / 1e3
    nbytes, steps = sizes.prompt(length, int(llm.shape["max_rows"]))
    bound = least_us(nbytes, ceiling)
    return {
        "test": f"pp{length}",
        "kind": "prompt",
        "rows": 1,
        "context": length,
        "steps": steps,
        "us": us,
        "host_us": median(run.host_ns[0] - run.posted_ns for run in runs) / 1e3,
        "bytes": nbytes,
        "bound_us": bound,
        "ratio": us / bound,
        "tokens_per_s": length * 1e6 / us,
    }
