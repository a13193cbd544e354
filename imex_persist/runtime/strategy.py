"""Which exchange strategy a kernel is built with: measured at start, in whole steps of the kernels that it could be.

What an exchange takes alone does not decide: in a step it stands behind blocks that end at different times, and beside the weights that
are read meanwhile (docs/performance.md). So each candidate decodes for a moment, with the model's own weights, before one becomes
resident. What was found is kept in the cache by everything it depends on; later starts build that kernel alone. SEMAPHORE is not among
the candidates: it is chosen by name only (`exchange=`).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from imex_persist.abi import Strategy
from imex_persist.device import sources
from imex_persist.errors import FaultError
from imex_persist.log import log
from imex_persist.runtime.engine import Engine
from imex_persist.runtime.group import Group
from imex_persist.runtime.mailbox import Mailbox
from imex_persist.runtime.request import Submission

FILE = "us.json"
KEPT = ("down_slices", "max_rows")  # of the plan, whatever the strategy
LEAST_LEN = 16  # max_model_len below which there is too little to time
ROUNDS = 2  # of all candidates; the better one counts, since clocks rise after a rest
TOKENS = 160  # of a trial
SKIPPED = 4  # of its steps: the first find nothing in any cache
TRIAL_S = 0.05  # after which a trial of slow steps ends, once it has had ENOUGH
ENOUGH = 8  # tokens after those
LIMIT_S = 30.0  # for a token, beyond the group's deadline
TIE = 0.99  # of the plan's time: what is not faster than that is no reason to leave it
Make = Callable[..., np.void]  # a shape with the plan's options but for those given; ValueError if none fits
Times = list[dict[str, float]]  # of each candidate, µs by rows ("1", "8": as JSON has them)


def timed_rows(shape: np.void) -> list[int]:
    """One sequence, and as many as a step has rows for."""
    return sorted({1, min(int(shape[name]) for name in ("max_rows", "num_slots", "num_pages"))})


def candidates(plan: np.void, make: Make) -> list[np.void]:
    """The plan, and what differs from it at a number of rows that is timed: no ONE_SHOT, ONE_SHOT for one row or for as many as cost the
    ring no stage (a residual in every block takes shared memory), and another strategy for the rows above."""
    world, rows, whole = (int(plan[name]) for name in ("world_size", "max_rows", "one_shot_rows"))
    if world == 1:
        return [plan]
    planned = Strategy(int(plan["strategy"]))
    other = Strategy.TWO_SHOT if planned == Strategy.ONE_SHOT_LOCAL else Strategy.ONE_SHOT_LOCAL
    made = {n: _made(plan, make, n, planned) for n in range(rows + 1)}
    free = [n for n, shape in made.items() if shape is not None and shape["ring_stages"] >= plan["ring_stages"]]
    found = [plan]
    for shape in made[0], made[1], made[max(free, default=0)], _made(plan, make, whole if whole < rows else 0, other):
        if shape is not None and all(_exchanges(shape) != _exchanges(one) for one in found):
            found.append(shape)
    return found


def _made(plan: np.void, make: Make, one_shot_rows: int, strategy: Strategy) -> np.void | None:
    """None if it does not fit, or not the memory that the plan's kernel runs over."""
    try:
        shape = make(one_shot_rows=one_shot_rows, strategy=strategy, **{name: int(plan[name]) for name in KEPT})
    except ValueError:
        return None
    return shape if shape["num_pages"] == plan["num_pages"] else None


def _exchanges(shape: np.void) -> list[str]:
    return [strategy_of(shape, rows) for rows in timed_rows(shape)]


# ---------------------------------------------------------------------------------------------------- what was found before
def remembered(group: Group, shapes: list[np.void]) -> np.void | None:
    """The fastest of the candidates if it was measured before on these GPUs. The plan, where there is nothing to choose, or no way to keep
    what would be built and found."""
    if len(shapes) == 1:
        return shapes[0]
    try:
        times = json.loads((sources.cache_dir() / _folder(group, shapes) / FILE).read_text())
        return choose(shapes, times)
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # not measured yet, or what somebody's full disk left of it
        if sources.cache_is_writable():
            return None
        group.strategy_source = "planned"
        return shapes[0]


