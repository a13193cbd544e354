"""Launches the small kernels of this folder with as much of a Shape and LaunchParams as they read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from imex_persist import abi
from imex_persist.device.sim import SimDevice

HERE = Path(__file__).parent
WORDS = 4096  # of symmetric memory; the abort word is the last pair


class Small:
    """One kernel, `world` ranks in one launch; `rounds` is Shape.num_layers, `case` Shape.only_phase."""

    def __init__(
        self, name: str, lanes: int = 1, *, world=1, blocks=1, rounds=1, case=0, defines=(), deadline_us=1_000_000, **config
    ):
        self.device = SimDevice(lanes, blocks, source=HERE / name, defines=defines, **config)
        shape = np.zeros((), abi.Shape)
        shape["num_blocks"], shape["world_size"], shape["num_layers"], shape["only_phase"] = blocks, world, rounds, case
        shape["smem_bytes"], shape["off_abort"], shape["symmetric_words"] = 4096, WORDS - 2, WORDS
        self.shape, self.kernel = shape, self.device.load(shape)
        self.memory = [self.device.zeros(WORDS * 8) for _ in range(world)]
        self.results = [self.device.zeros(1024) for _ in range(world)]
        self.faults = [self.device.zeros(abi.FaultRecord.itemsize) for _ in range(world)]
        self.kv = self.device.zeros(rounds * 4096)
        self.params = np.zeros((), abi.LaunchParams)
        self.params["num_ranks"] = world
        for r in range(world):
            p = self.params["ranks"][r]
            p["peers"][:world] = [m.address for m in self.memory]
            p["tap"], p["fault"], p["kv"] = self.results[r].address, self.faults[r].address, self.kv.address
            p["rank"], p["deadline_us"] = r, deadline_us

    def start(self, seed: int = 0):
        for buffer in (*self.memory, *self.results, *self.faults, self.kv):
            self.device.upload(buffer, 0, np.zeros(buffer.nbytes, np.uint8))
        self.device.config.seed = seed
        self.launch = self.device.launch(self.kernel, self.params)
        return self.launch

    def run(self, seed: int = 0) -> np.ndarray:
        """The first floats of rank 0's result."""
        assert self.start(seed).wait(60), "the launch did not end"
        return self.result(0)

    def result(self, rank: int) -> np.ndarray:
        return self.device.download(self.results[rank], 0, 16).view(np.float32)

    def fault(self, rank: int) -> np.void:
        return self.device.download(self.faults[rank], 0, abi.FaultRecord.itemsize).view(abi.FaultRecord)[0]
