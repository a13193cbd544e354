"""The critical path of a step: the chain of phase -> word -> phase that determined its length.

Walked backwards from the end of `sample` on rank 0's block 0, which publishes the tokens. A phase that took in words after it was ready
for them waited for the last of those words: the path goes on in the block that sent it. Else the block itself was late: the path goes
on in its own phase before. The segments meet end to end, so they sum up to the step.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from imex_persist import abi
from imex_persist.abi import Phase
from imex_persist.observe.hops import needs_some, words_left
from imex_persist.observe.spans import Trace, order_of

KINDS = ("compute", "tiles", "warps", "local_hop", "peer_hop")
KIND_TEXT = {"compute": "compute", "tiles": "tile wait", "warps": "own warps", "local_hop": "local hop", "peer_hop": "rank hop"}


@dataclass(frozen=True)
class Segment:
    """A stretch of the path. A hop ends in (rank, block), which took the words in, and began in (source_rank, source_block)."""

    kind: str
    phase: Phase
    layer: int
    rank: int
    block: int
    begin_us: float
    end_us: float
    source_rank: int
    source_block: int

    @property
    def us(self) -> float:
        return self.end_us - self.begin_us


@dataclass(frozen=True)
class Path:
    """Segments in order of time; `begin_us` and `end_us` are the step's."""

    step: int
    segments: tuple[Segment, ...]

    @property
    def begin_us(self) -> float:
        return self.segments[0].begin_us

    @property
    def end_us(self) -> float:
        return self.segments[-1].end_us

    @property
    def us(self) -> float:
        return self.end_us - self.begin_us

    def total(self, *keys: str) -> dict[tuple, float]:
        """µs by the values of these fields of the segments."""
        out: dict[tuple, float] = defaultdict(float)
        for segment in self.segments:
            out[tuple(getattr(segment, key) for key in keys)] += segment.us
        return dict(out)


def critical_path(trace: Trace, step: int) -> Path:
    return _Walk(trace, step).path()


class _Walk:
    def __init__(self, trace: Trace, step: int):
        self.step, self.table = step, trace.table(step)  # [rank, block, order]
        self.shape = trace.shape
        self.layers, self.world = int(trace.shape["num_layers"]), int(trace.shape["world_size"])
        self.two_shot = int(trace.shape["strategy"]) == abi.Strategy.TWO_SHOT
        self.out = words_left(self.table)
        self.segments: list[Segment] = []

    def path(self) -> Path:
        rank, block, order = 0, 0, self.table.shape[2] - 1
        time = float(self.table["end"][0, 0, order])
        while True:
            span = self.table[rank, block, order]
            phase = Phase(int(span["phase"]))
            taken = self._taken(span)
            if phase == Phase.EMBED:
                self._add("compute", span, float(span["begin"]), time)
                break
            if phase == Phase.ATTENTION:
                late = self._late_split(span, time)
                if late is not None:
                    block, split = late
                    self._hop(span, split, time, rank, block)
                    time, span = split, self.table[rank, block, order]
                    taken = self._taken(span)
            self._work(span, min(taken, time), time)
            time = min(taken, time)
            if not np.isnan(span["sum"]):  # slice owners stand between: this block waited for the last of them
                scope = self.table["sum"][:, :, order] if self.two_shot else self.table["sum"][rank : rank + 1, :, order]
                source, published = _last(scope, 0 if self.two_shot else rank)
                published = min(published, time)
                self._hop(span, published, time, *source)
                (rank, block), time, span = source, published, self.table[source[0], source[1], order]
            begin = float(span["begin"])
            met = begin if np.isnan(span["met"]) else min(float(span["met"]), time)
            exporters = self._exporters(phase, int(span["layer"]), rank)
            if exporters is not None:
                before, ranks = exporters
                out = self.out[ranks, :, before]
                if needs_some(phase, self.shape):  # what it did need had left when it had it
                    out = np.where(out <= time, out, -np.inf)
                came_from, left = _last(out, ranks.start)
                left = min(left, time)
                if left > met:
                    self._hop(span, left, time, *came_from)
                    (rank, block), order, time = came_from, before, left
                    continue
                self._add("local_hop", span, met, time)  # they had come: what is left of the hop is reading them
                ahead = (
                    min(float(span["ahead"]), met - begin) if np.isnan(span["sum"]) else 0.0
                )  # after `sum`: in the hop from there
                self._add("warps", span, begin + ahead, met)
                self._add("tiles", span, begin, begin + ahead)
            else:
                self._add("compute", span, begin, time)
            order -= 1
            own = self.table[rank, block, order]
            self._add("compute", own, min(float(own["end"]), begin), begin)  # between phases: gate_up's appends keys and values
            time = min(float(own["end"]), begin)
        self.segments.reverse()
        return Path(self.step, tuple(s for s in self.segments if s.us > 0) or tuple(self.segments[:1]))

    @staticmethod
    def _taken(span) -> float:
        """When the phase had what it takes in; attention's blocks may have nothing to do."""
        return float(span["begin"] if np.isnan(span["input"]) else span["input"])

    def _exporters(self, phase: Phase, layer: int, rank: int) -> tuple[int, slice] | None:
        """(place in the step, ranks) of the phase whose words this one takes in; None for the first of a step."""
        everyone, own = slice(0, self.world), slice(rank, rank + 1)
        place = lambda phase, layer: int(order_of(phase, layer, self.layers))  # noqa: E731
        if phase == Phase.QKV:
            return (place(Phase.DOWN_PROJ, layer - 1), everyone) if layer else None
        if phase == Phase.GATE_UP:
            return place(Phase.O_PROJ, layer), everyone
        if phase == Phase.LM_HEAD:
            return place(Phase.DOWN_PROJ, self.layers - 1), everyone
        if phase == Phase.SAMPLE:
            return place(Phase.LM_HEAD, self.layers), everyone
        before = {Phase.ATTENTION: Phase.QKV, Phase.O_PROJ: Phase.ATTENTION, Phase.DOWN_PROJ: Phase.GATE_UP}[phase]
        return place(before, layer), own

    def _late_split(self, span, time: float) -> tuple[int, float] | None:
        """The block whose run of a long context this one merged last, if it waited for it."""
        ready = self.table["ready"][int(span["rank"]), :, int(span["order"])]
        block = int(np.argmax(ready))
        late = float(ready[block])
        merged = float(span["ready"]) < late <= float(span["end"]) and late < time
        return (block, late) if merged and block != int(span["block"]) else None

    def _work(self, span, begin: float, end: float) -> None:
        tiles = min(float(span["tiles"]), end - begin)
        self._add("compute", span, begin + tiles, end)
        self._add("tiles", span, begin, begin + tiles)

    def _hop(self, span, begin: float, end: float, source_rank: int, source_block: int) -> None:
        kind = "peer_hop" if source_rank != int(span["rank"]) else "local_hop"
        self._add(kind, span, begin, end, source_rank, source_block)

    def _add(self, kind: str, span, begin: float, end: float, source_rank: int | None = None, source_block: int = 0) -> None:
        rank, block = int(span["rank"]), int(span["block"])
        source = (rank, block) if source_rank is None else (source_rank, source_block)
        self.segments.append(Segment(kind, Phase(int(span["phase"])), int(span["layer"]), rank, block, begin, end, *source))


