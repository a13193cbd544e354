"""What no schedule of prepared descriptors shows: a host that answers while the kernel runs, and a peer that never does.

The host's thread is not simulated, so a drill is not replayed exactly; it is repeated.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from imex_persist import abi
from imex_persist.abi import Command, Record
from tests.kernel.cases import Case
from tests.kernel.harness import whole_records

from .campaign import Kernel
from .configuration import Configuration, Request, Schedule, tiny
from .observation import Wrong, expect


@dataclass(frozen=True)
class Given:
    """A request as the host gives it; the next one is submitted when it is released."""

    prompt: tuple[int, ...]
    max_tokens: int
    stop: tuple[int, ...] = ()
    slot: int = 0
    pages: tuple[int, ...] = (0,)
    cached_len: int = 0


class Host:
    """Reads records as the engine does, and says what to do about each."""

    def __init__(self, kernel: Kernel, requests: tuple[Given, ...]):
        self.kernel, self.requests, self.commands, self.seen, self.at = kernel, requests, 0, [], 0
        self.order = np.random.default_rng(0)
        self.mailbox = kernel.host[: abi.Mailbox.itemsize].view(abi.Mailbox)[0]
        self.arena = kernel.host[abi.Mailbox.itemsize :].view(np.uint32)
        self.submit(0)

    def put(self, command: Command, **fields) -> None:
        """A host that stores a line's words in any order."""
        self.commands += 1
        line, place = np.zeros(1, abi.Mailbox["descriptors"].subdtype[0]), (self.commands - 1) % abi.DESCRIPTOR_SLOTS
        self.kernel._descriptor({"descriptors": line}, self.commands, command, at=0, **fields)
        words, there = line.view(np.uint32), self.mailbox["descriptors"][place : place + 1].view(np.uint32)
        for i in self.order.permutation(len(words)):
            there[i] = words[i]
            time.sleep(1e-5)

    def submit(self, number: int) -> None:
        r = self.requests[number]
        body = [*r.prompt, *r.pages, *r.stop]
        self.arena[self.at : self.at + len(body)] = body
        self.put(Command.SUBMIT, request=number, slot=r.slot, arena=self.at, prompt_len=len(r.prompt), num_pages=len(r.pages),
                 num_stop=len(r.stop), max_tokens=r.max_tokens, cached_len=r.cached_len,
                 first_token=r.prompt[0], first_page=r.pages[0])  # fmt: skip
        self.at += len(body)

    def serve(self, launch, timeout_s: float = 10) -> list[list[int]]:
        """Tokens of all requests."""
        tokens, began = [[] for _ in self.requests], time.monotonic()
        while not launch.done():
            if time.monotonic() - began > timeout_s:
                launch.stop()
                raise Wrong("no end: the requests were not served")
            found = whole_records(_words_now(self.mailbox["records"][len(self.seen) : len(self.seen) + 1]))
            if not len(found):
                continue
            (record,) = found
            expect(record["sequence"] == len(self.seen) + 1, f"record {len(self.seen) + 1} is number {record['sequence']}")
            self.seen.append(record)
            if record["kind"] == Record.TOKEN:
                tokens[record["request"]].append(int(record["token"]))
            elif record["kind"] == Record.RELEASE:
                more = int(record["request"]) + 1
                self.submit(more) if more < len(self.requests) else self.put(Command.SHUTDOWN)
        launch.wait(1)
        for i, record in enumerate(self.seen):
            expect(
                record == whole_records(self.mailbox["records"][i : i + 1]), f"record {i + 1} was taken before it was written"
            )
        return tokens


def _words_now(ring: np.ndarray) -> np.ndarray:
    """uint64: a copy while the kernel writes, each word by one load, as the engine's mailbox reads them. NumPy copies records field by
    field, here halves of words, and so was seen to find a new tag over an old payload."""
    live = memoryview(ring.view(np.uint64))
    return np.array([live[i] for i in range(len(live))], np.uint64)