def measure(group: Group, shapes: list[np.void], max_model_len: int) -> np.void:
    """Lets each of the group's prepared kernels decode for a moment, and remembers. Raises what ends the group meanwhile."""
    times: Times = [{} for _ in shapes]
    for _ in range(ROUNDS):
        for i, shape in enumerate(shapes):
            with group.trial(i) as mailbox:
                found = step_us(group, mailbox, shape, max_model_len)
            times[i] = {rows: min(us, times[i].get(rows, us)) for rows, us in found.items()}
    for shape, found in zip(shapes, times, strict=True):
        log(f"exchange tried: {describe(shape)}: " + ", ".join(f"{us:.4g} µs a step of {rows}" for rows, us in found.items()))
    folder = sources.cache_dir() / _folder(group, shapes)
    with contextlib.suppress(OSError):  # then the next start measures again
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f".{FILE}.{os.getpid()}"
        scratch.write_text(json.dumps(times))
        scratch.replace(folder / FILE)
    return choose(shapes, times)


def _folder(group: Group, shapes: list[np.void]) -> str:
    sizes = [[shape[name].item() for name in shape.dtype.names if name != "num_pages"] for shape in shapes]
    places = [(place.kind, place.uuid, place.ranks) for place in group.placement.places]
    # without the uuids of the identities, which the places have; a simulator's is new each time
    identities = [sorted(fact for fact in identity.items() if fact[0] != "uuid") for identity in group.identities]
    code = [*sources.source_files(without=["sim"]), Path(__file__)]
    return "exchange/" + sources.digest(code, places, identities, sizes, timed_rows(shapes[0]))


def choose(shapes: list[np.void], times: Times) -> np.void:
    """The shape whose steps take least, one row and many rows counting alike; the first, which is the plan, unless another is faster."""
    best = {rows: min(one[rows] for one in times) for rows in times[0]}
    scores = [sum(one[rows] / best[rows] for rows in best) for one in times]
    fastest = min(range(len(shapes)), key=scores.__getitem__)
    return shapes[fastest if scores[fastest] < TIE * scores[0] else 0]


# ---------------------------------------------------------------------------------------------------- a trial
def step_us(group: Group, mailbox: Mailbox, shape: np.void, max_model_len: int) -> dict[str, float]:
    """Median µs of a step of the group's kernel on trial, by rows."""
    sizes = {name: int(shape[name]) for name in ("num_slots", "num_pages", "page_size")}
    engine = Engine(mailbox, **sizes, max_model_len=max_model_len, on_silence=group.probe, share_pages=False)
    group.on_fault(engine.fail)
    rows = timed_rows(shape)
    tokens = min(TOKENS, max_model_len, sizes["num_pages"] // rows[-1] * sizes["page_size"]) - 1  # all have their pages at once
    try:
        return {str(count): _median_step(engine, count, tokens, group.deadline_s + LIMIT_S) for count in rows}
    finally:
        engine.close()


def _median_step(engine: Engine, rows: int, tokens: int, limit_s: float) -> float:
    events: queue.SimpleQueue = queue.SimpleQueue()
    requests = [engine.submit(Submission((i + 1,), tokens), events.put if i == 0 else None) for i in range(rows)]
    times: list[int] = []
    began = time.monotonic()
    while True:
        try:
            event = events.get(timeout=limit_s)
        except queue.Empty:
            raise FaultError(
                f"no token came in {limit_s:.0f} s of a trial, and no wait of the kernel expired: report this"
            ) from None
        if isinstance(event, Exception):
            raise event
        if event.token is not None:
            times.append(event.device_time_ns)
        if event.finish_reason or (len(times) > SKIPPED + ENOUGH and time.monotonic() - began > TRIAL_S):
            break
    for request in requests:
        engine.cancel(request)
    if not engine.drain(limit_s):
        raise FaultError(f"requests that were cancelled in a trial were not released in {limit_s:.0f} s: report this")
    gaps = np.diff(times)
    return float(median(gaps[min(SKIPPED, len(gaps) - 1) :])) / 1e3


# ---------------------------------------------------------------------------------------------------- for the log
def describe(shape: np.void, source: str = "") -> str:
    """ "ONE_SHOT <= 12 KB, ONE_SHOT_LOCAL above (measured)": by bytes of fp32 partial sums a rank."""
    larger, end = Strategy(int(shape["strategy"])).name, source and f" ({source})"
    rows, most = int(shape["one_shot_rows"]), int(shape["max_rows"])
    if rows == 0 or larger == "ONE_SHOT":
        return larger + end
    size = f"{rows * int(shape['hidden_size']) * 4 / 1024:.4g} KB"
    return f"ONE_SHOT <= {size}{'' if rows >= most else f', {larger} above'}{end}"


def strategy_of(shape: np.void, rows: int) -> str:
    """The strategy of a step of so many rows."""
    return "ONE_SHOT" if int(shape["one_shot_rows"]) >= rows else Strategy(int(shape["strategy"])).name
