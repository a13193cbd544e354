"""What the hardware allows: read ceiling, gathers, barrier, doorbell, one way between GPUs; by cuda_src/bench/floor.cu."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from imex_persist import abi
from imex_persist.bench.ranks import Ranks
from imex_persist.planner import Machine
from imex_persist.runtime import capacity
from imex_persist.runtime.placement import Placement

READ_BYTES = {"cuda": 4 << 30, "sim": 1 << 20}  # far more than a GPU's L2 holds
READ_RUNS = {"cuda": 7, "sim": 3}
WINDOWS = (3, 6, 12)  # tiles of 16 KB in flight an SM; the kernel's own is planner.make_shape's
GATHER_WORDS = (1024, 4096, 8192, 16384)
LOOPS = {"cuda": (50, 2000), "sim": (1, 20)}  # warm-up and timed iterations
PAUSED_ECHOES = 100
RING_STAGES = 12
BARRIER_WORDS = 1024  # room for two sets of a word a block


@dataclass(frozen=True)
class Ceiling:
    """Bytes per second that each rank's share of its machine reads, by rank, and how that was found."""

    by_rank: dict[int, float]
    by_window: dict[int, dict[int, float]]  # tiles in flight: rank: bytes per second

    @property
    def least(self) -> float:
        return min(self.by_rank.values())


def floor_shape(machine: Machine, ranks_each: int, world_size: int, window: int = RING_STAGES) -> np.void:
    """As much of a Shape as floor.cu uses; the model's sizes are there for what is compiled and never called."""
    shape = np.zeros((), abi.Shape)
    stages = min(RING_STAGES, (machine.shared_memory_bytes - abi.SHARED_HEADER_BYTES) // abi.STAGE_BYTES)
    fields = {
        "num_blocks": machine.num_blocks // ranks_each,
        "world_size": world_size,
        "window": min(window, stages),
        "ring_stages": stages,
        "max_rows": 1,
        "head_dim": 32,
        "num_heads": 1,
        "num_kv_heads": 1,
        "num_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "down_slices": 1,
        "num_slots": 1,
        "smem_x": abi.SHARED_HEADER_BYTES,
        "smem_ring": abi.SHARED_HEADER_BYTES,
        "smem_bytes": abi.SHARED_HEADER_BYTES + stages * abi.STAGE_BYTES,
        "off_abort": BARRIER_WORDS,
        "symmetric_words": BARRIER_WORDS + 16,
    }
    for name, value in fields.items():
        shape[name] = value
    return shape[()]


def shape_for(ranks: Ranks, window: int = RING_STAGES) -> np.void:
    """For the smallest of the machines, its blocks divided among its ranks, as the engine does."""
    each = max(len(place.ranks) for place in ranks.placement.places)
    return floor_shape(capacity.shared_machine(ranks.machines, 1), each, ranks.world_size, window)


def read_ceiling(placement: Placement) -> Ceiling:
    """The read ceiling of every rank, all machines at once; the median of several launches with the best of several windows."""
    with Ranks(placement) as ranks:
        return measure_read(ranks)


def measure_read(ranks: Ranks) -> Ceiling:
    kind = ranks.placement.kind
    nbytes = READ_BYTES[kind]
    ranks.step("allocate", {"bytes": nbytes, "words": False})
    share = nbytes // max(len(place.ranks) for place in ranks.placement.places)  # ranks of one GPU read memory of their own
    by_window = {}
    for window in WINDOWS:
        ranks.prepare("floor.cu", shape_for(ranks, window))
        job = {"probe": int(abi.Probe.READ), "iterations": 1, "warmup": 0, "bytes": share}
        runs = [ranks.run(job, stride=share) for _ in range(READ_RUNS[kind])]
        by_window[window] = {rank: share / (median(run[rank] for run in runs) * 1e-9) for rank in runs[0]}
    return Ceiling({rank: max(one[rank] for one in by_window.values()) for rank in by_window[WINDOWS[0]]}, by_window)


def measure_gathers(ranks: Ranks) -> list[dict]:
    """µs in which every block of every rank reads all of so many words that are there already."""
    warmup, loops = LOOPS[ranks.placement.kind]
    ranks.step("allocate", {"bytes": max(GATHER_WORDS) * 8, "words": True})
    shape = shape_for(ranks)
    ranks.prepare("floor.cu", shape)
    rows = []
    for words in GATHER_WORDS:
        job = {"probe": int(abi.Probe.GATHER), "iterations": loops, "warmup": warmup, "bytes": 8 * words}
        us = max(ranks.run(job, stride=0).values()) / loops / 1e3
        rows.append({"words": words, "us": us, "gb_s": 8 * words * int(shape["num_blocks"]) / us / 1e3})
    return rows


def measure_barrier(ranks: Ranks) -> float:
    """µs of a word of every block to every block of its rank."""
    warmup, loops = LOOPS[ranks.placement.kind]
    job = {"probe": int(abi.Probe.BARRIER), "iterations": loops, "warmup": warmup}
    return max(ranks.run(job).values()) / loops / 1e3


def measure_pings(ranks: Ranks) -> list[dict]:
    """µs one way by a tagged word, of rank 0 and each other rank in turn."""
    warmup, loops = LOOPS[ranks.placement.kind]
    rows = []
    for other in range(1, ranks.world_size):
        job = {"probe": int(abi.Probe.PING), "iterations": loops, "warmup": warmup}
        partners = {rank: other if rank == 0 else 0 if rank == other else rank for rank in range(ranks.world_size)}
        times = ranks.run(job, partners=partners)
        rows.append({"pair": [0, other], "us": max(times[0], times[other]) / loops / 2e3})
    return rows


def measure_echo(placement: Placement, pause_s: float = 0.0) -> dict:
    """µs of a round trip CPU → GPU → CPU of a word in mapped host memory, from Python, on the first machine; `pause_s` between two."""
    warmup, loops = LOOPS[placement.kind]
    loops = loops if not pause_s else min(loops, PAUSED_ECHOES)
    job = {"probe": int(abi.Probe.ECHO), "iterations": loops, "warmup": warmup}
    with Ranks(Placement((replace(placement.places[0], ranks=(0,)),))) as first:
        first.prepare("floor.cu", shape_for(first))
        (reply,) = first.step("echo", {"job": job, "pause_s": pause_s})
    us = sorted(ns / 1e3 for ns in reply["ns"])
    return {"median_us": us[len(us) // 2], "p99_us": us[len(us) * 99 // 100], "min_us": us[0]}