def _repeat(case: Case, requests: tuple[Given, ...], expected: list[list[int]], source, trials: range) -> int:
    """Serves the requests under one hostile schedule after the other."""
    # two requests reserve as many pages as any of these need
    mine = Configuration(-9, 1, case, 5, 3, tuple(Request(r.prompt, r.max_tokens, r.stop) for r in requests))
    kernel = Kernel(mine, tap=False, source=source)
    try:
        for trial in trials:
            weak = {"delay_stores": trial % 4 > 0, "delay_copies": True, "stalls": trial % 3 == 0}
            kernel.reset()
            host = Host(kernel, requests)
            got = host.serve(kernel.start(Schedule(trial, {"mode": "random", "preempt": 8, **weak})))
            expect(not kernel.fault(0)["valid"], f"trial {trial}: a wait gave up")
            expect(got == expected, f"trial {trial}: tokens {got} instead of {expected}")
    finally:
        kernel.close()
    return len(trials)


def _alone(case: Case, request: Given) -> list[int]:
    kernel = Kernel(Configuration(-9, 1, case, 5, 3, (Request(request.prompt, request.max_tokens),)), tap=False)
    try:
        return kernel.run(Schedule(0)).tokens[0]
    finally:
        kernel.close()


def slot_reuse(source=None, trials: int = 60, first: int = 0) -> int:
    """A request that ends by a stop token, so with a ghost in flight, and one that takes its slot at once. How many trials ran."""
    case = tiny(0, 1).case
    case = replace(case, options=case.options | {"max_model_len": 16, "num_slots": 2})
    requests = (Given((3, 1, 4), 8), Given((1, 5), 4))
    free = [_alone(case, request) for request in requests]
    stop = free[0][2]
    expected = [free[0][: free[0].index(stop) + 1], free[1]]
    return _repeat(case, (replace(requests[0], stop=(stop,)), requests[1]), expected, source, range(first, first + trials))


def shared_page(source=None, trials: int = 24, first: int = 0) -> int:
    """A request that begins in its second page: the first is an earlier one's, and the slot's page table is new in that very step."""
    case = tiny(1, 1).case
    config = replace(case.config, head_dim=128)  # pages of 32 positions
    case = replace(case, config=config, options=case.options | {"max_model_len": 64, "num_slots": 2})
    prompt = tuple(i * i % 23 for i in range(34))
    requests = (Given(prompt, 4, pages=(2, 1)), Given((*prompt[:33], 7), 6, slot=1, pages=(2, 0), cached_len=32))
    expected = [_alone(case, request) for request in requests]
    return _repeat(case, requests, expected, source, range(first, first + trials))


def dead_peer(source=None, trials: int = 3, first: int = 0) -> int:
    """Rank 1 never runs: rank 0 must give up at its deadline, say so, and leave."""
    config = tiny(1, 1)
    kernel = Kernel(
        config, tap=False, source=source, deadline_us=500_000
    )  # the clock runs with the wall's where nothing can run
    try:
        kernel.launch_params["num_ranks"] = 1
        for trial in range(first, first + trials):
            kernel.reset()
            kernel.submit()
            launch = kernel.start(Schedule(trial, {"mode": "random", "preempt": 8} if trial else {}))
            if not launch.wait(5):
                launch.stop()
                raise Wrong("no end: a wait outlived the kernel's deadline")
            expect(kernel.fault(0)["valid"] and kernel.fault(0)["source"] == 1, "nobody named rank 1")
    finally:
        kernel.close()
    return trials


def aborted_threads(source=None, trials: int = 80, first: int = 0) -> int:
    """Every thread a fiber, and the abort word rises anywhere in a run: lanes of one warp may hear of it at different places."""
    kernel = Kernel(tiny(0, 32), tap=False, source=source)
    kernel.timeout_s = 20
    try:
        kernel.run(Schedule(1, {"mode": "random", "preempt": 16}))
        dispatches = kernel.stats["steps"]
        rng = np.random.default_rng(first)
        for trial in range(first, first + trials):
            hostile = {"preempt": int(rng.choice([4, 16, 64])), "delay_copies": True, "stalls": trial % 2 == 1}
            early = trial >= first + trials * 3 // 4  # in the first layer there is a way without a vote
            last = dispatches // 3 if early else dispatches
            kernel.run(Schedule(trial, {"mode": "random", "abort_step": int(rng.integers(1, last)), **hostile}))
    finally:
        kernel.close()
    return trials


DRILLS = (slot_reuse, shared_page, dead_peer, aborted_threads)
