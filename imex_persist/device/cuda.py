"""A GPU: CuPy loads the compiled kernel and offers arrays, cuda-python does the rest.

One process, one GPU, one or several ranks. Nothing may synchronise the device while the kernel is resident, or it hangs for ever:
no allocation or free, no module load, no copy. So every method that would refuses while a launch is running, and what may be
called then (`Launch.done`, `Launch.wait`) only asks the stream. Shared host memory is read and written without any call at all.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imex_persist import abi
from imex_persist.device import nvrtc
from imex_persist.device.base import Buffer
from imex_persist.device.cuda_peers import PeerHandle, why_not_opened
from imex_persist.errors import DeviceError
from imex_persist.planner import Machine

MIN_CAPABILITY = (9, 0)
ENTRY = "decode"
THREADS = abi.NUM_WARPS * 32  # kThreads of cuda/primitives.cuh
PAGE = mmap.PAGESIZE
SYMMETRIC_GRAIN = 2 << 20  # the driver's allocation grain: a smaller export would share its pages with strangers
POLL_S = (50e-6, 5e-3)  # between two looks at the stream: the first pause, the longest


@dataclass
class CudaKernel:
    """A loaded kernel. Keeping it keeps its module loaded: unloading one would wait for a resident kernel."""

    build: nvrtc.Build
    shape: np.void
    function: int  # CUfunction
    module: Any


@dataclass
class HostBlock:
    """Whole pages of host memory that the GPU maps."""

    first: int
    end: int
    mapped: int  # where the kernel sees `first`
    memory: memoryview


class CudaLaunch:
    """A launch on the device's own stream; asking about it disturbs nothing."""

    def __init__(self, device: CudaDevice, stream: int):
        self._device, self._stream, self._finished = device, stream, False

    def done(self) -> bool:
        """Whether the kernel has returned. Raises DeviceError if it failed: then this process's CUDA context is lost."""
        if not self._finished:
            self._finished = self._device._stream_is_idle(self._stream)
        return self._finished

    def wait(self, timeout_s: float) -> bool:
        end, pause = time.monotonic() + timeout_s, POLL_S[0]
        while not self.done():
            left = end - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, POLL_S[1])
        return True


