"""Traces a running engine: drains the rings beside the decode loop and decodes what has come. No call reaches the device."""

from __future__ import annotations

import time
from collections import deque

import numpy as np

from imex_persist.observe.align import align
from imex_persist.observe.ring import EVENT, RingReader
from imex_persist.observe.spans import Trace, decode

SETTLE_S = 0.05  # after the last token: for the blocks to write their last events
MAX_STEPS_KEPT = 4096


class Capture:
    """`poll()` now and then while decoding, `finish()` at the end and before the engine closes. `llm` was made with trace_events."""

    def __init__(self, llm):
        if llm.group.trace is None:
            raise ValueError("the engine does not trace: start it with trace_events, for example LLM(model, trace_events=8192)")
        self.shape = llm.shape
        self.axis = axis_of(llm.group.placement)
        self._mailbox = llm.group.mailbox
        self._one_clock = llm.group.placement.kind == "sim" or len(llm.group.placement.places) == 1
        self._reader = RingReader(llm.group.trace.view, llm.shape)
        self._parts: deque[np.ndarray] = deque(maxlen=MAX_STEPS_KEPT)
        self._new: list[np.ndarray] = []  # of them, what poll has not returned

    def drain(self) -> None:
        """Fetches the steps that are new, two behind the kernel: all ranks have written them."""
        events = self._reader.fetch(self._mailbox.steps - 2)
        if len(events):
            self._parts.append(events)
            self._new.append(events)

    def poll(self) -> Trace | None:
        """The steps drained since the last call, or None."""
        self.drain()
        new, self._new = self._new, []
        return self._decode(np.concatenate(new)) if new else None

    def finish(self) -> Trace:
        """Everything so far. Call when no request runs."""
        time.sleep(SETTLE_S)
        self._parts.append(self._reader.fetch(self._mailbox.steps))
        return self._decode(np.concatenate(self._parts) if self._parts else np.zeros(0, EVENT))

    def _decode(self, events: np.ndarray) -> Trace:
        trace = decode(events, self.shape, self.axis, tuple(sorted(self._reader.lost)))
        return trace if self._one_clock else align(trace)


def axis_of(placement) -> str:
    """What the trace's times are, for people."""
    if placement.kind == "sim":
        if len(placement.places) == 1:
            return "virtual time of the simulator, not a GPU's"
        return "wall time of simulated ranks in processes, not a GPU's"
    if len(placement.places) == 1:
        return "the GPU's timer"
    return "the GPUs' timers, aligned by the exchanges' words"
