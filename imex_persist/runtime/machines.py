"""Opening the machine that a worker was given."""

from __future__ import annotations

from imex_persist.device.base import Device
from imex_persist.errors import DeviceError

SIM_BLOCKS = 4  # of one simulated rank: enough that blocks depend on each other, few enough to be quick


def open_device(kind: str, ordinal: int, uuid: str, ranks: list[int], world_size: int) -> Device:
    """The Device for one worker. Raises DeviceError when it cannot be had, or is not the GPU that the parent saw."""
    if kind == "sim":
        from imex_persist.device.sim import SimDevice

        return SimDevice(num_blocks=SIM_BLOCKS * len(ranks), processes=len(ranks) < world_size)
    from imex_persist.device.cuda import CudaDevice

    device = CudaDevice(ordinal)
    if uuid and device.uuid != uuid:
        raise DeviceError(
            f"GPU {ordinal} is {device.uuid} to CUDA but {uuid} to NVML: leave CUDA_DEVICE_ORDER unset, and name GPUs in "
            "CUDA_VISIBLE_DEVICES by index"
        )
    return device
