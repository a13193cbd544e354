"""A benchmark kernel of cuda_src/bench on one device: its ranks' memory, its launches, and what its blocks timed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from imex_persist import abi
from imex_persist.device import sources
from imex_persist.device.base import Buffer, Device, Launch
from imex_persist.errors import FaultError
from imex_persist.runtime.faults import explain
from imex_persist.runtime.rank import launch_params

DEADLINE_S = 2.0  # of a wait inside the kernel: it covers the skew between the ranks' launches
LAUNCH_S = 60.0  # of a launch; its own waits end it long before
FILL_BYTES = 64 << 20


def kernel_source(name: str) -> Path:
    return sources.cuda_src() / "bench" / name


class Probe:
    """`shape` is as much of an abi.Shape as the kernel `source` ("floor.cu") uses; off_abort and symmetric_words must be set."""

    def __init__(self, device: Device, shape: np.void, source: str, ranks: list[int]):
        self.device, self.shape, self.ranks = device, shape, ranks
        self.epoch = 0  # the last one that was used
        self._kernel = device.load(shape, source=kernel_source(source))
        self._symmetric = {rank: device.symmetric(int(shape["symmetric_words"]) * 8) for rank in ranks}
        self._peers: dict[int, dict[int, int]] = {rank: {} for rank in ranks}  # addresses
        self._small = {rank: _Small(device, int(shape["num_blocks"])) for rank in ranks}
        self._result: dict[int, Buffer] = {}
        for rank in ranks:
            values = int(shape["num_blocks"]) + int(shape["max_rows"]) * int(shape["hidden_size"])
            self._result[rank] = device.zeros(4 * values)

    def handles(self) -> dict[int, str]:
        return {rank: self.device.export(buffer) for rank, buffer in self._symmetric.items()}

    def connect(self, handles: Mapping[int, str]) -> None:
        """Maps every rank's symmetric memory: once for all ranks of this process."""
        addresses = {}
        for rank, handle in handles.items():
            own = self._symmetric.get(rank)
            addresses[rank] = (own or self.device.open(handle, int(self.shape["symmetric_words"]) * 8)).address
        self._peers = dict.fromkeys(self.ranks, addresses)

    def run(self, job: dict[str, int], each: dict[int, dict[str, int]] | None = None) -> dict[int, int]:
        """One launch of `job` (fields of abi.ProbeJob; `each` has more of a rank): nanoseconds of its timed iterations by rank.

        Raises FaultError when a wait of the kernel has expired.
        """
        return self.finish(self.launch(job, each or {}), job)

    def launch(self, job: dict[str, int], each: dict[int, dict[str, int]]) -> Launch:
        params = []
        for rank in self.ranks:
            small = self._small[rank]
            record = np.zeros((), abi.ProbeJob)
            for name, value in {**job, **each.get(rank, {})}.items():
                record[name] = value
            record["epoch"], record["times"], record["result"] = self.epoch, small.times.address, self._result[rank].address
            self.device.upload(small.job, 0, np.frombuffer(record.tobytes(), np.uint8))
            for buffer in (small.times, self._result[rank]):
                self.device.upload(buffer, 0, np.zeros(buffer.nbytes, np.uint8))
            p: Any = np.zeros((), abi.RankParams)
            for other, address in self._peers[rank].items():
                p["peers"][other] = address
            p["tap"], p["fault"], p["rank"], p["deadline_us"] = small.job.address, small.fault.address, rank, DEADLINE_S * 1e6
            params.append(p[()])
        return self.device.launch(self._kernel, launch_params(params))

    def finish(self, launch: Launch, job: dict[str, int]) -> dict[int, int]:
        if not launch.wait(LAUNCH_S):
            raise FaultError(f"a benchmark kernel did not return in {LAUNCH_S:.0f} s")
        self.epoch += job["warmup"] + job["iterations"]
        records = [
            self.device.download(self._small[rank].fault, 0, abi.FaultRecord.itemsize).view(abi.FaultRecord)[0]
            for rank in self.ranks
        ]
        if faults := [record for record in records if record["valid"]]:
            raise FaultError(explain(faults))
        return {rank: self._nanoseconds(rank) for rank in self.ranks}

    def result(self, rank: int, count: int | None = None) -> np.ndarray:
        """uint32: what the kernel left there, or the first `count` of it; it was zero before the launch."""
        nbytes = self._result[rank].nbytes if count is None else 4 * count
        return self.device.download(self._result[rank], 0, nbytes).view(np.uint32)

    def _nanoseconds(self, rank: int) -> int:
        """From the first block's begin to the last block's end; blocks that took no part wrote nothing."""
        small = self._small[rank]
        times = self.device.download(small.times, 0, small.times.nbytes).view(np.uint64).reshape(-1, 2)
        times = times[times[:, 1] != 0]
        return int(times[:, 1].max() - times[:, 0].min()) if len(times) else 0


class _Small:
    """What a rank's launch needs besides."""

    def __init__(self, device: Device, num_blocks: int):
        self.job = device.zeros(abi.ProbeJob.itemsize)
        self.times = device.zeros(16 * num_blocks)
        self.fault = device.zeros(abi.FaultRecord.itemsize)


def fill(device: Device, buffer: Buffer, *, words: bool) -> None:
    """Arbitrary bits, since memory of zeros takes less power to read; or tagged words of epoch 1."""
    xp = getattr(device, "xp", np)
    count = min(FILL_BYTES, buffer.nbytes) // 4
    pattern = xp.arange(count, dtype=xp.uint32) * xp.uint32(2654435761)
    if words:
        pattern[1::2] = 1
    for offset in range(0, buffer.nbytes, 4 * count):
        device.upload(buffer, offset, pattern[: (buffer.nbytes - offset) // 4])
