"""Drives a resident kernel straight through its mailbox, by spinning: what the host sees is timed without the engine's pauses.

The engine's own thread starts with its first request, so until then the mailbox is free; nothing else may use the LLM meanwhile.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from imex_persist import abi
from imex_persist.errors import FaultError
from imex_persist.runtime.allocator import pages_needed

LOOKS = 1 << 14  # empty ones between two at the clock and at the group's health
LIMIT_S = 900.0  # of one run
_ids = itertools.count(1 << 30)  # apart from the engine's


@dataclass
class Sequence:
    """One request: when it was posted, taken, acknowledged, and when each token was known on the device (ns) and seen here (ns)."""

    prompt_len: int
    posted_ns: int = 0
    taken_ns: int = 0  # device clock
    acked_ns: int = 0
    device_ns: list[int] = field(default_factory=list)
    host_ns: list[int] = field(default_factory=list)


def drive(llm, prompt_lens: list[int], num_tokens: int, in_the_middle: Callable[[], None] | None = None) -> list[Sequence]:
    """Runs one sequence for each of `prompt_lens` (each in its own slot) to exactly `num_tokens` tokens, all at once.

    `in_the_middle` is called when half of the first one's tokens are there. Raises FaultError.
    """
    mailbox, shape = llm.group.mailbox, llm.shape
    sequences = [Sequence(length) for length in prompt_lens]
    by_id = {}
    for slot, sequence in enumerate(sequences):
        request = next(_ids)
        by_id[request] = sequence
        entry = _prepare(mailbox, shape, request, slot, sequence.prompt_len, num_tokens)
        sequence.posted_ns = time.perf_counter_ns()
        mailbox.descriptors.post(entry)
    left, half = len(sequences), num_tokens // 2
    wait = Patience(llm)
    while left:
        if not mailbox.await_record(LOOKS):
            wait()
            continue
        now = time.perf_counter_ns()
        for record in mailbox.poll():
            sequence = by_id[record.request]
            if record.kind == abi.Record.TOKEN:
                sequence.device_ns.append(record.time_ns)
                sequence.host_ns.append(now)
            elif record.kind == abi.Record.ACK:
                sequence.taken_ns, sequence.acked_ns = record.time_ns, now
            elif record.kind == abi.Record.RELEASE:
                left -= 1
        if in_the_middle is not None and len(sequences[0].device_ns) > half:
            in_the_middle()
            in_the_middle = None
    return sequences


def noops(llm, count: int, pause: Callable[[], None] = lambda: None) -> list[int]:
    """Round trips of a descriptor that does nothing, in ns: stored here, taken by the kernel, its acknowledgement seen here."""
    mailbox, ring = llm.group.mailbox, llm.group.mailbox.descriptors
    times = []
    for _ in range(count):
        pause()
        entry = ring.prepare(abi.Command.NOOP)
        wait = Patience(llm)
        began = time.perf_counter_ns()
        ring.post(entry)
        while not mailbox.await_record(LOOKS):
            wait()
        times.append(time.perf_counter_ns() - began)
        mailbox.poll()
    return times


class Patience:
    """Called when LOOKS found nothing; raises FaultError when the ranks have ended or nothing comes for too long."""

    def __init__(self, llm):
        self._llm, self._limit = llm, time.monotonic() + LIMIT_S

    def __call__(self) -> None:
        if self._llm.group.error is not None:
            raise self._llm.group.error
        if time.monotonic() > self._limit:
            raise FaultError(f"a benchmark did not end in {LIMIT_S:.0f} s")


def _prepare(mailbox, shape, request: int, slot: int, prompt_len: int, num_tokens: int) -> tuple[int, ...]:
    """A descriptor with pages of its slot's own and a prompt of arbitrary tokens; nothing stops it but its length."""
    pages = pages_needed(prompt_len, num_tokens, int(shape["page_size"]))
    first = slot * int(shape["pages_per_slot"])
    vocabulary = int(shape["vocab_size"])
    prompt = [(7919 * i + 104729 * slot + 1) % vocabulary for i in range(prompt_len)]
    return mailbox.prepare_submit(request, slot, prompt, range(first, first + pages), (), num_tokens, num_tokens)
