"""The litmus tests of docs/litmus.md: small kernels of the words protocol, run on any device that imex_persist has.

One launch of one or two ranks (`run`), or a process and a GPU for each rank (tests/multi_gpu/test_litmus.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imex_persist import abi

HERE = Path(__file__).parent
SYMMETRIC_BYTES = 4 << 20
SHARED_BYTES = 8192
THREADS = abi.CONSUMER_WARPS * 32
DEADLINE_US = 5_000_000


@dataclass(frozen=True)
class Litmus:
    words: int  # whose contents a block checks in a round, on a GPU; reuse.cu: times all blocks
    bugs: tuple[str, ...]  # defines that leave out what the rule needs
    ranks: tuple[int, ...] = (1, 2)


LITMUS = {
    "message": Litmus(2 * THREADS, ("ONE_EPOCH", "ONE_BUFFER")),
    "reuse": Litmus(2 * 2, ("NO_B", "NO_BARRIER")),
    "kv": Litmus(2 * 256, ("NO_BARRIER", "NO_WRITER_PROXY", "NO_WRITER_FENCE", "NO_READER_FENCE", "NO_READER_PROXY"), (1,)),
    "fence": Litmus(1024, ("NO_WRITER_FENCE", "NO_READER_FENCE", "WRITER_SCOPE", "READER_SCOPE")),
    "poll": Litmus(16 * abi.CONSUMER_WARPS, ("NO_CHECK",)),
    "record": Litmus(8 * THREADS, ("ONE_TAG",)),
}


def source(name: str) -> Path:
    return HERE / f"{name}.cu"


def words_checked(name: str, world: int, blocks: int, rounds: int) -> int:
    """By all blocks of all ranks of a GPU run."""
    of_block = LITMUS[name].words * (world * blocks if name == "reuse" else 1)
    return world * blocks * rounds * of_block


def rounds_for(name: str, world: int, blocks: int, words: int) -> int:
    return -(-words // words_checked(name, world, blocks, 1))


def make_shape(world: int, blocks: int, rounds: int) -> np.void:
    shape = np.zeros((), abi.Shape)
    shape["num_blocks"], shape["world_size"], shape["num_layers"] = blocks, world, rounds
    shape["max_rows"], shape["head_dim"], shape["down_slices"] = 1, 32, 1  # for the tensor-core primitives, which nobody calls
    shape["hidden_size"] = shape["intermediate_size"] = shape["num_heads"] = shape["num_kv_heads"] = 32
    shape["smem_bytes"], shape["smem_ring"], shape["ring_stages"] = SHARED_BYTES, 1024, 4
    shape["off_abort"] = SYMMETRIC_BYTES // 8 - 16
    return shape[()]


class RankState:
    """One rank's memory on `device`, and its params."""

    def __init__(self, device, rank: int, blocks: int, deadline_us: int = DEADLINE_US):
        self.device, self.rank, self.deadline_us = device, rank, deadline_us
        self.symmetric = device.symmetric(SYMMETRIC_BYTES) if hasattr(device, "symmetric") else device.zeros(SYMMETRIC_BYTES)
        self.counts, self.fault = device.zeros(64), device.zeros(abi.FaultRecord.itemsize)
        self.kv = device.zeros(blocks * 1024)

    def params(self, peers: dict[int, int]) -> np.void:
        p = np.zeros((), abi.RankParams)
        for rank, address in peers.items():
            p["peers"][rank] = address
        p["tap"], p["fault"], p["kv"] = self.counts.address, self.fault.address, self.kv.address
        p["rank"], p["deadline_us"] = self.rank, self.deadline_us
        return p[()]

    def clear(self) -> None:
        for buffer in (self.symmetric, self.counts, self.fault, self.kv):
            self.device.upload(buffer, 0, np.zeros(buffer.nbytes, np.uint8))

    def result(self) -> dict[str, int]:
        counts = self.device.download(self.counts, 0, 12).view(np.uint32)
        return dict(zip(("wrong", "torn", "gave_up"), map(int, counts), strict=True))


class Run:
    """All ranks in one launch on `device`; `kernel` is loaded already."""

    def __init__(self, device, kernel, world: int, blocks: int):
        self.device, self.kernel = device, kernel
        self.ranks = [RankState(device, rank, blocks) for rank in range(world)]
        self.params = np.zeros((), abi.LaunchParams)
        self.params["num_ranks"] = world
        addresses = {rank.rank: rank.symmetric.address for rank in self.ranks}
        for rank in self.ranks:
            self.params["ranks"][rank.rank] = rank.params(addresses)

    def once(self, timeout_s: float = 60.0) -> dict[str, int]:
        """The sums of all ranks' counts."""
        for rank in self.ranks:
            rank.clear()
        assert self.device.launch(self.kernel, self.params[()]).wait(timeout_s), "the kernel did not return"
        results = [rank.result() for rank in self.ranks]
        return {name: sum(result[name] for result in results) for name in results[0]}
