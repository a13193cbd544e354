"""Write and verify on any device: all ranks in one launch, one that never stores, and one that stored something else."""

from __future__ import annotations

import numpy as np
import pytest

from imex_persist import abi, planner
from imex_persist.errors import DeviceError
from imex_persist.planner import Machine
from imex_persist.runtime import faults
from imex_persist.runtime.marks import Marks
from imex_persist.runtime.rank import launch_params
from tests.build.shapes import SMOLLM2_135M
from tests.kernel.harness import host_block

NONCE = 0x1234_5678_9ABC_DEF0
EPOCH = NONCE >> 32 | 1


class Group:
    """`world` ranks of two blocks on one device."""

    def __init__(self, device, world: int, deadline_s: float = 5.0):
        self.device, self.world = device, world
        machine = Machine(2, device.machine.shared_memory_bytes)
        self.shape = planner.make_shape(SMOLLM2_135M, world_size=world, machine=machine)
        self.memory = [device.symmetric(int(self.shape["symmetric_words"]) * 8) for _ in range(world)]
        self.faults = host_block(faults.fault_bytes(world))
        mapped = device.map_host(memoryview(self.faults))
        self.marks = Marks(device, self.shape)
        self.params = []
        for rank in range(world):
            p = np.zeros((), abi.RankParams)
            p["peers"][:world] = [memory.address for memory in self.memory]
            p["rank"], p["fault"], p["deadline_us"] = rank, mapped + faults.fault_offset(rank), deadline_s * 1e6
            self.params.append(p[()])

    def verify(self, *ranks: int) -> None:
        params = launch_params([self.params[rank] for rank in ranks])
        self.marks.verify(params, NONCE, memoryview(self.faults))

    def words(self, rank: int, count: int) -> np.ndarray:
        return self.device.download(self.memory[rank], 0, 8 * count).view(np.uint64)


def check_all_pairs(device, world: int) -> None:
    group = Group(device, world)
    group.verify(*range(world))
    for rank in range(world):
        words = group.words(rank, 2 * world)
        assert (words >> np.uint64(32) == EPOCH).all() and len(set(words.tolist())) == 2 * world


def check_a_silent_rank(device) -> None:
    """Rank 2 is not launched; whoever notices first says so."""
    group = Group(device, 3, deadline_s=0.2)
    with pytest.raises(DeviceError, match=r"what rank 2 stored into rank [01]'s memory did not arrive in 0\.\d s: peer access"):
        group.verify(0, 1)


def check_something_else(device) -> None:
    group = Group(device, 2, deadline_s=0.2)
    wrong = np.array([EPOCH << 32 | 5, EPOCH << 32 | 6], np.uint64)
    device.upload(group.memory[0], 16, wrong.view(np.uint8))
    with pytest.raises(DeviceError, match="what rank 1 stored into rank 0's memory arrived as something else"):
        group.verify(0)
