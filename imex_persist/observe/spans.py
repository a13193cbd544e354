"""From trace events to spans on one time axis.

An event carries the low word of its SM's clock. At the start of every step each block pairs that clock with its GPU's timer; an event's
time is its block's pair plus the clocks since, over the clock's rate between pairs. The timer ticks coarsely, so a pair is replaced by
the mean of its neighbours' line; how far the pairs lie from those lines is the residual error that `Clocks` states.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from imex_persist import abi
from imex_persist.abi import Mark, Phase
from imex_persist.observe.ring import EVENT

WRAP = 1 << 32
WINDOW = 4  # pairs on each side that a block's line is drawn through
LONGEST_GAP_NS = 1e9  # between pairs: a clock of 2 GHz must not wrap twice
EXCHANGED = (Phase.QKV, Phase.GATE_UP, Phase.LM_HEAD, Phase.SAMPLE)  # phases that take in words of all ranks

# One phase of one block in one step. Times in µs of the trace's axis, NaN where the phase has no such moment; waits in µs.
SPAN = np.dtype(
    [("step", "i8"), ("rank", "i4"), ("block", "i4"), ("phase", "i4"), ("layer", "i4"), ("order", "i4")]
    + [(name, "f8") for name in "begin sum input ready end sent words peers tiles".split()]
    + [("value", "i8")]  # of READY: whether it multiplies, in attention the pages read; embed: rows of the step
)


@dataclass(frozen=True)
class Clocks:
    """What the time axis is, and how far off it may be, in µs."""

    axis: str
    residual_us: float  # of a block's clock against its GPU's timer: the largest
    rank_offset_us: tuple[float, ...]  # subtracted from each rank's times
    rank_error_us: float | None  # bound of the alignment of ranks; 0 where they share a clock, None where nothing bounds it
    clock_ghz: float


@dataclass(frozen=True)
class Trace:
    """The spans of some steps, sorted by step, rank, block and place in the step."""

    shape: np.void
    spans: np.ndarray
    clocks: Clocks
    lost: tuple[int, ...] = ()
    origin_ns: int = 0  # of the axis, on rank 0's timer
    _tables: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def steps(self) -> list[int]:
        return [int(s) for s in np.unique(self.spans["step"])]

    def of_step(self, step: int) -> np.ndarray:
        low, high = np.searchsorted(self.spans["step"], [step, step + 1])
        return self.spans[low:high]

    def table(self, step: int) -> np.ndarray:
        """SPAN [ranks, blocks, phases of a step in order]. Raises ValueError if a block's span is missing."""
        if step not in self._tables:
            world, blocks = int(self.shape["world_size"]), int(self.shape["num_blocks"])
            self._tables[step] = self.of_step(step).reshape(world, blocks, num_phases(self.shape))
        return self._tables[step]


def order_of(phase, layer, num_layers: int):
    """Place of a phase in its step: embed 0, then five a layer, lm_head, sample."""
    inside = 1 + 5 * layer + (phase - Phase.QKV)
    last = np.where(phase == Phase.LM_HEAD, 1 + 5 * num_layers, 2 + 5 * num_layers)
    return np.where(phase == Phase.EMBED, 0, np.where(phase >= Phase.LM_HEAD, last, inside))


def num_phases(shape: np.void) -> int:
    return 5 * int(shape["num_layers"]) + 3


def decode(events: np.ndarray, shape: np.void, axis: str, lost: tuple[int, ...] = ()) -> Trace:
    """The Trace of RingReader's events; the ranks' timers are taken as they are (align.py moves them)."""
    if events.dtype != EVENT:
        raise ValueError(f"events of dtype {events.dtype} were given: ring.EVENT is expected")
    if not len(events):
        empty = Clocks(axis, 0.0, (0.0,) * int(shape["world_size"]), 0.0, 1.0)
        return Trace(shape, np.zeros(0, SPAN), empty, lost)
    is_clock = events["event"]["what"] & 0xFF == Mark.CLOCK
    pairs = _Pairs(events[is_clock])
    origin = int(pairs.timer.min())
    times = pairs.times(events, origin)
    spans = _spans(events[~is_clock], times[~is_clock], shape, pairs, origin)
    offsets = (0.0,) * int(shape["world_size"])
    return Trace(shape, spans, Clocks(axis, pairs.residual_us, offsets, 0.0, pairs.ghz), lost, origin)


def _key(events: np.ndarray, *, with_step: bool = True) -> np.ndarray:
    key = events["rank"].astype(np.int64) << 16 | events["block"]
    return key << 40 | events["event"]["step"] if with_step else key


