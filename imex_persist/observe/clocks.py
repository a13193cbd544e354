"""One axis for the clocks of all SMs of all ranks.

Every SM counts its own clock, so an event says only when it was by its block's. The kernel aligns them (cuda_src/trace.cuh): now and
then rank 0's block 0 asks the block 0 of every rank, and each block 0 those of its rank, for their clocks. An answer was read between
question and reply, so it stands for the middle of the round trip, give or take half of it, whatever each way costs. In between, clocks
are interpolated; how far an alignment lies from the line through those beside it is the drift that `Errors` states.

So every event has a time by one clock, that of rank 0's block 0. What a tick of it is in ns comes from its pairs with the GPU's timer,
one a step. That timer may tick as seldom as once a µs, so lines are drawn through neighbouring pairs. What error is left there stretches
the axis for all blocks alike, and never puts one before another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WRAP = 1 << 32
LONGEST_GAP_NS = 1e9  # between two pairs: a clock of 2 GHz must not wrap twice. After a longer one a new run begins
WINDOW = 8  # pairs on each side that the timer's line is drawn through
LONG_TRIP = 1.5  # round trips of more than so many times a partner's shortest do not count where others remain

# A block's clock and its GPU's timer, ns, at the begin of a step.
PAIR = np.dtype([("rank", "i8"), ("block", "i8"), ("step", "i8"), ("clock", "i8"), ("timer", "i8")])
# Before `step`, `rank`'s block 0 asked at its clock `asked`; the partner's clock `answer` was back after `trip` of its own.
# Partners by number: a block of the same rank, or num_blocks + a rank, whose block 0 answered.
ALIGNMENT = np.dtype([(name, "i8") for name in ("rank", "partner", "step", "asked", "trip", "answer")])


@dataclass(frozen=True)
class Errors:
    """How far off the axis may be, in µs. `blocks` and `ranks` are bounds: half the round trips that were used."""

    blocks: float = 0.0  # of a block against its rank's block 0
    ranks: float = 0.0  # of a rank's block 0 against rank 0's
    drift: float | None = 0.0  # of an alignment from the line through those beside it; None: too few to say
    timer: float = 0.0  # of the timer from its lines
    spread: float = (
        0.0  # of the blocks' own readings of the timer from the axis: what aligning by the timer alone would be off by
    )


class _Pairs:
    """PAIRs in order, and where the one of (rank, block, step) is."""

    def __init__(self, pairs: np.ndarray):
        keys = self._key(pairs["rank"], pairs["block"], pairs["step"])
        order = np.argsort(keys, kind="stable")
        self.records, self._keys = pairs[order], keys[order]
        self.origin_ns = int(pairs["timer"].min()) if len(pairs) else 0
        self.timer = self.records["timer"] - self.origin_ns
        new = np.diff(self.records["rank"] << 16 | self.records["block"], prepend=-1) != 0
        since = np.where(new, 0, np.diff(self.records["clock"], prepend=0) % WRAP)
        total = np.cumsum(since)  # a block's clock, counted on from its first pair
        self.ticks = total - total[np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))]
        chief = (self.records["rank"] == 0) & (self.records["block"] == 0)
        late = np.diff(self.timer[chief], prepend=self.timer[chief][:1]) > LONGEST_GAP_NS
        first = self.records["step"][chief][late]  # of the runs after the first
        self.run = np.searchsorted(first, self.records["step"], side="right")

    @staticmethod
    def _key(rank, block, step):
        return (np.asarray(rank, np.int64) << 12 | block) << 40 | step

    def find(self, rank, block, step) -> tuple[np.ndarray, np.ndarray]:
        """(places, which of them are right)."""
        key = self._key(rank, block, step)
        at = np.minimum(np.searchsorted(self._keys, key), max(0, len(self._keys) - 1))
        return at, self._keys[at] == key if len(self._keys) else np.zeros(len(key), bool)


class SharedClock:
    """The simulator's: all blocks have one clock, of 1 GHz, which is the timer too."""

    ghz, errors = (1.0,), Errors()

    def __init__(self, pairs: np.ndarray):
        self._pairs = _Pairs(pairs)
        self.origin_ns = self._pairs.origin_ns

    def place(self, rank, block, step, clock) -> np.ndarray:
        """µs since `origin_ns` of clocks read in steps that have a pair; NaN where nothing places them. Arrays of one length."""
        at, found = self._pairs.find(rank, block, step)
        times = (self._pairs.timer[at] + (clock - self._pairs.records["clock"][at]) % WRAP) / 1e3
        return np.where(found, times, np.nan)


@dataclass(frozen=True)
class _Line:
    """Straight between knots, on with `slope` beyond the first and the last."""

    x: np.ndarray
    y: np.ndarray
    slope: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if not len(self.x):
            return np.full(len(x), np.nan)
        beyond = np.minimum(x - self.x[0], 0.0) + np.maximum(x - self.x[-1], 0.0)
        return np.interp(x, self.x, self.y) + beyond * self.slope


