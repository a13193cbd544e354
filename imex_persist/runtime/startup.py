"""What the start of an engine says: fixed log lines that a script can check, and progress while weights load."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

from imex_persist import planner
from imex_persist.runtime import strategy
from imex_persist.runtime.group import Group
from imex_persist.runtime.peers import describe_peers
from imex_persist.runtime.placement import Placement


def check_environment(placement: Placement) -> None:
    """Refuses settings under which a resident kernel hangs. Raises ValueError."""
    if placement.kind == "cuda" and os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        raise ValueError("CUDA_LAUNCH_BLOCKING is set: every launch would wait for a kernel that never returns, so unset it")


def lines(shape: np.void, group: Group, fixed: dict[str, int] | None = None) -> list[str]:
    """The log lines of a resident group; with `fixed`, which is capacity.fixed_bytes, also what each rank has allocated."""
    world = int(shape["world_size"])
    out = [f"world size: {world}, rank: {rank}" for rank in range(world)]
    out.append(f"topology: {describe_peers(group.placement.places)}")
    if world == 1:
        out.append("exchange: not needed (one rank)")
    else:
        out.append("exchange: ENABLED (in-kernel, tagged words)")
        out.append(f"all-reduce strategy: {strategy.describe(shape, group.strategy_source)}")
    if fixed is not None:
        positions, other = int(shape["num_pages"]) * int(shape["page_size"]), fixed["symmetric_bytes"] + fixed["table_bytes"]
        out.append(
            f"memory of a rank: weights {fixed['weight_bytes'] / 1e9:.2f} GB, KV pages {planner.kv_bytes(shape) / 1e9:.2f} GB "
            f"({positions} positions), words {other / 1e6:.1f} MB"
        )
    out.append(f"kernel: resident, {int(shape['num_blocks'])} blocks, {group.identities[0].get('arch', 'unknown')}")
    return out


@contextlib.contextmanager
def progress_bar(world_size: int, *, every_s: float = 0.1) -> Iterator[Callable[[int, int, int], None] | None]:
    """`progress(rank, bytes, total)` that draws one line on a terminal: bytes of all ranks and GB/s. Elsewhere None."""
    if not sys.stderr.isatty():
        yield None
        return
    start = time.monotonic()
    seen: dict[int, tuple[int, int]] = {}
    drawn = 0.0

    def draw(end: str = "") -> None:
        done = sum(d for d, _ in seen.values())
        total = sum(t for _, t in seen.values()) * world_size // max(1, len(seen))
        rate = done / max(1e-9, time.monotonic() - start) / 1e9
        filled = round(24 * done / max(1, total))
        bar = "#" * filled + "." * (24 - filled)
        sys.stderr.write(f"\r[imex] loading [{bar}] {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate:.2f} GB/s{end}")
        sys.stderr.flush()

    def progress(rank: int, done: int, total: int) -> None:
        nonlocal drawn
        seen[rank] = (done, total)
        if time.monotonic() - drawn > every_s:
            drawn = time.monotonic()
            draw()

    try:
        yield progress
    finally:
        if seen:
            draw("\n")
