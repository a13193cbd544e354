"""Which exchange strategy a kernel is built with: measured at start, in whole steps of the kernels that it could be.

What an exchange takes alone does not decide: in a step it stands behind blocks that end at different times, and beside the weights that
are read meanwhile (docs/performance.md). So each candidate decodes for a moment, with the model's own weights, before one becomes
resident. What was found is kept in the cache by everything it depends on; later starts build that kernel alone. SEMAPHORE is not among
the candidates: it is chosen by name only (`exchange=`).
"""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from imex_persist import abi
from imex_persist.abi import Strategy
from imex_persist.device import sources
from imex_persist.errors import FaultError
from imex_persist.runtime.engine import Engine
from imex_persist.runtime.group import Group
from imex_persist.runtime.mailbox import Mailbox
from imex_persist.runtime.request import Submission

FILE = "us.json"
KEPT = ("down_slices", "max_rows", "num_pages")  # of the plan, whatever the strategy
LEAST_LEN = 16  # max_model_len below which there is too little to time
ROUNDS = 2  # of all candidates; the better one counts, since clocks rise after a rest
TOKENS = 160  # of a trial
SKIPPED = 4  # of its steps: the first find nothing in any cache
TRIAL_S = 0.05  # after which a trial of slow steps ends, once it has had ENOUGH
ENOUGH = 8  # tokens after those
LIMIT_S = 30.0  # for a trial beyond the group's deadline
TIE = 0.99  # of the plan's time: what is not faster than that is no reason to leave it
Make = Callable[[int, Strategy], np.void]  # a shape with so many one_shot_rows and this strategy above; ValueError if none fits


def candidates(plan: np.void, make: Make) -> list[np.void]:
    """The plan, and what could be faster: no ONE_SHOT, ONE_SHOT for one row or for as many as cost the ring no stage (a residual in every
    block takes shared memory), and another strategy for the rows above."""
    world, rows, whole = (int(plan[name]) for name in ("world_size", "max_rows", "one_shot_rows"))
    if world == 1:
        return [plan]
    planned = Strategy(int(plan["strategy"]))
    other = Strategy.TWO_SHOT if planned == Strategy.ONE_SHOT_LOCAL else Strategy.ONE_SHOT_LOCAL
    free = [n for n in range(rows, 0, -1) if (s := _made(plan, make, n, planned)) and s["ring_stages"] >= plan["ring_stages"]]
    found = [plan]
    for wanted in (0, planned), (1, planned), (max(free, default=0), planned), (whole if whole < rows else 0, other):
        shape = _made(plan, make, *wanted)
        if shape is not None and all(_names(shape) != _names(one) for one in found):
            found.append(shape)
    return found


def _made(plan: np.void, make: Make, one_shot_rows: int, strategy: Strategy) -> np.void | None:
    """None if it does not fit, or not the memory that the plan's kernel runs over."""
    try:
        shape = make(one_shot_rows, strategy)
    except ValueError:
        return None
    return shape if all(shape[name] == plan[name] for name in KEPT) else None


def _names(shape: np.void) -> tuple[int, int]:
    """What makes a strategy of a shape: above the most rows there is nothing."""
    whole = int(shape["one_shot_rows"])
    return whole, -1 if whole >= shape["max_rows"] else int(shape["strategy"])


# ---------------------------------------------------------------------------------------------------- what was found before
def remembered(group: Group, shapes: list[np.void]) -> np.void | None:
    """The fastest of the candidates, if it was measured before on these GPUs; of one candidate nothing needs to be known."""
    if len(shapes) == 1:
        return shapes[0]
    path = sources.cache_dir() / _folder(group, shapes) / FILE
    return choose(shapes, json.loads(path.read_text())) if path.is_file() else None


def measure(group: Group, shapes: list[np.void], max_model_len: int) -> np.void:
    """Lets each of the group's prepared kernels decode for a moment, and remembers. Raises FaultError where one does not."""

    def make(folder: Path) -> None:
        limit_s = group.deadline_s + LIMIT_S
        times: list[dict[str, float]] = [{} for _ in shapes]
        for _ in range(ROUNDS):
            for i, shape in enumerate(shapes):
                with group.trial(i) as mailbox:
                    found = step_us(mailbox, shape, max_model_len, limit_s)
                times[i] = {rows: min(us, times[i].get(rows, us)) for rows, us in found.items()}
        (folder / FILE).write_text(json.dumps(times))

    path = sources.cached(_folder(group, shapes), make) / FILE
    return choose(shapes, json.loads(path.read_text()))


def _folder(group: Group, shapes: list[np.void]) -> str:
    sizes = [[shape[name].item() for name in shape.dtype.names if name != "num_pages"] for shape in shapes]
    places = [(place.kind, place.uuid, place.ranks) for place in group.placement.places]
    identities = [
        sorted(fact for fact in identity.items() if fact[0] != "uuid") for identity in group.identities
    ]  # the places'
    return "exchange/" + sources.digest(sources.source_files(without=["sim"]), places, identities, sizes)


def choose(shapes: list[np.void], times: list[dict[str, float]]) -> np.void:
    """The shape whose steps take least, one row and many rows counting alike; the first, which is the plan, unless another is faster."""
    best = {rows: min(one[rows] for one in times) for rows in times[0]}
    scores = [sum(one[rows] / best[rows] for rows in best) for one in times]
    fastest = min(range(len(shapes)), key=scores.__getitem__)
    return shapes[fastest if scores[fastest] < TIE * scores[0] else 0]


# ---------------------------------------------------------------------------------------------------- a trial
def step_us(mailbox: Mailbox, shape: np.void, max_model_len: int, limit_s: float) -> dict[str, float]:
    """Median µs of a step, by rows (as JSON has them: "1", "8"): one sequence, and as many as a step has rows for."""
    sizes = {name: int(shape[name]) for name in ("num_slots", "num_pages", "page_size")}
    engine = Engine(mailbox, **sizes, max_model_len=max_model_len, share_pages=False)
    most = min(int(shape["max_rows"]), sizes["num_slots"], sizes["num_pages"])
    tokens = (
        min(TOKENS, max_model_len, sizes["num_pages"] // most * sizes["page_size"]) - 1
    )  # all sequences have their pages at once
    try:
        return {str(rows): _median_step(engine, rows, tokens, limit_s) for rows in sorted({1, most})}
    finally:
        engine.close()


def _median_step(engine: Engine, rows: int, tokens: int, limit_s: float) -> float:
    events: queue.SimpleQueue = queue.SimpleQueue()
    requests = [engine.submit(Submission((i + 1,), tokens), events.put if i == 0 else None) for i in range(rows)]
    times: list[int] = []
    began = time.monotonic()
    while True:
        try:
            event = events.get(timeout=max(0.0, began + limit_s - time.monotonic()))
        except queue.Empty:
            raise FaultError(f"a trial of the exchange gave {len(times)} tokens in {limit_s:.0f} s and then none") from None
        if isinstance(event, Exception):
            raise event
        if event.token is not None:
            times.append(event.device_time_ns)
        if event.finish_reason or (len(times) > SKIPPED + ENOUGH and time.monotonic() - began > TRIAL_S):
            break
    for request in requests:
        engine.cancel(request)
    if not engine.drain(limit_s):
        raise FaultError(f"a trial of the exchange did not end in {limit_s:.0f} s")
    gaps = np.diff(times)
    return float(median(gaps[min(SKIPPED, len(gaps) - 1) :])) / 1e3


# ---------------------------------------------------------------------------------------------------- for the log
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
