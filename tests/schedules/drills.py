"""What no schedule of prepared descriptors shows: a host that answers while the kernel runs, and a peer that never does.

The host's thread is not simulated, so a drill is not replayed exactly; it is repeated.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from imex_persist import abi
from imex_persist.abi import Command, Record

from .campaign import Kernel
from .configuration import Request, Schedule, tiny
from .observation import Wrong, expect

PROMPTS = ((3, 1, 4), (1, 5))
TOKENS = (8, 4)


def _configuration(prompt: tuple[int, ...], max_tokens: int, stop: tuple[int, ...] = ()):
    config = tiny(0, 1)
    case = replace(config.case, options=config.case.options | {"max_model_len": 16})
    return replace(config, case=case, requests=(Request(prompt, max_tokens, stop),))


def _alone(prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    kernel = Kernel(_configuration(prompt, max_tokens), tap=False)
    try:
        return kernel.run(Schedule(0)).tokens[0]
    finally:
        kernel.close()


class Host:
    """Reads records as the engine does, and says what to do about each."""

    def __init__(self, kernel: Kernel, stop: tuple[int, ...]):
        self.kernel, self.stop, self.commands, self.seen = kernel, stop, 0, []
        self.order = np.random.default_rng(0)
        self.mailbox = kernel.host[: abi.Mailbox.itemsize].view(abi.Mailbox)[0]
        self.arena = kernel.host[abi.Mailbox.itemsize :].view(np.uint32)

    def put(self, command: Command, **fields) -> None:
        """A host that stores a line's words in any order."""
        self.commands += 1
        line, place = np.zeros(1, abi.Mailbox["descriptors"].subdtype[0]), (self.commands - 1) % abi.DESCRIPTOR_SLOTS
        self.kernel._descriptor({"descriptors": line}, self.commands, command, at=0, **fields)
        words, there = line.view(np.uint32), self.mailbox["descriptors"][place : place + 1].view(np.uint32)
        for i in self.order.permutation(len(words)):
            there[i] = words[i]
            time.sleep(1e-5)

    def submit(self, request: int) -> None:
        """Always into slot 0 and its page."""
        stop = self.stop if request == 0 else ()
        body, at = [*PROMPTS[request], 0, *stop], 64 * request
        self.arena[at : at + len(body)] = body
        self.put(Command.SUBMIT, request=request, slot=0, arena=at, prompt_len=len(PROMPTS[request]), num_pages=1,
                 num_stop=len(stop), max_tokens=TOKENS[request])  # fmt: skip

    def serve(self, launch, timeout_s: float = 10) -> list[list[int]]:
        """Tokens of both requests, the second submitted when the first is released."""
        tokens, began = [[], []], time.monotonic()
        while not launch.done():
            if time.monotonic() - began > timeout_s:
                launch.stop()
                raise Wrong("no end: the requests were not served")
            record = self.mailbox["records"][len(self.seen)]
            if record["sequence"] != len(self.seen) + 1:
                continue
            record = record.copy()
            self.seen.append(record)
            if record["kind"] == Record.TOKEN:
                tokens[record["request"]].append(int(record["token"]))
            elif record["kind"] == Record.RELEASE:
                self.submit(1) if record["request"] == 0 else self.put(Command.SHUTDOWN)
        launch.wait(1)
        for i, record in enumerate(self.seen):
            expect(record == self.mailbox["records"][i], f"record {i + 1} was announced before it was written")
        return tokens


def slot_reuse(source=None, trials: int = 60, first: int = 0) -> int:
    """A request that ends by a stop token, so with a ghost in flight, and one that takes its slot at once. How many trials ran."""
    free = [_alone(*each) for each in zip(PROMPTS, TOKENS, strict=True)]
    stop = (free[0][2],)
    expected = [free[0][: free[0].index(stop[0]) + 1], free[1]]
    kernel = Kernel(_configuration(PROMPTS[0], TOKENS[0], stop), tap=False, source=source)
    try:
        for trial in range(first, first + trials):
            weak = {"delay_stores": trial % 2 == 0, "delay_copies": True, "stalls": trial % 3 == 0}
            kernel.reset()
            host = Host(kernel, stop)
            host.submit(0)
            got = host.serve(kernel.start(Schedule(trial, {"mode": "random", "preempt": 8, **weak})))
            expect(not kernel.fault(0)["valid"], f"trial {trial}: a wait gave up")
            expect(got == expected, f"trial {trial}: tokens {got} instead of {expected}")
    finally:
        kernel.close()
    return trials


def dead_peer(source=None, trials: int = 3, first: int = 0) -> int:
    """Rank 1 never runs: rank 0 must give up at its deadline, say so, and leave."""
    config = tiny(1, 1)
    kernel = Kernel(config, tap=False, source=source, deadline_us=50_000)
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


def aborted_threads(source=None, trials: int = 40, first: int = 0) -> int:
    """Every thread a fiber, and the abort word rises anywhere in a run: lanes of one warp may hear of it at different places."""
    kernel = Kernel(tiny(0, 32), tap=False, source=source)
    kernel.timeout_s = 20
    try:
        kernel.run(Schedule(0, {"mode": "random", "preempt": 16}))
        dispatches = kernel.stats["steps"]
        for trial in range(first, first + trials):
            rng = np.random.default_rng(trial)
            hostile = {"preempt": int(rng.choice([4, 16, 64])), "delay_copies": True, "stalls": trial % 2 == 1}
            kernel.run(Schedule(trial, {"mode": "random", "abort_step": int(rng.integers(1, dispatches)), **hostile}))
    finally:
        kernel.close()
    return trials


DRILLS = (slot_reuse, dead_peer, aborted_threads)
