"""Traces a running engine: drains the rings beside the decode loop and decodes what has come. No call reaches the device."""

from __future__ import annotations

import time
from collections import deque

import numpy as np

from imex_persist.observe.clocks import ALIGNMENT, PAIR, AlignedClocks, SharedClock
from imex_persist.observe.ring import EVENT, RingReader
from imex_persist.observe.spans import Trace, decode, pairs_of

SETTLE_S = 0.05  # after the last token: for the blocks to write their last events
BEHIND = 2  # steps behind the kernel, while it runs: all ranks have written them
MAX_DRAINS_KEPT = 4096
LIVE_DRAINS = 64  # earlier ones whose clocks `poll` uses at most: they cost as much as what is new
COMPARED = 4  # steps before which ranks' timers were compared, for a line through what they differ by


class Capture:
    """`poll()` now and then while decoding, `finish()` at the end and before the engine closes. `llm` was made with trace_events."""

    def __init__(self, llm):
        if llm.group.trace is None:
            raise ValueError("the engine does not trace: start it with trace_events, for example LLM(model, trace_events=8192)")
        self.shape = llm.shape
        self.axis = axis_of(llm.group.placement)
        self._mailbox = llm.group.mailbox
        self._one_clock = llm.group.placement.kind == "sim"
        self._reader = RingReader(llm.group.trace.view, llm.shape, first_step=self._mailbox.steps)
        self._drained: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=MAX_DRAINS_KEPT)  # events, alignments
        self._new = 0  # drains that poll has not returned

    def drain(self) -> None:
        """Fetches the new steps if the rings are half full of them. Cheap to call, after every token for example."""
        done = self._mailbox.steps - BEHIND
        if done - self._reader.fetched >= self._reader.holds // 2 * int(self.shape["trace_every"]):
            self._keep(done)

    def poll(self) -> Trace | None:
        """The steps that are new since the last call, or None."""
        self._keep(self._mailbox.steps - BEHIND)
        new, self._new = min(self._new, len(self._drained)), 0
        return self._decode(new, self._with_clocks(new)) if new else None

    def finish(self) -> Trace:
        """Everything so far. Call when no request runs."""
        time.sleep(SETTLE_S)
        self._keep(self._mailbox.steps)
        return self._decode(len(self._drained), len(self._drained))

    def _with_clocks(self, new: int) -> int:
        """How many of the last drains place the events of the last `new`: those, one more, and more until timers were compared often."""
        compared: set[int] = set()
        for count, (_, alignments) in enumerate(reversed(self._drained), 1):
            compared.update(np.unique(alignments["step"]).tolist())
            if (count > new and len(compared) >= COMPARED) or count == new + LIVE_DRAINS:
                return count
        return len(self._drained)

    def _keep(self, steps: int) -> None:
        events, alignments = self._reader.fetch(steps)
        if len(events):
            self._drained.append((events, alignments))
            self._new += 1

    def _decode(self, count: int, used: int) -> Trace:
        """The Trace of the last `count` drains, on the clocks of the last `used`."""
        parts = list(self._drained)
        clocks = clocks_of(parts[max(0, len(parts) - used) :], self.shape, self._one_clock)
        events = np.concatenate([np.zeros(0, EVENT), *(events for events, _ in parts[len(parts) - count :])])
        return decode(events, self.shape, self.axis, clocks, tuple(sorted(self._reader.lost)))


def clocks_of(fetched: list[tuple[np.ndarray, np.ndarray]], shape: np.void, one_clock: bool) -> SharedClock | AlignedClocks:
    """The clocks of what RingReader.fetch returned; `one_clock`: the simulator's."""
    pairs = np.concatenate([np.zeros(0, PAIR), *(pairs_of(events) for events, _ in fetched)])
    if one_clock:
        return SharedClock(pairs)
    alignments = np.concatenate([np.zeros(0, ALIGNMENT), *(found for _, found in fetched)])
    return AlignedClocks(pairs, alignments, int(shape["num_blocks"]), int(shape["world_size"]))


def axis_of(placement) -> str:
    """What the trace's times are, for people."""
    if placement.kind == "sim":
        if len(placement.places) == 1:
            return "virtual time of the simulator, not a GPU's"
        return "wall time of simulated ranks in processes, not a GPU's"
    return "the GPUs' timers, between their ticks the SMs' clocks; ranks aligned by words between them"
