"""The exchange kernel's jobs (cuda_src/bench/exchange.cu), and what every bit of its results must be."""

from __future__ import annotations

import numpy as np

from imex_persist import abi
from imex_persist.model.bf16 import to_bits

TURNS = 17  # kTurns


def job(
    rows: int, *, warmup: int, iterations: int, kind: abi.Probe = abi.Probe.ALL_REDUCE, fractions: bool = False
) -> dict[str, int]:
    """Fields of abi.ProbeJob."""
    return {"probe": int(kind), "rows": rows, "warmup": warmup, "iterations": iterations, "fractions": int(fractions)}


def mixed(a, b) -> np.ndarray:
    """uint32, as in exchange.cu."""
    a, b = np.asarray(a, np.uint32), np.asarray(b, np.uint32)
    with np.errstate(over="ignore"):
        h = a * np.uint32(0x9E3779B1) + b * np.uint32(0x85EBCA77) + np.uint32(0x165667B1)
        h = (h ^ (h >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    return h ^ (h >> np.uint32(12))


def parts(source: int, rows: int, hidden: int, turn: int | None) -> np.ndarray:
    """float32 [rows, hidden]: what `source` adds in an epoch, of which `turn` is the remainder by TURNS; None: fractions."""
    at = np.arange(rows * hidden, dtype=np.uint32).reshape(rows, hidden)
    if turn is None:
        return mixed(source, at).view(np.int32).astype(np.float32) * np.float32(2.0**-31)
    with np.errstate(over="ignore"):
        h = (at + np.uint32(source) * np.uint32(0x85EBCA77)) * np.uint32(0x9E3779B1) >> np.uint32(24)
    return ((h + np.uint32(turn)) % TURNS).astype(np.float32) - 8


def checks(shape: np.void, given: dict[str, int], epoch: int) -> int:
    """The number that every block of every rank leaves after `given` ran up to and with `epoch`; of whole numbers only."""
    rows, hidden = given["rows"], int(shape["hidden_size"])
    if given["probe"] == abi.Probe.ALL_GATHER:
        pairs = mixed(np.arange(rows * hidden // 2), epoch)
    else:
        ran = np.arange(epoch - given["warmup"] - given["iterations"], epoch) + 1
        world, total = int(shape["world_size"]), np.zeros((rows, hidden), np.float32)  # whole numbers far below 2^24
        for turn in range(TURNS):
            odd, even = (int(np.sum((ran % TURNS == turn) & (ran % 2 == parity))) for parity in (1, 0))
            for source in range(world * int(shape["down_slices"])):  # o_proj's in odd epochs, down_proj's in even ones
                times = even + (odd if source < world else 0)
                if times:
                    total += times * parts(source, rows, hidden, turn)
        pairs = np.ascontiguousarray(to_bits(total)).view(np.uint32).reshape(-1)
    with np.errstate(over="ignore"):
        weights = 2 * np.arange(rows * hidden // 2, dtype=np.uint32) + np.uint32(1)
        return int(np.sum(pairs * weights, dtype=np.uint32))


def errors(shape: np.void, rows: int, results: dict[int, np.ndarray]) -> float:
    """The largest error of one exchange of fractions, of the fp32 sums that their owners hold, against the sums' standard deviation."""
    blocks, hidden = int(shape["num_blocks"]), int(shape["hidden_size"])
    exact = sum(parts(s, rows, hidden, None).astype(np.float64) for s in range(int(shape["world_size"])))
    found = [values[blocks : blocks + rows * hidden].view(np.float32).reshape(rows, hidden) for values in results.values()]
    if shape["strategy"] == abi.Strategy.TWO_SHOT:
        found = [np.sum(found, axis=0)]  # each rank has the slices that it owns
    return max(float(np.abs(one - exact).max()) for one in found) / float(exact.std())
