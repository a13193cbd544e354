"""Write and verify, before the decode kernel is launched: a kernel stores into every peer's memory and waits for every peer's store.

Driver queries say what peer access should do; this is what it does, with the kernel's own instructions, both ways, over the mappings
that will be used (cuda_src/marks.cu).
"""

from __future__ import annotations

import numpy as np

from imex_persist import abi
from imex_persist.device import sources
from imex_persist.device.base import Device
from imex_persist.errors import DeviceError
from imex_persist.runtime.faults import read_faults

SPARE_S = 5.0  # beyond the deadline, for the kernel to return


class Marks:
    """The kernel, loaded for the ranks of one device. `shape` is the decode kernel's."""

    def __init__(self, device: Device, shape: np.void):
        self._device, self._world = device, int(shape["world_size"])
        self._kernel = device.load(shape, source=sources.cuda_src() / "marks.cu")

    def verify(self, params: np.void, nonce: int, fault_view: memoryview) -> None:
        """`params` are the decode kernel's; all ranks' devices run this at the same time, with the same `nonce` of 64 bits.

        Raises DeviceError, naming the two ranks, when a store did not arrive, or arrived as something else.
        """
        given = np.array(params, abi.LaunchParams)
        given["ranks"]["tap"] = nonce
        ranks = [int(given["ranks"][i]["rank"]) for i in range(int(given["num_ranks"]))]
        deadline_s = float(given["ranks"][0]["deadline_us"]) / 1e6
        if not self._device.launch(self._kernel, given[()]).wait(deadline_s + SPARE_S):
            raise DeviceError(f"the kernel that verifies peer memory did not return in {deadline_s + SPARE_S:.0f} s")
        for record in read_faults(fault_view, self._world):
            if int(record["rank"]) in ranks:
                raise DeviceError(why_not(record))


def why_not(record: np.void) -> str:
    rank, source, waited_s = int(record["rank"]), int(record["source"]), int(record["waited_us"]) / 1e6
    what = f"what rank {source} stored into rank {rank}'s memory"
    happened = f"did not arrive in {waited_s:.1f} s" if waited_s else "arrived as something else"
    return (
        f"{what} {happened}: peer access does not work between their GPUs; 'imex-persist topology' shows the way between them, and "
        "CUDA_VISIBLE_DEVICES chooses others"
    )
