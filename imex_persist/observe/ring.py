"""Drains the trace rings: the kernel writes them and never waits, so what is not fetched in time is overwritten and counted as lost.

A ring holds far more events than one step has. So a step's events stand together in it, and a step is whole exactly if its first event,
the pair of clocks, is still there.
"""

from __future__ import annotations

import numpy as np

from imex_persist import abi, planner
from imex_persist.observe.clocks import ALIGNMENT

EVENT = np.dtype([("rank", "u2"), ("block", "u2"), ("writer", "u2"), ("_pad", "u2"), ("event", abi.TraceEvent)])
EVENTS_PER_LAYER = 24  # at most, of a block's consumers, when a block attends to one run of one row
RING_STEPS = 16
MAX_RING = 1 << 16


def ring_events(num_layers: int) -> int:
    """Events that hold about RING_STEPS steps of a model, a power of two."""
    return min(MAX_RING, 1 << (RING_STEPS * EVENTS_PER_LAYER * (num_layers + 1) - 1).bit_length())


class RingReader:
    """Reads the rings of all ranks from host memory. `fetch` returns what is new; it makes no call into a device."""

    def __init__(self, memory, shape: np.void):
        world, blocks, size = (int(shape[k]) for k in ("world_size", "num_blocks", "trace"))
        if not size:
            raise ValueError("the kernel was built without tracing: start the engine with trace_events, for example 8192")
        each = planner.trace_bytes(shape) // abi.TraceEvent.itemsize
        raw = np.frombuffer(memory, abi.TraceEvent, each * world).reshape(world, each)
        rings, partners = blocks * abi.TRACE_WRITERS * size, planner.num_partners(shape)
        self._rings = raw[:, :rings].reshape(world, blocks, abi.TRACE_WRITERS, size)
        self._alignments = raw[:, rings : rings + abi.ALIGN_SLOTS * partners].reshape(world, abi.ALIGN_SLOTS, partners)
        self._fetched = 0  # steps below are done with
        self.lost: set[int] = set()  # steps of which something had been overwritten

    def fetch(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """EVENTs and ALIGNMENTs of the steps not fetched before and below `steps`, which every block must have ended.

        Events are sorted by rank, block, writer and time, alignments by step. A step of which a block's beginning was overwritten is
        left out.
        """
        if steps <= self._fetched:
            return np.zeros(0, EVENT), np.zeros(0, ALIGNMENT)
        rings = self._rings.copy()  # the kernel writes on
        tags = rings["step"].astype(np.int64) - 1
        size = rings.shape[-1]
        wanted = (tags >= self._fetched) & (tags < steps)
        # The oldest event of a ring is the first of its run of equal or rising steps: where the step falls.
        falls = tags < np.roll(tags, 1, axis=-1)
        start = np.where(falls.any(axis=-1), falls.argmax(axis=-1), 0)
        rank, block, writer, at = np.nonzero(wanted)
        order = (at - start[rank, block, writer]) % size
        by = np.lexsort((order, writer, block, rank))
        out = np.zeros(len(by), EVENT)
        out["rank"], out["block"], out["writer"] = rank[by], block[by], writer[by]
        out["event"] = rings[wanted][by]
        aligned = self._fetch_alignments(steps)
        self._fetched = steps
        return self._drop_broken(out), aligned

    def _fetch_alignments(self, steps: int) -> np.ndarray:
        slots = self._alignments.copy()
        tags = slots["step"].astype(np.int64) - 1
        rank, slot, partner = np.nonzero((tags >= self._fetched) & (tags < steps))
        out = np.zeros(len(rank), ALIGNMENT)
        out["rank"], out["partner"], out["step"] = rank, partner, tags[rank, slot, partner]
        for name, field in (("asked", "clock"), ("trip", "what"), ("answer", "value")):
            out[name] = slots[field][rank, slot, partner]
        return out[np.argsort(out["step"], kind="stable")]

    def _drop_broken(self, events: np.ndarray) -> np.ndarray:
        steps = events["event"]["step"].astype(np.int64) - 1
        clock = (events["event"]["what"] & 0xFF == abi.Mark.CLOCK) & (events["writer"] == 0)
        last = mark_of(events, abi.Phase.SAMPLE, abi.Mark.END)
        blocks = self._rings.shape[0] * self._rings.shape[1]
        numbers = np.unique(steps)
        for number in numbers:
            mine = steps == number
            if np.count_nonzero(clock & mine) < blocks or np.count_nonzero(last & mine) < blocks:
                self.lost.add(int(number))
        return events[~np.isin(steps, sorted(self.lost))]


def mark_of(events: np.ndarray, phase: abi.Phase, mark: abi.Mark) -> np.ndarray:
    """Which events are this mark of this phase. CLOCK events have no phase."""
    return events["event"]["what"] & 0xFFFF == mark | phase << 8
