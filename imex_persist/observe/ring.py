"""Drains the trace rings: the kernel writes them and never waits, so what is not fetched in time is overwritten and counted as lost.

A ring holds far more events than one step has. So a step's events stand together in it, and a step is whole exactly if its first event,
the pair of clocks, is still there.
"""

from __future__ import annotations

import numpy as np

from imex_persist import abi, planner
from imex_persist.observe.clocks import ALIGNMENT

EVENT = np.dtype([("rank", "u2"), ("block", "u2"), ("writer", "u2"), ("_pad", "u2"), ("event", abi.TraceEvent)])
EVENTS_PER_LAYER = 29  # at most, of a block's consumers, when a block attends to one run of one row: 28, and 11 once a step
RING_STEPS = 16
MAX_RING = 1 << 16
LATE_STEPS = 4  # an adder's mark may be written after its step was fetched: it is skipped


def ring_events(num_layers: int, steps: int = RING_STEPS) -> int:
    """Events of a ring that holds about so many steps of a model, a power of two."""
    return min(MAX_RING, 1 << (steps * EVENTS_PER_LAYER * (num_layers + 1) - 1).bit_length())


class RingReader:
    """Reads the rings of all ranks from host memory. `fetch` returns what is new; it makes no call into a device."""

    def __init__(self, memory, shape: np.void, first_step: int = 0):
        world, blocks, size = (int(shape[k]) for k in ("world_size", "num_blocks", "trace"))
        if not size:
            raise ValueError("the kernel was built without tracing: start the engine with trace_events, for example 8192")
        each = planner.trace_bytes(shape) // abi.TraceEvent.itemsize
        raw = np.frombuffer(memory, abi.TraceEvent, each * world).reshape(world, each)
        rings, partners = blocks * abi.TRACE_WRITERS * size, planner.num_partners(shape)
        self._shape, self._every = (world, blocks, abi.TRACE_WRITERS), int(shape["trace_every"])
        self._rings = raw[:, :rings].reshape(*self._shape, size)
        self._alignments = raw[:, rings : rings + abi.ALIGN_SLOTS * partners].reshape(world, abi.ALIGN_SLOTS, partners)
        self._next = np.full(self._shape, -1)  # where the next event of a ring will stand; -1: not known
        self._window = EVENTS_PER_LAYER * (int(shape["num_layers"]) + 1)  # of a ring, looked at at once
        self.holds = size // self._window  # traced steps that a ring holds, at least
        self.fetched = first_step  # steps below are done with
        self.lost: set[int] = set()  # steps of which something had been overwritten

    def fetch(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """EVENTs and ALIGNMENTs of the steps not fetched before and below `steps`, which every block must have ended.

        Events are sorted by rank, block, writer and time, alignments by step. A step of which a block's beginning was overwritten is
        left out.
        """
        wanted = range(-(-self.fetched // self._every) * self._every, steps, self._every)
        if not wanted:
            return np.zeros(0, EVENT), np.zeros(0, ALIGNMENT)
        events, aligned = self._read_on(steps, wanted.start), self._fetch_alignments(steps)
        if events is None:
            events = self._search(steps)
        self.fetched = steps
        return self._drop_broken(events, wanted), aligned

    def _read_on(self, steps: int, first: int) -> np.ndarray | None:
        """From where the last fetch ended, so that the work is that of the new events. None where that place was overwritten."""
        if (self._next < 0).any():
            return None
        size, found = self._rings.shape[-1], []
        which = np.argwhere(self._next >= 0)
        last = np.full(len(which), -1)
        for _ in range(-(-size // self._window)):
            rank, block, writer = which.T
            at = (self._next[rank, block, writer][:, None] + np.arange(self._window)) % size
            events = self._rings[rank[:, None], block[:, None], writer[:, None], at]  # a copy: the kernel writes on
            tags = events["step"].astype(np.int64) - 1
            fresh = np.logical_and.accumulate((tags >= self.fetched - LATE_STEPS) & (tags < steps), axis=1)
            steady = np.diff(np.concatenate([last[:, None], tags], axis=1), axis=1) >= 0
            if (fresh & ~steady).any() or (tags[:, 0] != first)[(last < 0) & (writer == 0)].any():
                return None  # the writer has come round
            found.append(_records(which, events, fresh & (tags >= self.fetched)))
            count = fresh.sum(axis=1)
            self._next[rank, block, writer] = (at[:, 0] + count) % size
            more = count == self._window
            last, which = tags[more, -1], which[more]
            if not len(which):
                out = np.concatenate(found)
                return out[np.lexsort((out["writer"], out["block"], out["rank"]))]  # stable: in order of time
        return None

    def _search(self, steps: int) -> np.ndarray:
        """Looks through whole rings: the first time, and after something was overwritten."""
        rings = self._rings.copy()
        tags, size = rings["step"].astype(np.int64) - 1, rings.shape[-1]
        # The oldest event of a ring is the first of its run of equal or rising steps: where the step falls.
        falls = tags < np.roll(tags, 1, axis=-1)
        start = np.where(falls.any(axis=-1), falls.argmax(axis=-1), 0)
        at = (start[..., None] + np.arange(size)) % size
        ordered = np.take_along_axis(rings, at, axis=-1)
        tags = np.take_along_axis(tags, at, axis=-1)
        later = (tags >= steps).sum(axis=-1)  # they stand last; what was never written stands first
        self._next = (start + size - later) % size
        which = np.argwhere(np.ones(self._shape, bool))
        wanted = (tags >= self.fetched) & (tags < steps)
        return _records(which, ordered.reshape(-1, size), wanted.reshape(-1, size))

    def _fetch_alignments(self, steps: int) -> np.ndarray:
        slots = self._alignments.copy()
        tags = slots["step"].astype(np.int64) - 1
        rank, slot, partner = np.nonzero((tags >= self.fetched) & (tags < steps))
        out = np.zeros(len(rank), ALIGNMENT)
        out["rank"], out["partner"], out["step"] = rank, partner, tags[rank, slot, partner]
        for name, field in (("asked", "clock"), ("trip", "what"), ("answer", "value")):
            out[name] = slots[field][rank, slot, partner]
        return out[np.argsort(out["step"], kind="stable")]

    def _drop_broken(self, events: np.ndarray, wanted: range) -> np.ndarray:
        steps = events["event"]["step"].astype(np.int64) - 1
        first = (events["event"]["what"] & 0xFF == abi.Mark.CLOCK) & (events["writer"] == 0)
        last = mark_of(events, abi.Phase.SAMPLE, abi.Mark.END)
        whole = np.ones(len(wanted), bool)
        for mark in (first, last):
            number = (steps[mark] - wanted.start) // wanted.step
            whole &= np.bincount(number, minlength=len(wanted)) == self._shape[0] * self._shape[1]
        self.lost |= {wanted[i] for i in np.nonzero(~whole)[0]}
        return events[whole[(steps - wanted.start) // wanted.step]]


def _records(which: np.ndarray, events: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """EVENTs of the chosen of [rings, events], ring after ring; `which`: [rings, (rank, block, writer)]."""
    ring, at = np.nonzero(chosen)
    out = np.zeros(len(ring), EVENT)
    out["rank"], out["block"], out["writer"] = which[ring].T
    out["event"] = events[ring, at]
    return out


def mark_of(events: np.ndarray, phase: abi.Phase, mark: abi.Mark) -> np.ndarray:
    """Which events are this mark of this phase. CLOCK events have no phase."""
    return events["event"]["what"] & 0xFFFF == mark | phase << 8
