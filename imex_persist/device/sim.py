"""The simulated machine: the kernel, compiled by a host compiler, on fibers of one thread of this process.

Two ways to use it. Several ranks in one launch (LaunchParams.num_ranks > 1) are deterministic: the same seed gives the same schedule.
Ranks in processes of their own (`processes=True`) share `symmetric` memory and count in wall time.

Symmetric memory is a memfd: it has no name in the file system, a peer opens it through /proc/<pid>/fd (which the kernel allows to the
same user only), and it is gone with the last process that has it, however that process ends.
"""

from __future__ import annotations

import atexit
import ctypes
import mmap
import os
import platform
import threading
import weakref
from functools import lru_cache
from typing import Any

import numpy as np

from imex_persist import abi
from imex_persist.device import hostcc
from imex_persist.device.base import Buffer
from imex_persist.errors import DeviceError
from imex_persist.planner import Machine

MODES = ("rr", "random", "pct")
_STATUS_BUSY = 4
_STATUS = {
    1: "misused a primitive",
    2: "deadlocked",
    3: "was stopped",
    _STATUS_BUSY: "is already running",
    5: "ran out of memory",
}
_STATS = ("steps", "switches", "drains", "copies", "clock_ns")


class SimConfig(ctypes.Structure):
    """sim::SimConfig of cuda_src/sim/machine.h."""

    _fields_ = (
        [(name, ctypes.c_uint64) for name in ("seed", "stop")]
        + [
            (name, ctypes.c_uint32)
            for name in "mode processes preempt delay_stores delay_copies split_words stalls pct_depth pct_steps on_deadlock".split()
        ]
        + [(name, ctypes.c_uint64) for name in ("abort_step", "host_bytes")]
    )


@lru_cache
def load_library(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    library.imex_sim_launch.argtypes = [ctypes.POINTER(SimConfig), ctypes.c_void_p, ctypes.c_void_p]
    library.imex_sim_launch.restype = ctypes.c_int
    library.imex_sim_report.restype = ctypes.c_char_p
    return library


class SimKernel:
    """A compiled kernel and the sizes it runs with."""

    def __init__(self, library: ctypes.CDLL, shape: np.void):
        self.library = library
        self.shape = np.array(shape, abi.Shape)


_running: weakref.WeakSet[SimLaunch] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """A kernel must not outlive the interpreter, which frees the memory under it."""
    for launch in list(_running):
        launch.stop()


class SimLaunch:
    """A launch on a thread of its own; ctypes releases the GIL meanwhile."""

    def __init__(self, device: SimDevice, kernel: SimKernel, params: np.ndarray):
        self._device = device  # and with it the memory that the kernel uses
        self._kernel, self._params = kernel, params
        self._stop = ctypes.c_uint32(0)
        self._config = SimConfig.from_buffer_copy(device.config)
        self._config.stop = ctypes.addressof(self._stop)
        self.status: int | None = None
        self.report = ""
        self.stats: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run, name="imex-sim", daemon=True)
        self._thread.start()
        _running.add(self)

    def _run(self) -> None:
        library = self._kernel.library
        status = library.imex_sim_launch(self._config, self._kernel.shape.ctypes.data, self._params.ctypes.data)
        if status != _STATUS_BUSY:  # else the report is another launch's
            self.report = library.imex_sim_report().decode(errors="replace")
            counts = (ctypes.c_uint64 * len(_STATS))()
            library.imex_sim_stats(counts)
            self.stats = dict(zip(_STATS, counts, strict=True))
        self.status = status

    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        if self.status:
            why = _STATUS.get(self.status, f"returned status {self.status}")
            raise DeviceError(f"the simulated kernel {why}{': ' if self.report else ''}{self.report}")
        return True

    def stop(self) -> None:
        """Ends the launch wherever its fibers are; its wait() then raises."""
        self._stop.value = 1
        self._thread.join()


