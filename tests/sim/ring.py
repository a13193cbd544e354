"""Drives ring.cu: a launch of several ranks with random weights, and what the words must have summed to."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from imex_persist import abi
from imex_persist.device.sim import SimDevice

HERE = Path(__file__).parent


def bf16(values: np.ndarray) -> np.ndarray:
    """Bit patterns of values that bf16 holds exactly."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


class Ring:
    """Inputs and memory for `world` ranks of `blocks` blocks; small multiples of 1/16, so that float32 sums are exact in any order."""

    def __init__(self, device: SimDevice, *, world=2, blocks=2, steps=5, rows=1, k=256, deadline_us=1_000_000):
        self.device, self.world, self.blocks, self.steps, self.rows, self.k = device, world, blocks, steps, rows, k
        rng = np.random.default_rng(1)
        self.weights = rng.integers(-8, 9, (world, blocks, steps, 8, k)).astype(np.float32) / 8
        self.x = rng.integers(-4, 5, (world, rows, k)).astype(np.float32) / 4
        values = rows * 8
        shape = np.zeros((), abi.Shape)
        shape["hidden_size"], shape["num_layers"], shape["max_rows"] = k, steps, rows
        shape["num_blocks"], shape["world_size"] = blocks, world
        shape["off_best"] = world * blocks * values
        shape["off_abort"] = shape["off_best"] + 2 * world * blocks
        shape["symmetric_words"] = shape["off_abort"] + 16
        shape["smem_part"] = 1024
        shape["smem_x"] = 1024 + 2 * 8 * values * 4
        shape["smem_ring"] = -(-int(shape["smem_x"] + rows * k * 2) // 1024) * 1024
        shape["smem_bytes"] = shape["smem_ring"] + 4 * abi.STAGE_BYTES
        self.shape = shape
        self.kernel = device.load(shape)
        self.params = np.zeros((), abi.LaunchParams)
        self.params["num_ranks"] = world
        self.memory = [device.zeros(int(shape["symmetric_words"]) * 8) for _ in range(world)]
        self.faults = [device.zeros(abi.FaultRecord.itemsize) for _ in range(world)]
        self.results = [device.zeros(steps * blocks * values * 4) for _ in range(world)]
        self.buffers = []
        for r in range(world):
            tiles = self.weights[r].reshape(blocks, steps, 8, k // 32, 32).swapaxes(2, 3)
            x = self.x[r].reshape(rows, k // 32, 32).swapaxes(0, 1)
            p = self.params["ranks"][r]
            for field, array in (("qkv", bf16(tiles)), ("o_proj", bf16(x))):
                buffer = device.zeros(array.nbytes)
                device.upload(buffer, 0, array)
                self.buffers.append(buffer)
                p[field] = buffer.address
            p["peers"][:world] = [m.address for m in self.memory]
            p["tap"], p["fault"] = self.results[r].address, self.faults[r].address
            p["rank"], p["deadline_us"] = r, deadline_us

    def expected(self) -> np.ndarray:
        return np.einsum("wbsnk,wrk->sbrn", self.weights, self.x)

    def clear(self) -> None:
        for buffer in (*self.memory, *self.faults, *self.results):
            self.device.upload(buffer, 0, np.full(buffer.nbytes, 0, np.uint8))

    def run(self, seed: int = 0, timeout_s: float = 60) -> Ring:
        self.clear()
        self.device.config.seed = seed
        self.launch = self.device.launch(self.kernel, self.params)
        assert self.launch.wait(timeout_s), "the launch did not end"
        return self

    def result(self, rank: int) -> np.ndarray:
        raw = self.device.download(self.results[rank], 0, self.results[rank].nbytes)
        return raw.view(np.float32).reshape(self.steps, self.blocks, self.rows, 8)

    def right(self) -> bool:
        return all(np.array_equal(self.result(r), self.expected()) for r in range(self.world))

    def fault(self, rank: int) -> np.void:
        return self.device.download(self.faults[rank], 0, abi.FaultRecord.itemsize).view(abi.FaultRecord)[0]


def make(lanes: int = 1, *, defines=(), world=2, blocks=2, steps=5, rows=1, k=256, deadline_us=1_000_000, **config) -> Ring:
    device = SimDevice(lanes, blocks, source=HERE / "ring.cu", defines=defines, **config)
    return Ring(device, world=world, blocks=blocks, steps=steps, rows=rows, k=k, deadline_us=deadline_us)
