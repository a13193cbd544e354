"""The exchange kernel with all ranks in one launch, on the simulator or a GPU: run, and compared bit for bit with NumPy."""

from __future__ import annotations

import numpy as np

from imex_persist import planner
from imex_persist.bench import sums
from imex_persist.bench.exchange import SOURCE, VARIANTS, Variant
from imex_persist.bench.probe import Probe
from imex_persist.planner import Machine

REDUCING = [variant for variant in VARIANTS if not variant.gather]


def shape_of(variant: Variant, world: int, *, hidden: int, rows: int, machine: Machine, slices: int = 1) -> np.void:
    return planner.exchange_shape(
        hidden,
        world_size=world,
        max_rows=rows,
        machine=machine,
        strategy=variant.strategy,
        float24_partials=variant.float24,
        down_slices=slices,
    )


class Exchanges:
    """Ranks 0 … world - 1 on one device."""

    def __init__(self, device, shape: np.void, variant: Variant, source: str = ""):
        self.shape, self.variant, self.world = shape, variant, int(shape["world_size"])
        self.probe = Probe(device, shape, source or SOURCE, list(range(self.world)))
        self.probe.connect(self.probe.handles())

    def run(self, rows: int, turns: int) -> list[np.ndarray]:
        """What is wrong: (rank, block) of every block whose activations are not the sums. Raises what a launch raises."""
        job = sums.job(rows, warmup=1, iterations=turns - 1, kind=self.variant.kind)
        times = self.probe.run(job)
        assert all(ns > 0 for ns in times.values())
        expected = sums.checks(self.shape, job, self.probe.epoch)
        found = np.stack([self.probe.result(rank)[: int(self.shape["num_blocks"])] for rank in range(self.world)])
        return [tuple(int(i) for i in where) for where in np.argwhere(found != expected)]

    def error(self, rows: int) -> float:
        self.probe.run(sums.job(rows, warmup=0, iterations=1, kind=self.variant.kind, fractions=True))
        return sums.errors(self.shape, rows, {rank: self.probe.result(rank) for rank in range(self.world)})
