"""`imex-persist bench doorbell`: what the host costs. A descriptor that does nothing, there and back through a running engine's mailbox,
and how much longer than its steps the first token of an idle kernel takes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

from imex_persist.abi import CHUNK
from imex_persist.bench.drive import Sequence, drive, noops

ROUNDS = {"cuda": 2000, "sim": 20}
FIRST_TOKENS = {"cuda": 50, "sim": 2}
SEQUENCES = {"cuda": 7, "sim": 1}  # for the time of a step
TOKENS = {"cuda": CHUNK, "sim": 5}  # of each: its steps all attend to one chunk, as a first token's does
IDLE_S = 0.01  # before each first token
REHEARSED_EVERY = 256  # looks of an idle host


def settings() -> dict:
    return {"max_model_len": 256, "max_num_seqs": 1, "max_rows": 1}


def measure(llm) -> dict:
    """The kernel is idle before each first token. The host either looks at the mailbox meanwhile, and rehearses a post now and then; or it
    sleeps, as the engine does when it has nothing to do, and pays for waking up and for cold code."""
    kind, mailbox = llm.group.placement.kind, llm.group.mailbox

    def watch() -> None:
        until = time.perf_counter() + IDLE_S
        while time.perf_counter() < until:
            mailbox.await_record(REHEARSED_EVERY)
            mailbox.rehearse()

    def sleep() -> None:
        time.sleep(IDLE_S)

    gc.collect()
    gc.disable()
    try:
        noops(llm, ROUNDS[kind] // 10)
        busy = sorted(noops(llm, ROUNDS[kind]))
        idle = {pause: sorted(noops(llm, FIRST_TOKENS[kind], pause)) for pause in (watch, sleep)}
        steady = [drive(llm, [1], TOKENS[kind])[0].device_ns for _ in range(SEQUENCES[kind])]
        step_ns = median(b - a for device_ns in steady for a, b in pairwise(device_ns))
        first: dict[Callable, list[Sequence]] = {watch: [], sleep: []}
        for pause, found in first.items():
            for _ in range(FIRST_TOKENS[kind]):
                pause()
                found += drive(llm, [1], 1)
    finally:
        gc.enable()
    first_ns = {pause: median(one.host_ns[0] - one.posted_ns for one in found) for pause, found in first.items()}
    return {
        "noop": _summary(busy),
        "noop_after_idle": _summary(idle[watch]),
        "noop_after_sleep": _summary(idle[sleep]),
        "step_us": step_ns / 1e3,
        "first_token_us": first_ns[watch] / 1e3,
        "first_token_beyond_us": (first_ns[watch] - step_ns) / 1e3,
        "first_token_after_sleep_beyond_us": (first_ns[sleep] - step_ns) / 1e3,
        # where it goes: the way there and back, as of a no-op; and on the device, from the descriptor to the token's record
        "first_token_ack_us": median(one.acked_ns - one.posted_ns for one in first[watch]) / 1e3,
        "first_token_device_beyond_us": (median(one.device_ns[0] - one.taken_ns for one in first[watch]) - step_ns) / 1e3,
    }


def _summary(ordered_ns: list[int]) -> dict:
    count = len(ordered_ns)
    return {
        "median_us": ordered_ns[count // 2] / 1e3,
        "p99_us": ordered_ns[count * 99 // 100] / 1e3,
        "min_us": ordered_ns[0] / 1e3,
        "count": count,
    }