class SimDevice:
    """device.base.Device on the simulator.

    `mode`: rr (round robin), random or pct; `preempt`: switch fibers at one of so many memory operations, 0 only at waits;
    `delay`: weak memory, late and split copies and words; `stalls`: blocks and warps stand still; `source`: another kernel than decode.cu;
    `tsan`: the process runs under hostcc.tsan_environment(), and ThreadSanitizer reports what the kernel forgot to order;
    `on_deadlock`: "report" raises DeviceError saying who waits for what, "expire" lets deadlines pass, as on a GPU.
    """

    name = "sim"

    def __init__(
        self,
        lanes: int = 1,
        num_blocks: int = 4,
        *,
        seed: int = 0,
        mode: str = "rr",
        preempt: int | None = None,
        delay: bool = False,
        stalls: bool = False,
        pct_depth: int = 3,
        pct_steps: int = 20_000,
        on_deadlock: str = "report",
        processes: bool = False,
        shared_memory_bytes: int = 232_448,
        max_stages: int = 12,
        source: str | os.PathLike | None = None,
        cxx: str | None = None,
        defines: tuple[str, ...] = (),
        tsan: bool = False,
    ):
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
        if on_deadlock not in ("report", "expire"):
            raise ValueError(f"on_deadlock {on_deadlock!r} is not report or expire")
        self.machine = Machine(num_blocks, shared_memory_bytes, max_stages)
        self.host_calls = 0
        self.config = SimConfig(
            seed=seed,
            mode=MODES.index(mode),
            processes=processes,
            preempt=(0 if mode == "rr" else 8) if preempt is None else preempt,
            delay_stores=delay,
            delay_copies=delay,
            split_words=delay,
            stalls=stalls,
            pct_depth=pct_depth,
            pct_steps=pct_steps,
            on_deadlock=on_deadlock == "expire",
        )
        self._build = {"lanes": lanes, "source": source, "cxx": cxx, "defines": tuple(defines), "tsan": tsan}
        self._launches: list[SimLaunch] = []
        self._files: list[int] = []  # memfds that peers may still open
        self._held: list[Any] = []  # mappings, so that no running kernel loses one

    def identity(self) -> dict[str, str]:
        return {"uuid": f"sim-{os.getpid()}-{id(self):x}", "name": f"simulator on {platform.machine()}", "arch": "sim"}

    # ------------------------------------------------------------------------------------------ memory
    def memory(self) -> tuple[int, int]:
        self.host_calls += 1
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page

    def zeros(self, nbytes: int) -> Buffer:
        self.host_calls += 1
        try:
            memory = mmap.mmap(-1, max(nbytes, 1))
        except (OSError, ValueError, OverflowError) as error:
            raise DeviceError(
                f"the simulator could not get {nbytes / 2**30:.2f} GiB of memory ({error}): use a smaller max_model_len or fewer "
                "max_num_seqs, or end what else uses this machine's memory"
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # weights are read at memory speed
        return self._buffer(memory, nbytes)

    def symmetric(self, nbytes: int) -> Buffer:
        self.host_calls += 1
        if not hasattr(os, "memfd_create"):
            raise DeviceError("ranks in processes of their own need Linux (memfd_create); run them in one process here")
        fd = os.memfd_create("imex-symmetric", os.MFD_CLOEXEC)
        os.ftruncate(fd, nbytes)
        self._files.append(fd)
        return self._buffer(mmap.mmap(fd, nbytes), nbytes, fd)

    def export(self, buffer: Buffer) -> str:
        self.host_calls += 1
        fd = buffer.owner.fd
        if fd is None:
            raise DeviceError("only memory from symmetric() can be exported")
        return f"memfd:{os.getpid()}:{fd}:{os.fstat(fd).st_ino}"

    def open(self, handle: str, nbytes: int) -> Buffer:
        self.host_calls += 1
        try:
            kind, pid, fd, inode = handle.split(":")
            if kind != "memfd":
                raise ValueError(kind)
            mine = os.open(f"/proc/{int(pid)}/fd/{int(fd)}", os.O_RDWR | os.O_CLOEXEC)
        except ValueError:
            raise DeviceError(f"{handle!r} is no handle of this simulator") from None
        except OSError as error:
            raise DeviceError(
                f"the memory of peer process {handle.split(':')[1]} cannot be opened: {error.strerror}"
            ) from error
        try:
            status = os.fstat(mine)
            if status.st_ino != int(inode) or status.st_size != nbytes:
                raise DeviceError(f"peer process {pid} no longer has the {nbytes} bytes it exported")
            return self._buffer(mmap.mmap(mine, nbytes), nbytes)
        finally:
            os.close(mine)

    def map_host(self, memory: memoryview) -> int:
        self.host_calls += 1
        view = (ctypes.c_char * len(memory)).from_buffer(memory)
        self._held.append(view)
        return ctypes.addressof(view)

    def _buffer(self, memory: mmap.mmap, nbytes: int, fd: int | None = None) -> Buffer:
        owner = _Mapping(memory, fd)
        self._held.append(owner)
        return Buffer(ctypes.addressof(owner.view), nbytes, owner)

    def upload(self, buffer: Buffer, offset: int, array: np.ndarray) -> None:
        self.host_calls += 1
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        _check_range(buffer, offset, flat.nbytes)
        ctypes.memmove(buffer.address + offset, flat.ctypes.data, flat.nbytes)

    def download(self, buffer: Buffer, offset: int, nbytes: int) -> np.ndarray:
        self.host_calls += 1
        _check_range(buffer, offset, nbytes)
        out = np.empty(nbytes, np.uint8)
        ctypes.memmove(out.ctypes.data, buffer.address + offset, nbytes)
        return out

    # ------------------------------------------------------------------------------------------ kernels
    def compile(self, shapes: list[np.void], source: os.PathLike | None = None) -> None:
        if shapes:  # one build serves them all
            self.load(shapes[0], source=source)

    def load(self, shape: np.void, *, source: os.PathLike | None = None) -> SimKernel:
        """`source`: another kernel than the device's."""
        self.host_calls += 1
        build = self._build if source is None else self._build | {"source": source}
        return SimKernel(load_library(str(hostcc.build(**build))), shape)

    def launch(self, kernel: SimKernel, params: np.void) -> SimLaunch:
        self.host_calls += 1
        self._launches = [launch for launch in self._launches if not launch.done()]
        if self._launches:
            raise DeviceError("a kernel is already running on this device")
        launch = SimLaunch(self, kernel, np.array(params, abi.LaunchParams))
        self._launches.append(launch)
        return launch

    def close(self) -> None:
        for launch in self._launches:
            launch.stop()
        self._launches.clear()
        for fd in self._files:
            os.close(fd)
        self._files.clear()
        self._held.clear()


class _Mapping:
    """Keeps a mapping, and the C view of it whose address we gave away, alive."""

    def __init__(self, memory: mmap.mmap, fd: int | None):
        self.memory, self.fd = memory, fd
        self.view = ctypes.c_char.from_buffer(memory)


def _check_range(buffer: Buffer, offset: int, nbytes: int) -> None:
    if offset < 0 or offset + nbytes > buffer.nbytes:
        raise ValueError(f"bytes {offset} to {offset + nbytes} are outside a buffer of {buffer.nbytes} bytes")
