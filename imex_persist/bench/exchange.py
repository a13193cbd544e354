"""`imex-persist bench exchange`: every strategy at every size, until every block of every rank holds the whole sum.

The loop is timed inside the kernel, each exchange after the one before. Its results are checked bit for bit in the same launch.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from statistics import median

import numpy as np

from imex_persist import abi, planner
from imex_persist.bench import sums
from imex_persist.bench.ranks import Ranks
from imex_persist.errors import FaultError
from imex_persist.runtime import capacity

LOOPS = {"cuda": (200, 2000), "sim": (1, 4)}  # warm-up and timed iterations of a launch
SOURCE = "exchange.cu"
# exchanges between two zeroings of all words: before their epochs begin again, with room for the one that measures the error
MAX_EPOCHS = planner.EXCHANGES_A_STEP * planner.EXCHANGE_STEPS - 8
RUNS = {"cuda": 3, "sim": 1}


@dataclass(frozen=True)
class Variant:
    """A column of the table."""

    name: str
    strategy: abi.Strategy
    float24: bool = False
    gather: bool = False

    @property
    def kind(self) -> abi.Probe:
        return abi.Probe.ALL_GATHER if self.gather else abi.Probe.ALL_REDUCE


VARIANTS = (
    *(Variant(strategy.name, strategy) for strategy in abi.Strategy),
    *(Variant(f"{s.name} float24", s, float24=True) for s in abi.Strategy if s != abi.Strategy.SEMAPHORE),
    Variant("all-gather", abi.Strategy.ONE_SHOT, gather=True),
)


def measure(ranks: Ranks, sizes: list[int], hidden_size: int) -> list[dict]:
    """A row for each variant and size: {"variant", "values", "rows", "us"}, or "why_not" instead of "us".

    A size above `hidden_size` is so many rows of it. Raises ValueError for sizes that are no whole rows, FaultError for a wrong bit.
    """
    check_sizes(sizes, hidden_size)
    small = [(size, [1]) for size in sizes if size <= hidden_size]
    large = [size // hidden_size for size in sizes if size > hidden_size]
    todo = [
        (variant, hidden, rows) for variant in VARIANTS for hidden, rows in [*small, *([(hidden_size, large)] if large else [])]
    ]
    ranks.build(SOURCE, _shapes(ranks, todo))
    return [row for variant, hidden, rows in todo for row in _measure(ranks, variant, hidden, rows)]


def _shapes(ranks: Ranks, todo: list[tuple[Variant, int, list[int]]]) -> list[np.void]:
    found = []
    for variant, hidden, rows in todo:
        with suppress(ValueError):  # `_measure` says why
            found.append(shape_for(ranks, variant, hidden, max(rows)))
    return found


def check_sizes(sizes: list[int], hidden_size: int) -> None:
    """Raises ValueError for what is no exchange."""
    if hidden_size < 32:
        raise ValueError(f"--hidden-size is {hidden_size}: at least 32 is needed")
    if not sizes:
        raise ValueError("--sizes needs at least one number above 0")
    for size in sizes:
        rows = -(-size // hidden_size)
        if size % (32 * rows) or size != min(size, hidden_size) * rows or rows > abi.MAX_ROWS:
            raise ValueError(
                f"{size} values are no exchange: multiples of 32 up to --hidden-size {hidden_size}, and whole rows of it up to "
                f"{abi.MAX_ROWS}, are"
            )


def shape_for(ranks: Ranks, variant: Variant, hidden: int, max_rows: int):
    each = max(len(place.ranks) for place in ranks.placement.places)
    return planner.exchange_shape(
        hidden,
        world_size=ranks.world_size,
        max_rows=max_rows,
        machine=capacity.shared_machine(ranks.machines, each),
        strategy=variant.strategy,
        float24_partials=variant.float24,
    )


def _measure(ranks: Ranks, variant: Variant, hidden: int, rows: list[int]) -> list[dict]:
    names = [{"variant": variant.name, "values": hidden * r, "rows": r} for r in rows]
    try:
        shape = shape_for(ranks, variant, hidden, max(rows))
    except ValueError as error:
        return [name | {"why_not": str(error)} for name in names]
    warmup, loops = LOOPS[ranks.placement.kind]
    epoch = MAX_EPOCHS
    for name in names:
        times = []
        if epoch + RUNS[ranks.placement.kind] * (warmup + loops) > MAX_EPOCHS:
            ranks.prepare(SOURCE, shape)  # zeroes all words
            epoch = 0
        for _ in range(RUNS[ranks.placement.kind]):
            job = sums.job(name["rows"], warmup=warmup, iterations=loops, kind=variant.kind)
            times.append(max(ranks.run(job).values()) / loops / 1e3)
            epoch += warmup + loops
            check(ranks, shape, job, epoch, name)
        name["us"] = median(times)
        name["blocks"] = int(shape["num_blocks"])
    if not variant.gather:
        job = sums.job(max(rows), warmup=0, iterations=1, kind=variant.kind, fractions=True)
        ranks.run(job)
        error = sums.errors(shape, max(rows), ranks.results())
        for name in names:
            name["error"] = error
    return names


def check(ranks: Ranks, shape, job: dict, epoch: int, name: dict) -> None:
    """Every block's check of what it ended with. Raises FaultError, naming who has something else."""
    expected = sums.checks(shape, job, epoch)
    for rank, values in ranks.results(int(shape["num_blocks"])).items():
        wrong = [block for block in range(int(shape["num_blocks"])) if values[block] != expected]
        if wrong:
            raise FaultError(
                f"exchange {name['variant']} of {name['values']} values: {len(wrong)} of {int(shape['num_blocks'])} blocks of rank "
                f"{rank} ended with a wrong sum, block {wrong[0]} first: do not use this machine or strategy, and report this"
            )


def least_us(values: int, blocks: int, one_way_us: float, l2_gb_s: float) -> float:
    """No exchange by words is faster: a word on its way, and every block reads the sums, bare words of 2 bytes a value, from L2."""
    return one_way_us + blocks * values * 2 / l2_gb_s / 1e3
