"""Which exchange strategy for which number of rows, where `exchange=MEASURED` asks: measured at start on the GPUs that will use it.

Before anything is loaded the workers run the exchange alone (cuda_src/bench/exchange.cu) with each strategy at the row counts of the
shape, which takes well under a second once its kernels are built. The result is kept in the cache by everything that it depends on.
SEMAPHORE is not among them: a kernel that uses it does so in every step, so it is chosen by name only (`exchange=`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imex_persist import abi, planner
from imex_persist.abi import Strategy
from imex_persist.device import sources
from imex_persist.planner import Machine
from imex_persist.runtime import exchange
from imex_persist.runtime.group import Group

FILE = "us.json"
CANDIDATES = (Strategy.ONE_SHOT, Strategy.ONE_SHOT_LOCAL, Strategy.TWO_SHOT)
WARMUP, TURNS = 40, 400  # exchanges of a launch
KEPT = ("down_slices", "max_rows", "num_pages")  # of the plan, whatever the choice
TIE = 1.02  # one hop is preferred to two that are as fast
Times = dict[Strategy, dict[int, float]]  # µs by rows


@dataclass(frozen=True)
class Choice:
    """Steps of up to `one_shot_rows` rows exchange ONE_SHOT, larger ones by `strategy`."""

    one_shot_rows: int
    strategy: Strategy


def measured_choice(group: Group, plan: np.void, machine: Machine) -> Choice:
    """What is fastest for the ranks of an opened `group` in a kernel of `plan`'s sizes. Raises what a worker raises."""
    key = sources.digest(
        sources.source_files(without=["sim"]),
        [(place.uuid, place.ranks) for place in group.placement.places],
        [sorted(identity.items()) for identity in group.identities],
        *(int(plan[name]) for name in ("hidden_size", "world_size", "max_rows", "num_blocks", "down_slices", "bf16_partials")),
    )

    def make(folder: Path) -> None:
        times = measure(group, plan, machine)
        (folder / FILE).write_text(json.dumps({strategy.name: by_rows for strategy, by_rows in times.items()}))

    text = (sources.cached(f"exchange/{key}", make) / FILE).read_text()
    return choose({Strategy[name]: {int(r): us for r, us in by_rows.items()} for name, by_rows in json.loads(text).items()})


def measure(group: Group, plan: np.void, machine: Machine) -> Times:
    """µs of one exchange, o_proj's and down_proj's in turn, by strategy and rows; a strategy lacks rows that do not fit its memory."""
    shapes = {strategy: _largest(plan, machine, strategy) for strategy in CANDIDATES}
    group.build_bench_kernels("exchange.cu", list(shapes.values()))
    times: Times = {}
    for strategy, shape in shapes.items():
        run = group.bench_kernel("exchange.cu", shape)
        times[strategy] = {
            rows: max(run(exchange.job(rows, warmup=WARMUP, iterations=TURNS)).values()) / TURNS / 1e3
            for rows in rows_to_try(int(plan["max_rows"]))
            if rows <= shape["max_rows"]
        }
    return times


def rows_to_try(most: int) -> list[int]:
    """1, 2, 4, … and the largest."""
    return sorted({rows for rows in (1, 2, 4, 8, 16) if rows <= most} | {most})


def _largest(plan: np.void, machine: Machine, strategy: Strategy) -> np.void:
    """The shape of the exchange alone with as many of the plan's rows as fit; one row always does."""
    for rows in range(int(plan["max_rows"]), 0, -1):
        try:
            return planner.exchange_shape(
                int(plan["hidden_size"]),
                world_size=int(plan["world_size"]),
                max_rows=rows,
                machine=machine,
                strategy=strategy,
                down_slices=int(plan["down_slices"]),
                bf16_partials=bool(plan["bf16_partials"]),
            )
        except ValueError:
            if rows == 1:
                raise
    raise AssertionError("unreachable")


def choose(times: Times) -> Choice:
    """ONE_SHOT up to the largest number of rows below which nothing is faster; above it what takes least time over all rows tried."""
    others = [strategy for strategy in times if strategy != Strategy.ONE_SHOT]
    one_shot_rows = 0
    for rows, us in sorted(times[Strategy.ONE_SHOT].items()):
        if us > TIE * min(times[other][rows] for other in others):
            break
        one_shot_rows = rows
    above = [rows for rows in times[others[0]] if rows > one_shot_rows] or list(times[others[0]])
    return Choice(one_shot_rows, min(others, key=lambda other: sum(times[other][rows] for rows in above)))


def replan(choice: Choice, plan: np.void, make: Callable[[Choice], np.void]) -> np.void:
    """`plan` with the choice in it, as far as it costs the kernel no ring stage: a residual in every block takes shared memory."""
    for rows in range(choice.one_shot_rows, -1, -1):
        try:
            shape = make(Choice(rows, choice.strategy))
        except ValueError:
            continue
        if shape["ring_stages"] >= plan["ring_stages"] and all(shape[name] == plan[name] for name in KEPT):
            return shape
    return plan


def describe(shape: np.void, source: str) -> str:
    """ "ONE_SHOT <= 12 KB, ONE_SHOT_LOCAL above (measured)": by bytes of fp32 partial sums a rank."""
    larger = Strategy(int(shape["strategy"])).name
    rows, most = int(shape["one_shot_rows"]), int(shape["max_rows"])
    if rows == 0 or larger == "ONE_SHOT":
        return f"{larger} ({source})"
    size = f"{rows * int(shape['hidden_size']) * 4 / 1024:.4g} KB"
    return f"ONE_SHOT <= {size}{'' if rows >= most else f', {larger} above'} ({source})"


def of_one_row(shape: np.void) -> str:
    """The strategy of a step of one row."""
    return "ONE_SHOT" if int(shape["one_shot_rows"]) >= 1 else abi.Strategy(int(shape["strategy"])).name
