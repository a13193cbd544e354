"""Opening the machine that a worker was given."""

from __future__ import annotations

from imex_persist.device.base import Device


def open_device(kind: str, ordinal: int, uuid: str, ranks: list[int]) -> Device:
    """The Device for one worker. Raises DeviceError when it cannot be had."""
    if kind == "cuda":
        from imex_persist.device.cuda import CudaDevice

        return CudaDevice(ordinal)
    from imex_persist.device.sim import SimDevice

    return SimDevice()
