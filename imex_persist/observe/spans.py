"""From trace events to spans: one phase of one block in one step, on the axis that clocks.py makes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from imex_persist import abi
from imex_persist.abi import Mark, Phase
from imex_persist.observe.clocks import PAIR, AlignedClocks, Errors, SharedClock
from imex_persist.observe.ring import EVENT

EXCHANGED = (Phase.QKV, Phase.GATE_UP, Phase.LM_HEAD, Phase.SAMPLE)  # phases that take in words of all ranks
OF_NO_LAYER = (Phase.EMBED, Phase.LM_HEAD, Phase.SAMPLE)  # once a step

# One phase of one block in one step. Times in µs of the trace's axis, NaN where the phase has no such moment; waits in µs.
MOMENTS = "begin met sum input ready end first sent".split()
SPAN = np.dtype(
    [("step", "i8"), ("rank", "i4"), ("block", "i4"), ("phase", "i4"), ("layer", "i4"), ("order", "i4")]
    + [(name, "f8") for name in (*MOMENTS, "words", "peers", "tiles", "ahead")]  # ahead: for tiles, before `met` or after `sum`
    + [("value", "i8")]  # of READY: whether it multiplies, in attention the pages read; embed: rows of the step
    + [("cut", "?")]  # attention: a row's context is, so all blocks merge its runs
)


@dataclass(frozen=True)
class Trace:
    """The spans of some steps, sorted by step, rank, block and place in the step."""

    shape: np.void
    spans: np.ndarray
    axis: str  # what the times are, for people
    errors: Errors
    lost: tuple[int, ...] = ()  # steps that were overwritten, or that no alignment places
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


def is_pair(mark: np.ndarray) -> np.ndarray:
    """Which marks are pairs of a block's clock and its GPU's timer."""
    return (mark == Mark.CLOCK) | (mark == Mark.PAIR)


def pairs_of(events: np.ndarray) -> np.ndarray:
    """The PAIRs among RingReader's events: of a block in order of time."""
    mine = events[is_pair(events["event"]["what"] & 0xFF)]
    e, out = mine["event"], np.zeros(len(mine), PAIR)
    out["rank"], out["block"] = mine["rank"], mine["block"]
    out["step"], out["clock"] = e["step"].astype(np.int64) - 1, e["clock"]
    out["timer"] = e["value"].astype(np.int64) | (e["what"].astype(np.int64) >> 8) << 32
    return out


def decode(
    events: np.ndarray, shape: np.void, axis: str, clocks: SharedClock | AlignedClocks, lost: tuple[int, ...] = ()
) -> Trace:
    """The Trace of RingReader's events, with clocks that know the pairs of all their steps."""
    if events.dtype != EVENT:
        raise ValueError(f"events of dtype {events.dtype} were given: ring.EVENT is expected")
    e = events["event"]
    rank, block, step = (a.astype(np.int64) for a in (events["rank"], events["block"], e["step"]))
    times = clocks.place(rank, block, step - 1, e["clock"].astype(np.int64))
    nowhere = np.unique(step[np.isnan(times)] - 1)
    placed = ~np.isin(step - 1, nowhere)
    spans = _spans(events[placed], times[placed], shape, np.asarray(clocks.ghz))
    return Trace(shape, spans, axis, clocks.errors, tuple(sorted({*lost, *nowhere.tolist()})), clocks.origin_ns)


def _spans(events: np.ndarray, times: np.ndarray, shape: np.void, ghz: np.ndarray) -> np.ndarray:
    e = events["event"]
    mark = e["what"] & 0xFF
    where = np.where(is_pair(mark), int(Phase.EMBED), e["what"].astype(np.int64) >> 8)  # a pair's higher bits are the timer's
    phase, layer, layers = where & 0xFF, where >> 8, int(shape["num_layers"])
    order = order_of(phase, layer, layers)
    key = ((e["step"].astype(np.int64) << 3 | events["rank"]) << 12 | events["block"]) << 16 | order
    unique, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    out = np.zeros(len(unique), SPAN)
    out["step"] = e["step"][first].astype(np.int64) - 1
    out["rank"], out["block"] = events["rank"][first], events["block"][first]
    out["phase"], out["layer"], out["order"] = phase[first], layer[first], order[first]
    for name in MOMENTS:
        out[name] = np.nan

    def put(name: str, which: Mark, *, first_wins: bool = False) -> None:
        mine = np.nonzero(mark == which)[0]
        mine = mine[::-1] if first_wins else mine
        out[name][inverse[mine]] = times[mine]

    put("begin", Mark.CLOCK)  # of embed
    put("begin", Mark.BEGIN)
    put("sum", Mark.SUM)
    put("met", Mark.MET, first_wins=True)  # attention meets and takes in words for every item
    put("input", Mark.INPUT, first_wins=True)
    put("ready", Mark.READY)
    put("end", Mark.END)
    sent = mark == Mark.SENT
    clocks = e["value"] / (ghz[events["rank"]] if len(ghz) > 1 else ghz[0]) / 1e3  # in µs, where the value is clocks
    earliest, latest = np.full(len(out), np.inf), np.full(len(out), -np.inf)  # of both adders
    np.minimum.at(earliest, inverse[sent], (times - clocks)[sent])
    np.maximum.at(latest, inverse[sent], times[sent])
    out["first"] = np.where(np.isfinite(earliest), earliest, np.nan)
    out["sent"] = np.where(np.isfinite(latest), latest, np.nan)
    many = int(shape["world_size"]) > 1
    from_ranks = np.isin(phase, EXCHANGED) & many
    has_sum = ~np.isnan(out["sum"])[inverse]
    peers = (mark == Mark.SUM) & many | (mark == Mark.INPUT) & from_ranks & ~has_sum
    words = (mark == Mark.SUM) & (not many) | (mark == Mark.INPUT) & ~(from_ranks & ~has_sum)
    tiles = (mark == Mark.END) & (phase != Phase.EMBED)
    for name, mine in (
        ("peers", peers),
        ("words", words),
        ("tiles", tiles),
        ("ahead", (mark == Mark.MET) | (mark == Mark.TAKEN)),
    ):
        np.add.at(out[name], inverse[mine], clocks[mine])
    valued = (mark == Mark.READY) | (mark == Mark.END) & (phase == Phase.EMBED)
    out["value"][inverse[valued]] = e["value"][valued] & ~np.uint32(abi.TRACE_CUT)
    out["cut"][inverse[valued]] = e["value"][valued] & np.uint32(abi.TRACE_CUT) != 0

    return out[np.lexsort((out["order"], out["block"], out["rank"], out["step"]))]