def _last(times: np.ndarray, first_rank: int) -> tuple[tuple[int, int], float]:
    """(rank, block) of the latest of [ranks, blocks] times, and the time."""
    rank, block = np.unravel_index(int(np.nanargmax(times)), times.shape)
    return (first_rank + int(rank), int(block)), float(times[rank, block])


# ------------------------------------------------------------------------------------------------ who is to blame
@dataclass(frozen=True)
class Suspect:
    """Where the path was longer than usual: the excess over the median of all segments' spans of that kind and phase."""

    rank: int
    block: int
    phase: Phase
    kind: str
    layer: int
    us: float
    usual_us: float

    @property
    def excess_us(self) -> float:
        return self.us - self.usual_us


def usual(trace: Trace) -> dict[tuple[str, Phase], float]:
    """Median µs of a block's compute and tile waits in each phase, over blocks, layers and steps."""
    out = {}
    for phase in Phase:
        s = trace.spans[trace.spans["phase"] == phase]
        if phase in (Phase.ATTENTION, Phase.GATE_UP, Phase.DOWN_PROJ, Phase.LM_HEAD):
            s = s[s["value"] > 0]  # others had nothing to do
        if not len(s):
            continue
        taken = np.where(np.isnan(s["input"]), s["begin"], s["input"])
        done = np.where(np.isnan(s["sent"]), s["end"], np.maximum(s["sent"], s["end"]))
        out["compute", phase] = float(np.median(done - taken - s["tiles"]))
        out["tiles", phase] = float(np.median(s["tiles"]))
    return out


def suspects(path: Path, usual_us: dict[tuple[str, Phase], float]) -> list[Suspect]:
    """Compute and tile waits on the path, the largest excess first. Hops are no block's own doing."""
    found = [
        Suspect(s.rank, s.block, s.phase, s.kind, s.layer, s.us, usual_us.get((s.kind, s.phase), 0.0))
        for s in path.segments
        if s.kind in ("compute", "tiles")
    ]
    return sorted(found, key=lambda s: -s.excess_us)