class CudaDevice:
    """imex_persist.device.base.Device on the GPU `ordinal` (CUDA_VISIBLE_DEVICES applied, in PCI bus order)."""

    name = "cuda"

    def __init__(self, ordinal: int = 0):
        self.host_calls = 0
        self.ordinal = ordinal
        self._frees: list[Callable[[], None]] = []  # undone last to first by close()
        self._peer_frees: list[Callable[[], None]] = []
        self._hosts: list[HostBlock] = []
        self._kernels: list[CudaKernel] = []
        self._running: CudaLaunch | None = None
        self._lost = False  # a kernel failed, and with it this process's CUDA context
        self._stream = 0
        _check_environment()
        self._cupy, self._runtime, self._driver = _import_packages()
        self._find()
        self.compute_capability = (self._attribute("ComputeCapabilityMajor"), self._attribute("ComputeCapabilityMinor"))
        properties = self._rt("cudaGetDeviceProperties", ordinal)
        self.gpu_name = properties.name.decode().rstrip("\0")
        self.uuid = _format_uuid(properties.uuid.bytes)
        if self.compute_capability < MIN_CAPABILITY:
            found = ".".join(map(str, self.compute_capability))
            raise DeviceError(
                f"GPU {ordinal} is {self.gpu_name} with compute capability {found}: 9.0 or later (Hopper) is needed; "
                "use another GPU, or device='sim'"
            )
        self.arch = f"sm_{''.join(map(str, self.compute_capability))}a"
        # kHz, bits, two transfers a clock
        memory_tb_s = self._attribute("MemoryClockRate") * 1e3 * self._attribute("GlobalMemoryBusWidth") / 8 * 2 / 1e12
        blocks, shared = self._attribute("MultiProcessorCount"), self._attribute("MaxSharedMemoryPerBlockOptin")
        self.machine = Machine(blocks, shared, memory_tb_s=memory_tb_s, exact_header=True)
        self._stream = int(self._rt("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking))

    # -------------------------------------------------------------------------------------------- who am I
    def identity(self) -> dict[str, str]:
        version = self._rt("cudaDriverGetVersion")
        return {
            "uuid": self.uuid,
            "name": self.gpu_name,
            "arch": self.arch,
            "cuda_driver": f"{version // 1000}.{version % 1000 // 10}",
            "nvrtc": ".".join(map(str, nvrtc.version())),
        }

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the GPU."""
        self._idle("ask for free memory")
        free, total = self._rt("cudaMemGetInfo")
        return int(free), int(total)

    # -------------------------------------------------------------------------------------------- memory
    def zeros(self, nbytes: int) -> Buffer:
        return self._allocate(nbytes, max(nbytes, 16))

    def symmetric(self, nbytes: int) -> Buffer:
        return self._allocate(nbytes, -(-max(nbytes, 1) // SYMMETRIC_GRAIN) * SYMMETRIC_GRAIN)

    def _allocate(self, nbytes: int, reserved: int) -> Buffer:
        self._idle("allocate")
        status, address = self._raw("cudaMalloc", reserved)
        if status:
            free, total = self._rt("cudaMemGetInfo")
            raise DeviceError(
                f"GPU {self.ordinal} ({self.gpu_name}) has {free / 2**30:.2f} of {total / 2**30:.2f} GiB free, and "
                f"{reserved / 2**30:.2f} GiB more are needed: use more ranks, a smaller max_model_len or fewer max_num_seqs, or end "
                "what else uses the GPU"
            )
        address = int(address)
        self._frees.append(lambda: self._raw("cudaFree", address))
        self._rt("cudaMemset", address, 0, reserved)
        return Buffer(address, nbytes)

    def export(self, buffer: Buffer) -> str:
        handle = self._rt("cudaIpcGetMemHandle", buffer.address)
        return PeerHandle(self.uuid, os.getpid(), buffer.nbytes, ctypes.string_at(handle.getPtr(), 64)).to_text()

    def open(self, handle: str, nbytes: int) -> Buffer:
        self._idle("map a peer's memory")
        peer = PeerHandle.from_text(handle)
        peer.check(self.uuid, nbytes)
        struct = self._runtime.cudaIpcMemHandle_t()
        ctypes.memmove(struct.getPtr(), peer.handle, 64)
        status, address = self._raw("cudaIpcOpenMemHandle", struct, self._runtime.cudaIpcMemLazyEnablePeerAccess)
        if status:
            raise DeviceError(why_not_opened(self._error_name(status), self.uuid, peer))
        address = int(address)
        self._peer_frees.append(lambda: self._raw("cudaIpcCloseMemHandle", address))
        return Buffer(address, nbytes)

    def map_host(self, memory: memoryview) -> int:
        """Keeps `memory` alive until `close`: pages that the GPU maps must not become somebody else's."""
        self._idle("register host memory")
        address = np.frombuffer(memory, np.uint8).ctypes.data
        first, end = address // PAGE * PAGE, -(-(address + memory.nbytes) // PAGE) * PAGE
        for host in self._hosts:
            if host.first <= first and end <= host.end:  # mapped already, alone or within more
                return host.mapped + address - host.first
        self._rt("cudaHostRegister", first, end - first, self._runtime.cudaHostRegisterMapped)
        self._frees.append(lambda: self._raw("cudaHostUnregister", first))
        mapped = int(self._rt("cudaHostGetDevicePointer", first, 0))
        self._hosts.append(HostBlock(first, end, mapped, memoryview(memory)))
        return mapped + address - first

    # -------------------------------------------------------------------------------------------- copies
    def upload(self, buffer: Buffer, offset: int, array: Any) -> None:
        """From a NumPy array, or from a CuPy array (on the device already, or on another GPU of this process)."""
        self._idle("copy")
        if hasattr(array, "__cuda_array_interface__"):
            array = self._cupy.ascontiguousarray(array)
            source = array.data.ptr
        else:
            array = np.ascontiguousarray(array)
            source = array.ctypes.data
        self._check_range(buffer, offset, array.nbytes)
        if array.nbytes:
            kind = self._runtime.cudaMemcpyKind.cudaMemcpyDefault
            self._rt("cudaMemcpy", buffer.address + offset, source, array.nbytes, kind)

    def download(self, buffer: Buffer, offset: int, nbytes: int) -> np.ndarray:
        self._idle("copy")
        self._check_range(buffer, offset, nbytes)
        out = np.empty(nbytes, np.uint8)
        if nbytes:
            kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
            self._rt("cudaMemcpy", out.ctypes.data, buffer.address + offset, nbytes, kind)
        return out

    @property
    def xp(self) -> Any:
        """CuPy, with this GPU current: packing and random weights are made where they are needed, before residency."""
        self._idle("use CuPy")
        self.host_calls += 1
        return self._cupy

    def view(self, buffer: Buffer, dtype: Any, shape: tuple[int, ...], offset: int = 0) -> Any:
        """A CuPy array that *is* this part of a buffer, to be filled in place. It must be gone before `close`."""
        xp, dtype = self.xp, np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self._check_range(buffer, offset, nbytes)
        memory = xp.cuda.UnownedMemory(buffer.address + offset, nbytes, buffer, self.ordinal)
        return xp.ndarray(shape, dtype, xp.cuda.MemoryPointer(memory, 0))

    def _check_range(self, buffer: Buffer, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > buffer.nbytes:
            raise ValueError(f"bytes {offset} to {offset + nbytes} are outside a buffer of {buffer.nbytes} bytes")

    # -------------------------------------------------------------------------------------------- the kernel
    def compile(self, shapes: list[np.void], source: Path | None = None) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC compiles without Python's lock
            list(pool.map(lambda shape: nvrtc.compile_kernel(shape, self.arch, source), shapes))

    def load(self, shape: np.void, *, source: Path | None = None, entry: str = ENTRY) -> CudaKernel:
        """Compiled for this GPU, loaded and ready: after this a launch has nothing left to load. Tests name other sources."""
        self._idle("load a kernel")
        build = nvrtc.compile_kernel(shape, self.arch, source)
        self.host_calls += 2
        try:
            module = self._cupy.RawModule(path=str(build.cubin))
            function = int(module.get_function(entry).kernel.ptr)
        except Exception as error:  # CuPy's own classes differ between its versions
            raise DeviceError(
                f"{build.cubin} ({entry}, {self.arch}) cannot be loaded on {self.gpu_name}: {error}; the driver must be at least as "
                "new as the CUDA packages: update it, or install the extra of its CUDA version (cuda12 or cuda13)"
            ) from error
        attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._dr("cuFuncSetAttribute", function, attribute, int(shape["smem_bytes"]))
        kernel = CudaKernel(build, shape.copy(), function, module)
        self._kernels.append(kernel)
        return kernel

    def launch(self, kernel: CudaKernel, params: np.void) -> CudaLaunch:
        self._idle("launch a second kernel")
        num_ranks, shared = int(params["num_ranks"]), int(kernel.shape["smem_bytes"])
        grid = num_ranks * int(kernel.shape["num_blocks"])
        resident = self.resident_blocks(kernel)
        if not 0 < grid <= resident:
            raise DeviceError(
                f"{num_ranks} rank(s) of {int(kernel.shape['num_blocks'])} blocks are {grid} blocks, and GPU {self.ordinal} "
                f"({self.gpu_name}) runs {resident} of them at once ({shared} bytes of shared memory each): all must run together; "
                "plan fewer blocks a rank, or use more GPUs"
            )
        record = np.array(params, abi.LaunchParams)  # passed by value: the driver copies it during the call
        pointers = np.array([record.ctypes.data], np.uint64)
        gc.collect()  # what dies later would free memory or unload a module while the kernel is resident
        self.host_calls += 1
        self._cupy.get_default_memory_pool().free_all_blocks()
        self._rt("cudaDeviceSynchronize")  # the last time: uploads and CuPy's own kernels are complete
        self._dr(
            "cuLaunchCooperativeKernel", kernel.function, grid, 1, 1, THREADS, 1, 1, shared, self._stream, pointers.ctypes.data
        )
        self._running = CudaLaunch(self, self._stream)
        return self._running

    def resident_blocks(self, kernel: CudaKernel) -> int:
        """How many blocks of a kernel this GPU runs at the same time."""
        shared = int(kernel.shape["smem_bytes"])
        blocks = self._dr("cuOccupancyMaxActiveBlocksPerMultiprocessor", kernel.function, THREADS, shared)
        return int(blocks) * self.machine.num_blocks

    def _stream_is_idle(self, stream: int) -> bool:
        (status,) = self._raw("cudaStreamQuery", stream)
        if status == int(self._runtime.cudaError_t.cudaErrorNotReady):
            return False
        if status:
            self._lost = True
            raise DeviceError(
                f"the kernel failed on GPU {self.ordinal} ({self.gpu_name}) with {self._error_name(status)}: this process's CUDA "
                "context is lost; start a new process"
            )
        return True

    # -------------------------------------------------------------------------------------------- the end
    def close_peers(self) -> None:
        """Unmaps what was opened. All ranks do this before any frees: freeing memory that a peer still maps is undefined."""
        self._idle("unmap a peer's memory")
        while self._peer_frees:
            self._peer_frees.pop()()

    def close(self) -> None:
        """Raises DeviceError if a kernel is still running, since to free anything would wait for it; the process can still exit."""
        if self._running is not None and not self._lost:
            self._running.wait(0.5)
        if self._lost:  # every call fails now: the memory goes with the process
            for held in (self._peer_frees, self._frees, self._hosts):
                held.clear()
            return
        self.close_peers()
        self._running = None
        self._kernels.clear()
        while self._frees:
            self._frees.pop()()
        self._hosts.clear()
        if self._stream:
            self._raw("cudaStreamDestroy", self._stream)
            self._stream = 0

    def _idle(self, what: str) -> None:
        """Every public method passes here: selects the GPU for this thread, and refuses what a resident kernel would block."""
        if self._running is not None and not self._running.done():
            raise DeviceError(f"a kernel is resident on GPU {self.ordinal}: to {what} would wait for it for ever; end it first")
        self._select()

    # -------------------------------------------------------------------------------------------- calls
    def _find(self) -> None:
        status, count = self._raw("cudaGetDeviceCount")
        if status:
            raise DeviceError(
                f"no GPU can be used, {self._error_name(status)}: check the driver with nvidia-smi, or use device='sim'"
            )
        if not 0 <= self.ordinal < count:
            shown = os.environ.get("CUDA_VISIBLE_DEVICES")
            limit = "" if shown is None else f" (CUDA_VISIBLE_DEVICES is {shown!r})"
            raise DeviceError(
                f"GPU {self.ordinal} does not exist: {count} can be seen, counted from 0{limit}; name one of them"
            )
        self._select()

    def _select(self) -> None:
        """For the calling thread; CuPy has a CUDA runtime of its own."""
        (status,) = self._raw("cudaSetDevice", self.ordinal)  # makes the context
        if status == int(self._runtime.cudaError_t.cudaErrorMemoryAllocation):
            why = "no memory left for a CUDA context: nvidia-smi shows what else uses it; end that, or use another GPU"
            raise DeviceError(f"GPU {self.ordinal} has {why}")
        self._rt("cudaSetDevice", self.ordinal)
        self.host_calls += 1
        self._cupy.cuda.Device(self.ordinal).use()

    def _attribute(self, name: str) -> int:
        attribute = getattr(self._runtime.cudaDeviceAttr, f"cudaDevAttr{name}")
        return int(self._rt("cudaDeviceGetAttribute", attribute, self.ordinal))

    def _raw(self, function: str, *args: Any) -> tuple:
        """(status as a number, values …) of a CUDA runtime call."""
        self.host_calls += 1
        status, *values = getattr(self._runtime, function)(*args)
        return int(status), *values

    def _rt(self, function: str, *args: Any) -> Any:
        status, *values = self._raw(function, *args)
        if status:
            raise DeviceError(f"{function} on GPU {self.ordinal} failed with {self._error_name(status)}")
        return values[0] if len(values) == 1 else values

    def _dr(self, function: str, *args: Any) -> Any:
        """The same for the driver's own functions."""
        self.host_calls += 1
        status, *values = getattr(self._driver, function)(*args)
        if int(status):
            raise DeviceError(f"{function} on GPU {self.ordinal} failed with {self._driver.CUresult(int(status)).name}")
        return values[0] if len(values) == 1 else values

    def _error_name(self, status: int) -> str:
        error = self._runtime.cudaError_t(status)
        _, text = self._runtime.cudaGetErrorString(error)
        return f"{error.name} ({text.decode()})" if text else error.name


def _check_environment() -> None:
    """Before CUDA reads its environment."""
    if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        raise DeviceError("CUDA_LAUNCH_BLOCKING is set: every launch would wait for a kernel that never returns; unset it")
    os.environ["CUDA_MODULE_LOADING"] = "EAGER"  # a lazy load waits for the device, which waits for the host
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as runtime/discover.py counts


def _import_packages() -> tuple[Any, Any, Any]:
    try:
        import cupy
        from cuda.bindings import driver, runtime
    except ImportError as error:
        raise DeviceError(f"a package that drives the GPU is missing ({error}): {nvrtc.PACKAGES_HINT}") from error
    return cupy, runtime, driver


def _format_uuid(raw: bytes) -> str:
    text = bytes(raw).hex()
    return f"GPU-{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
