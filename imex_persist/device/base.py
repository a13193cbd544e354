"""What the runtime asks of a machine. `cuda` and `sim` are the two machines; nothing above this file knows which one it has.

A device belongs to one process and holds the memory of one or several ranks. Addresses are plain integers, as the kernel sees them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from imex_persist.planner import Machine


@dataclass
class Buffer:
    """Device memory: `address` as the kernel sees it, `nbytes` long. `owner` keeps it alive and is the device's own business."""

    address: int
    nbytes: int
    owner: Any = None


class Launch(Protocol):
    """A kernel that may still be running."""

    def done(self) -> bool: ...

    def wait(self, timeout_s: float) -> bool:
        """True once the kernel has returned; False if it has not after `timeout_s` seconds. Raises DeviceError if it failed."""
        ...


class Device(Protocol):
    """One machine. Every method counts as a host call in `host_calls`: the decode loop must not need any between tokens."""

    name: str  # "cuda" or "sim"
    machine: Machine
    host_calls: int

    def identity(self) -> dict[str, str]:
        """What peers and logs need: {"uuid": …, "name": …, "arch": "sm_90a" or "sim"}."""
        ...

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""
        ...

    def zeros(self, nbytes: int) -> Buffer:
        """Zeroed memory that only this process sees."""
        ...

    def symmetric(self, nbytes: int) -> Buffer:
        """Zeroed memory that peers may map: one allocation of its own."""
        ...

    def export(self, buffer: Buffer) -> str:
        """A handle for a `symmetric` buffer, as text that travels over a socket."""
        ...

    def open(self, handle: str, nbytes: int) -> Buffer:
        """Maps a peer's `symmetric` buffer."""
        ...

    def map_host(self, memory: memoryview) -> int:
        """The address at which the kernel sees a page-aligned block of shared host memory."""
        ...

    def upload(self, buffer: Buffer, offset: int, array: np.ndarray) -> None: ...

    def download(self, buffer: Buffer, offset: int, nbytes: int) -> np.ndarray:
        """`nbytes` bytes as a uint8 array."""
        ...

    def compile(self, shapes: list[np.void], source: Path | None = None) -> None:
        """Puts the kernels of `source` (else decode.cu) for these shapes into the cache, where `load` finds them, with all processors."""
        ...

    def load(self, shape: np.void, *, source: Path | None = None) -> Any:
        """The kernel for an abi.Shape: compiled, or found in the cache. `source` names another than decode.cu, with the same entry."""
        ...

    def launch(self, kernel: Any, params: np.void) -> Launch:
        """Starts the kernel with an abi.LaunchParams record; returns at once."""
        ...

    def close(self) -> None:
        """Unmaps what was opened and frees everything."""
        ...
