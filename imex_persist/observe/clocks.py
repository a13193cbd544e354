"""One axis for the clocks of all SMs of all ranks.

Every SM counts its own clock, so an event says only when it was by its block's. These clocks do not keep one rate for a step, nor the
same rate as each other: on two H200s, interpolated over 7 ms, they were off by 50 µs. So once a layer every block pairs its clock with
its GPU's timer (cuda_src/trace.cuh), and events between two pairs are interpolated. That timer may tick as seldom as once a µs, so a
pair is moved to the line through those near it.

Timers of different GPUs are compared by words: rank 0's block 0 asks the block 0 of every other rank for its clock. An answer was read
between question and reply, so it stands for the middle of the round trip, give or take half of it, whatever each way costs. Timers are
quartz clocks, so what they differ by is a line over a run. Blocks of a rank are asked too, which says how well the timer placed them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from imex_persist.observe.units import us

WRAP = 1 << 32
LONGEST_GAP_NS = 1e9  # between two pairs: a clock of 2 GHz must not wrap twice. After a longer one a new run begins
WINDOW = 8  # pairs on each side, at most, that a pair's line is drawn through
NEAR_NS = 3e5  # and no farther away: an SM's clock keeps its rate for so long
TIMER_WRAP = 1 << 56  # events have so many bits of the timer
LONG_TRIP = 1.5  # round trips of more than so many times a partner's shortest do not count where others remain

# A block's clock and its GPU's timer, ns, at the begin of a step or, after that, of a layer.
PAIR = np.dtype([("rank", "i8"), ("block", "i8"), ("step", "i8"), ("clock", "i8"), ("timer", "i8")])
# Before `step`, `rank`'s block 0 asked at its clock `asked`; the partner's clock `answer` was back after `trip` of its own.
# Partners by number: a block of the same rank, or num_blocks + a rank, whose block 0 answered.
ALIGNMENT = np.dtype([(name, "i8") for name in ("rank", "partner", "step", "asked", "trip", "answer")])


@dataclass(frozen=True)
class Errors:
    """How far off the axis may be, in µs, as far as comparisons tell."""

    # Of a block against its rank's block 0, as words before steps tell: each block's median, and of these the largest. So one answer that
    # came late does not decide it, and one block whose clock is wrong does. How unlike the words' two ways are is in it.
    blocks: float = 0.0
    ranks: float = 0.0  # of a rank's timer against rank 0's: half the round trips that were used
    drift: float | None = 0.0  # of a comparison of timers from the line through all; None: too few to say
    timer: float = 0.0  # of a pair from the line between those beside it, 99 of 100 times; half a tick of the timer at least

    @property
    def text(self) -> str:
        """What console and page say of them; nothing where all have one clock."""
        if not self.timer:
            return ""
        starts = [f"{name} within {us(value)}" for name, value in (("blocks", self.blocks), ("ranks", self.ranks)) if value]
        line = f" (their comparisons keep to a line within {us(self.drift)})" if self.ranks and self.drift is not None else ""
        begin = f"where steps begin: {', '.join(starts)}{line}; " if starts else ""
        return f"Clocks agree {begin}within a step: {us(self.timer)}."


class _Pairs:
    """PAIRs in order, and where the first of (rank, block, step) is."""

    def __init__(self, pairs: np.ndarray, one_timer: bool):
        keys = self._key(pairs["rank"], pairs["block"], pairs["step"])
        order = np.argsort(keys, kind="stable")
        self.records, self._keys = pairs[order], keys[order]
        # Each rank's from its own first, unless they share one: small numbers, whatever timers of different GPUs are to each other, and
        # whatever the bits are that events have of them.
        self.timer, self.origin_ns = np.zeros(len(pairs), np.int64), 0
        timers = self.records["rank"] * (not one_timer)
        for of in np.unique(timers).tolist()[::-1]:  # rank 0's last: the origin is its
            mine = timers == of
            read = self.records["timer"][mine]
            since = signed(read - read[0], TIMER_WRAP)
            self.timer[mine] = since - since.min()
            self.origin_ns = int((read[0] + since.min()) % TIMER_WRAP)
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
        self._pairs = _Pairs(pairs, one_timer=True)
        self.origin_ns = self._pairs.origin_ns

    def place(self, rank, block, step, clock) -> np.ndarray:
        """µs since `origin_ns` of clocks read in steps that have a pair; NaN where nothing places them. Arrays of one length."""
        at, found = self._pairs.find(rank, block, step)
        times = (self._pairs.timer[at] + (clock - self._pairs.records["clock"][at]) % WRAP) / 1e3
        return np.where(found, times, np.nan)


@dataclass(frozen=True)
class _Line:
    """Straight between knots; beyond the first and the last as between the nearest ones, or with `slope` where there is but one."""

    x: np.ndarray
    y: np.ndarray
    slope: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        before, after = np.minimum(x - self.x[0], 0.0), np.maximum(x - self.x[-1], 0.0)
        few = slice(None, WINDOW), slice(-WINDOW, None)
        return np.interp(x, self.x, self.y) + before * self._slope(few[0]) + after * self._slope(few[1])

    def _slope(self, knots: slice) -> float:
        x, y = self.x[knots], self.y[knots]
        return float((y[-1] - y[0]) / (x[-1] - x[0])) if x[-1] > x[0] else self.slope


class AlignedClocks:
    """The clocks of GPUs, from PAIRs and ALIGNMENTs. A rank whose timer nothing compares with rank 0's is placed nowhere."""

    def __init__(self, pairs: np.ndarray, alignments: np.ndarray, num_blocks: int, world_size: int):
        self._pairs = _Pairs(pairs, one_timer=False)
        self.origin_ns = self._pairs.origin_ns
        self.ghz = tuple(self._rate(rank) for rank in range(world_size))  # a rank's ticks a ns
        smooth, self._lines = self._smooth(), {}  # (run, rank, block) -> from its ticks to its GPU's timer
        records = self._pairs.records
        which = self._pairs.run << 32 | records["rank"] << 16 | records["block"]
        for group in np.split(np.arange(len(which)), np.nonzero(np.diff(which))[0] + 1):
            if len(group):
                of = records[group[0]]
                key = int(self._pairs.run[group[0]]), int(of["rank"]), int(of["block"])
                self._lines[key] = _Line(self._pairs.ticks[group].astype(np.float64), smooth[group], 1 / self.ghz[key[1]])
        self._trips: list[float] = []
        self._drifts: list[float] = []
        self._apart: dict[tuple[int, int], list[float]] = {}  # (rank, block) -> from its rank's block 0, by words
        compared: dict[int, list[np.ndarray]] = {rank: [] for rank in range(1, world_size)}  # its timer; what rank 0's is more
        for run in np.unique(self._pairs.run).tolist():
            for rank in range(world_size):
                told = self._told(run, alignments[alignments["rank"] == rank])
                for other in range(1, world_size if rank == 0 else 0):
                    compared[other].append(self._compare(run, other, told[told["partner"] == num_blocks + other]))
                self._check(run, rank, told[told["partner"] < num_blocks])
        self._offsets = {0: np.zeros(1)}  # rank -> polynomial to add to its timer
        for rank, found in compared.items():
            self._offset(rank, np.concatenate([np.zeros((2, 0)), *found], axis=1))
        apart = max((float(np.median(found)) for found in self._apart.values() if found), default=0.0)
        ranks = max(self._trips, default=0.0) / 2
        self.errors = Errors(apart, ranks, max(self._drifts, default=None), self._between())

    def place(self, rank, block, step, clock) -> np.ndarray:
        """As SharedClock.place."""
        ticks, runs, found = self._ticks(rank, block, step, clock)
        out = np.full(len(ticks), np.nan)
        group = (runs << 32 | np.asarray(rank, np.int64) << 16 | block) * found - ~found
        order = np.argsort(group, kind="stable")
        for mine in np.split(order, np.nonzero(np.diff(group[order]))[0] + 1):
            if len(mine) and found[mine[0]]:
                run, of_rank = int(runs[mine[0]]), int(rank[mine[0]])
                offset = self._offsets.get(of_rank)
                if offset is not None:
                    times = self._lines[run, of_rank, int(block[mine[0]])](ticks[mine])
                    out[mine] = (times + np.polyval(offset, times)) / 1e3
        return out

    def _ticks(self, rank, block, step, clock) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(clocks counted on from their block's first pair, their runs, which of them are right)."""
        at, found = self._pairs.find(rank, block, step)
        if not len(self._pairs.ticks):
            return np.zeros(len(found)), np.zeros(len(found), np.int64), found
        past = signed(
            np.asarray(clock, np.int64) - self._pairs.records["clock"][at]
        )  # an alignment is before its step's first pair
        return (self._pairs.ticks[at] + past).astype(np.float64), self._pairs.run[at], found

    def _rate(self, rank: int) -> float:
        """Ticks a ns of a rank's clocks, over its longest run."""
        spans, r = [(0, 1.0)], self._pairs.records
        for run in np.unique(self._pairs.run).tolist():
            mine = (self._pairs.run == run) & (r["rank"] == rank) & (r["block"] == 0)
            ns = int(np.ptp(self._pairs.timer[mine])) if mine.any() else 0
            if ns:
                spans.append((ns, float(np.ptp(self._pairs.ticks[mine])) / ns))
        return max(spans)[1]

    def _smooth(self) -> np.ndarray:
        """The timer's reading of every pair, moved to the line through the pairs of its block that are near, by half a tick at most."""
        p, n = self._pairs, len(self._pairs.records)
        if not n:
            return np.zeros(0)
        ticks, timer = p.ticks.astype(np.float64), p.timer.astype(np.float64)
        which = p.run << 32 | p.records["rank"] << 16 | p.records["block"]
        w, x, y, xx, xy = np.zeros((5, n))
        for offset in range(-WINDOW, WINDOW + 1):
            at = np.clip(np.arange(n) + offset, 0, n - 1)
            dx, dy = ticks[at] - ticks, timer[at] - timer
            near = (which[at] == which) & (np.abs(dy) <= NEAR_NS) & (at == np.arange(n) + offset)
            for total, term in ((w, 1.0), (x, dx), (y, dy), (xx, dx * dx), (xy, dx * dy)):
                total += np.where(near, term, 0.0)
        spread = w * xx - x * x
        usual = 1 / np.array(self.ghz)[p.records["rank"]]
        slope = np.where(spread > 0, (w * xy - x * y) / np.where(spread > 0, spread, 1.0), usual)
        half = self._ticks_ns()[p.records["rank"]] / 2
        return timer + np.clip((y - slope * x) / w, -half, half)

    def _ticks_ns(self) -> np.ndarray:
        """How seldom each rank's timer ticks, in ns."""
        p, out = self._pairs, np.ones(len(self.ghz))
        for rank in range(len(out)):
            apart = np.diff(np.unique(p.timer[p.records["rank"] == rank]))
            out[rank] = np.gcd.reduce(apart) if len(apart) else 1.0
        return out

    def _between(self) -> float:
        """Errors.timer"""
        p = self._pairs
        if len(p.records) < 3:
            return 0.0
        which = p.run << 32 | p.records["rank"] << 16 | p.records["block"]
        x, y = p.ticks.astype(np.float64), p.timer.astype(np.float64)
        beside = (which[2:] == which[:-2]) & (y[2:] - y[:-2] <= 2 * NEAR_NS) & (x[2:] > x[:-2])
        part = (x[1:-1] - x[:-2]) / np.where(beside, x[2:] - x[:-2], 1.0)
        off = np.abs(y[:-2] + (y[2:] - y[:-2]) * part - y[1:-1])[beside]
        return max(float(np.percentile(off, 99)) if len(off) else 0.0, float(self._ticks_ns().max()) / 2) / 1e3

    def _told(self, run: int, asked: np.ndarray) -> np.ndarray:
        """Alignments of a run whose asker has pairs, but for those of long round trips."""
        _, runs, found = self._ticks(asked["rank"], np.zeros(len(asked), np.int64), asked["step"], asked["asked"])
        asked = asked[found & (runs == run)]
        kept = np.zeros(len(asked), bool)
        for partner in np.unique(asked["partner"]).tolist():
            mine = asked["partner"] == partner
            kept |= mine & (asked["trip"] <= LONG_TRIP * asked["trip"][mine].min())
        return asked[kept]

    def _moments(self, run: int, asked: np.ndarray, rank, block) -> tuple[np.ndarray, np.ndarray]:
        """By their own GPUs' timers, ns: the middles of round trips, and when those who were asked, blocks of `rank`, read their clocks."""
        zero, chief = np.zeros(len(asked), np.int64), self._lines[run, int(asked["rank"][0]), 0]
        middle = chief(self._ticks(asked["rank"], zero, asked["step"], asked["asked"])[0] + asked["trip"] / 2)
        ticks, runs, found = self._ticks(zero + rank, zero + block, asked["step"], asked["answer"])
        line = self._lines.get((run, rank, block))
        answered = line(ticks) if line else np.full(len(asked), np.nan)
        return middle, np.where(found & (runs == run), answered, np.nan)

    def _compare(self, run: int, rank: int, asked: np.ndarray) -> np.ndarray:
        """[2, comparisons] of a run: a rank's timer, and how much more rank 0's was."""
        if not len(asked):
            return np.zeros((2, 0))
        middle, answered = self._moments(run, asked, rank, 0)
        known = np.isfinite(answered)
        self._trips += (asked["trip"][known] / self.ghz[0] / 1e3).tolist()
        return np.stack([answered[known], (middle - answered)[known]])

    def _offset(self, rank: int, compared: np.ndarray) -> None:
        """One line for all runs: timers go on while kernels are idle."""
        x, y = compared
        if not len(x):
            return
        if len(x) < 3 or np.ptp(x) == 0:
            self._offsets[rank] = np.array([y.mean()])
            return
        self._offsets[rank] = np.polyfit(x, y, 1)
        self._drifts.append(float(np.abs(np.polyval(self._offsets[rank], x) - y).max()) / 1e3)

    def _check(self, run: int, rank: int, asked: np.ndarray) -> None:
        for block in np.unique(asked["partner"]).tolist():
            middle, answered = self._moments(run, asked[asked["partner"] == block], rank, block)
            apart = np.abs(middle - answered)
            self._apart.setdefault((rank, block), []).extend((apart[np.isfinite(apart)] / 1e3).tolist())


def signed(clocks: np.ndarray, wrap: int = WRAP) -> np.ndarray:
    """Differences of clocks that are near: -2³¹ … 2³¹ - 1 of those of 32 bits."""
    return (clocks + wrap // 2) % wrap - wrap // 2