class AlignedClocks:
    """The clocks of GPUs, from PAIRs and ALIGNMENTs. What no alignment reaches is placed nowhere."""

    def __init__(self, pairs: np.ndarray, alignments: np.ndarray, num_blocks: int, world_size: int):
        self._blocks, self._world = num_blocks, world_size
        self._pairs = _Pairs(pairs)
        self.origin_ns = self._pairs.origin_ns
        self.ghz = tuple(self._rate(rank) for rank in range(world_size))  # a rank's ticks a ns
        self._trips: dict[str, list[float]] = {"blocks": [], "ranks": []}
        self._drifts: list[float] = []
        self._timer_errors: list[float] = []
        self._lines: dict[tuple[int, int, int], tuple[_Line, ...]] = {}  # (run, rank, block) -> from its ticks to ns
        for run in np.unique(self._pairs.run).tolist():
            self._align(run, alignments)
        trips = {name: max(found, default=0.0) / 2 for name, found in self._trips.items()}
        self.errors = Errors(
            trips["blocks"],
            trips["ranks"],
            max(self._drifts, default=None),
            max(self._timer_errors, default=0.0),
            self._spread(),
        )

    def place(self, rank, block, step, clock) -> np.ndarray:
        """As SharedClock.place."""
        at, found = self._pairs.find(rank, block, step)
        ticks = (self._pairs.ticks[at] + (clock - self._pairs.records["clock"][at]) % WRAP).astype(np.float64)
        out = np.full(len(ticks), np.nan)
        group = (self._pairs.run[at] << 32 | np.asarray(rank, np.int64) << 16 | block) * found - ~found
        order = np.argsort(group, kind="stable")
        for mine in np.split(order, np.nonzero(np.diff(group[order]))[0] + 1):
            if len(mine) and found[mine[0]]:
                times = ticks[mine]
                for line in self._lines[int(self._pairs.run[at[mine[0]]]), int(rank[mine[0]]), int(block[mine[0]])]:
                    times = line(times)
                out[mine] = times / 1e3
        return out

    def _of(self, run: int, rank: int, block: int) -> np.ndarray:
        r = self._pairs.records
        return np.nonzero((self._pairs.run == run) & (r["rank"] == rank) & (r["block"] == block))[0]

    def _rate(self, rank: int) -> float:
        """Ticks a ns of a rank's clocks, over its longest run."""
        spans = [(0, 1.0)]
        for run in np.unique(self._pairs.run).tolist():
            mine = self._of(run, rank, 0)
            ns = int(np.ptp(self._pairs.timer[mine])) if len(mine) else 0
            if ns:
                spans.append((ns, float(np.ptp(self._pairs.ticks[mine])) / ns))
        return max(spans)[1]

    def _align(self, run: int, alignments: np.ndarray) -> None:
        by_timer = self._timer(run)
        for rank in range(self._world):
            of_rank = ()
            if rank:
                mine = (alignments["rank"] == 0) & (alignments["partner"] == self._blocks + rank)
                of_rank = (self._line(run, alignments[mine], (0, 0), (rank, 0), "ranks"),)
            self._lines[run, rank, 0] = (*of_rank, by_timer)
            for block in range(1, self._blocks):
                mine = (alignments["rank"] == rank) & (alignments["partner"] == block)
                line = self._line(run, alignments[mine], (rank, 0), (rank, block), "blocks")
                self._lines[run, rank, block] = (line, *of_rank, by_timer)

    def _line(self, run: int, asked: np.ndarray, asker: tuple[int, int], teller: tuple[int, int], which: str) -> _Line:
        """From the teller's ticks to the asker's."""
        (of_asker, a_found), (of_teller, t_found) = (self._pairs.find(*who, asked["step"]) for who in (asker, teller))
        kept = a_found & t_found
        kept &= (self._pairs.run[of_asker] == run) & (self._pairs.run[of_teller] == run) if len(asked) else False
        if kept.any():
            kept &= asked["trip"] <= LONG_TRIP * asked["trip"][kept].min()
        asked, of_asker, of_teller = asked[kept], of_asker[kept], of_teller[kept]
        clock, ticks = self._pairs.records["clock"], self._pairs.ticks
        middle = ticks[of_asker] + _signed(asked["asked"] - clock[of_asker]) + asked["trip"] / 2
        told = (ticks[of_teller] + _signed(asked["answer"] - clock[of_teller])).astype(np.float64)
        ghz = self.ghz[asker[0]]
        self._trips[which] += (asked["trip"] / ghz / 1e3).tolist()
        if len(told) > 2:
            x = (told[1:-1] - told[:-2]) / (told[2:] - told[:-2])
            beside = middle[:-2] + (middle[2:] - middle[:-2]) * x
            self._drifts.append(float(np.abs(middle[1:-1] - beside).max()) / ghz / 1e3)
        return _Line(told, middle, ghz / self.ghz[teller[0]])

    def _timer(self, run: int) -> _Line:
        """From the ticks of rank 0's block 0 to ns: its pairs, each moved to the mean of the line through those around it."""
        chief = self._of(run, 0, 0)
        ticks, timer = self._pairs.ticks[chief].astype(np.float64), self._pairs.timer[chief].astype(np.float64)
        smooth = timer.copy()
        for i in range(len(chief)):
            near = slice(max(0, i - WINDOW), i + WINDOW + 1)
            x, y = ticks[near] - ticks[i], timer[near]
            if len(x) > 2:
                slope, smooth[i] = np.polyfit(x, y, 1)
                self._timer_errors.append(float(np.abs(y - slope * x - smooth[i]).max()) / 1e3)
        return _Line(ticks, smooth, 1.0 / self.ghz[0])

    def _spread(self) -> float:
        r = self._pairs.records
        if not len(r):
            return 0.0
        off = self.place(r["rank"], r["block"], r["step"], r["clock"]) - self._pairs.timer / 1e3
        for rank in range(self._world):  # the ranks' timers may differ by whatever
            off[r["rank"] == rank] -= np.nanmedian(off[r["rank"] == rank]) if np.isfinite(off[r["rank"] == rank]).any() else 0.0
        return float(np.nanmax(np.abs(off))) if np.isfinite(off).any() else 0.0


def _signed(clocks: np.ndarray) -> np.ndarray:
    """Differences of 32-bit clocks that are near: -2³¹ … 2³¹ - 1."""
    return (clocks + WRAP // 2) % WRAP - WRAP // 2