class _Pairs:
    """Clock and timer of every block and step."""

    def __init__(self, clocks: np.ndarray):
        clocks = clocks[np.argsort(_key(clocks))]
        e = clocks["event"]
        self.key = _key(clocks)
        self.clock = e["clock"].astype(np.int64)
        self.timer = e["value"].astype(np.int64) | (e["what"].astype(np.int64) >> 8) << 32
        self.anchor = self.timer.astype(np.float64)  # the timer, smoothed, relative to the first pair
        self.rate = np.ones(len(clocks))  # clocks a ns
        self.first = self.timer.min()
        self.anchor -= self.first
        residuals, rates = [0.0], []
        block = _key(clocks, with_step=False)
        edges = [0, *(np.nonzero(np.diff(block))[0] + 1), len(block)]
        for low, high in pairwise(edges):
            residuals += self._fit(low, high, rates)
        self.ghz = float(np.median(rates)) if rates else 1.0
        if rates:
            self.rate[self.rate == 0] = self.ghz
        else:
            self.rate[:] = 1.0
        self.residual_us = max(residuals) / 1e3

    def _fit(self, low: int, high: int, rates: list[float]) -> list[float]:
        """Lines through one block's neighbouring pairs; the distances of the pairs from them, in ns."""
        timer, clock = self.timer[low:high] - self.first, self.clock[low:high]
        steps_ns, residuals = np.diff(timer), []
        ticks = np.diff(clock) % WRAP
        near = (steps_ns > 0) & (steps_ns < LONGEST_GAP_NS)
        for i in range(high - low):
            left, right = i, i
            while left > 0 and i - left < WINDOW and near[left - 1]:
                left -= 1
            while right < high - low - 1 and right - i < WINDOW and near[right]:
                right += 1
            if left == right:
                self.rate[low + i] = 0  # alone: everybody else's rate
                continue
            x = np.concatenate([[0], np.cumsum(ticks[left:right])]).astype(np.float64)
            y = (timer[left : right + 1] - timer[left]).astype(np.float64)
            rate = x[-1] / y[-1]
            offset = np.mean(y - x / rate)
            self.rate[low + i] = rate
            self.anchor[low + i] = timer[left] + offset + x[i - left] / rate
            rates.append(rate)
            residuals.append(float(np.max(np.abs(y - x / rate - offset))))
        return residuals

    def times(self, events: np.ndarray, origin: int) -> np.ndarray:
        """µs since `origin` (ns of the timer) of every event."""
        at = np.searchsorted(self.key, _key(events))
        since = (events["event"]["clock"].astype(np.int64) - self.clock[at]) % WRAP
        return (self.anchor[at] + (self.first - origin) + since / self.rate[at]) / 1e3

    def us(self, events: np.ndarray, clocks: np.ndarray) -> np.ndarray:
        return clocks / self.rate[np.searchsorted(self.key, _key(events))] / 1e3


def _spans(events: np.ndarray, times: np.ndarray, shape: np.void, pairs: _Pairs, origin: int) -> np.ndarray:
    e = events["event"]
    mark, phase, layer = e["what"] & 0xFF, (e["what"] >> 8 & 0xFF).astype(np.int64), (e["what"] >> 16).astype(np.int64)
    layers = int(shape["num_layers"])
    order = order_of(phase, layer, layers)
    key = ((e["step"].astype(np.int64) << 8 | events["rank"]) << 16 | events["block"]) << 24 | order
    unique, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    out = np.zeros(len(unique), SPAN)
    out["step"] = e["step"][first].astype(np.int64) - 1
    out["rank"], out["block"] = events["rank"][first], events["block"][first]
    out["phase"], out["layer"], out["order"] = phase[first], layer[first], order[first]
    for name in ("begin", "sum", "input", "ready", "end", "sent"):
        out[name] = np.nan

    def put(name: str, which: Mark, *, first_wins: bool = False) -> None:
        mine = np.nonzero(mark == which)[0]
        mine = mine[::-1] if first_wins else mine
        out[name][inverse[mine]] = times[mine]

    put("begin", Mark.BEGIN)
    put("sum", Mark.SUM)
    put("input", Mark.INPUT, first_wins=True)  # attention takes in words for every item
    put("ready", Mark.READY)
    put("end", Mark.END)
    sent = mark == Mark.SENT
    latest = np.full(len(out), -np.inf)
    np.maximum.at(latest, inverse[sent], times[sent])
    out["sent"] = np.where(np.isfinite(latest), latest, np.nan)

    waits = pairs.us(events, e["value"].astype(np.float64))
    many = int(shape["world_size"]) > 1
    from_ranks = np.isin(phase, EXCHANGED) & many
    has_sum = ~np.isnan(out["sum"])[inverse]
    peers = (mark == Mark.SUM) & many | (mark == Mark.INPUT) & from_ranks & ~has_sum
    words = (mark == Mark.SUM) & ~many | (mark == Mark.INPUT) & ~(from_ranks & ~has_sum)
    for name, mine in (("peers", peers), ("words", words), ("tiles", (mark == Mark.END) & (phase != Phase.EMBED))):
        np.add.at(out[name], inverse[mine], waits[mine])
    valued = (mark == Mark.READY) | (mark == Mark.END) & (phase == Phase.EMBED)
    out["value"][inverse[valued]] = e["value"][valued]

    embeds = out["phase"] == Phase.EMBED  # begins with the pair of clocks
    at = np.searchsorted(pairs.key, (out["rank"].astype(np.int64) << 16 | out["block"]) << 40 | (out["step"] + 1))
    out["begin"][embeds] = ((pairs.anchor[at] + (pairs.first - origin)) / 1e3)[embeds]
    return out[np.lexsort((out["order"], out["block"], out["rank"], out["step"]))]


def moved(trace: Trace, offset_us: np.ndarray, error_us: float | None) -> Trace:
    """The trace with every rank's times moved back by its offset."""
    spans = trace.spans.copy()
    for name in ("begin", "sum", "input", "ready", "end", "sent"):
        spans[name] -= offset_us[spans["rank"]]
    c = trace.clocks
    clocks = Clocks(c.axis, c.residual_us, tuple(float(v) for v in offset_us), error_us, c.clock_ghz)
    return Trace(trace.shape, spans, clocks, trace.lost, trace.origin_ns)


__all__ = ["EXCHANGED", "SPAN", "Clocks", "Trace", "abi", "decode", "moved", "num_phases", "order_of"]
