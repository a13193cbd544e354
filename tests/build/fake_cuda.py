"""A CUDA that is host memory: what CudaDevice asks of cuda-python and CuPy, so that its logic is tested where no GPU is."""

from __future__ import annotations

import ctypes
import enum
import sys
import types

import numpy as np


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorMapBufferObjectFailed = 205
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    CUDA_SUCCESS = 0


class FakeCuda:
    """One GPU of 1 MiB. `running` is what the stream answers; `launched` what the last launch was given."""

    def __init__(self, capability=(9, 0), count=1, blocks_per_sm=1):
        self.capability, self.count, self.blocks_per_sm = capability, count, blocks_per_sm
        self.memory: dict[int, ctypes.Array] = {}
        self.registered: set[int] = set()
        self.opened: set[int] = set()
        self.stream_status = Status.cudaSuccess
        self.launched: dict = {}
        self.calls: list[str] = []

    # runtime
    def cudaGetDeviceCount(self):
        return (Status.cudaSuccess, self.count) if self.count else (Status.cudaErrorMemoryAllocation, None)

    def cudaDeviceGetAttribute(self, attribute, ordinal):
        major, minor = self.capability
        values = {"ComputeCapabilityMajor": major, "ComputeCapabilityMinor": minor}
        values |= {"MultiProcessorCount": 132, "MaxSharedMemoryPerBlockOptin": 232448}
        values |= {"MemoryClockRate": 2_619_000, "GlobalMemoryBusWidth": 5120}  # kHz, bits: an H100's
        return Status.cudaSuccess, values[attribute]

    def cudaGetDeviceProperties(self, ordinal):
        return Status.cudaSuccess, types.SimpleNamespace(
            name=b"Fake H100\0", uuid=types.SimpleNamespace(bytes=bytes(range(16)))
        )

    def cudaMalloc(self, nbytes):
        if sum(map(len, self.memory.values())) + nbytes > 64 << 20:
            return Status.cudaErrorMemoryAllocation, None
        block = ctypes.create_string_buffer(b"\xaa" * nbytes, nbytes)
        self.memory[ctypes.addressof(block)] = block
        return Status.cudaSuccess, ctypes.addressof(block)

    def cudaFree(self, address):
        del self.memory[address]
        return (Status.cudaSuccess,)

    def cudaMemGetInfo(self):
        return Status.cudaSuccess, 1 << 20, 64 << 20

    def cudaMemset(self, address, value, nbytes):
        ctypes.memset(address, value, nbytes)
        return (Status.cudaSuccess,)

    def cudaMemcpy(self, to, source, nbytes, kind):
        ctypes.memmove(to, source, nbytes)
        return (Status.cudaSuccess,)

    def cudaIpcGetMemHandle(self, address):
        handle = IpcHandle()
        ctypes.memmove(handle.getPtr(), address.to_bytes(64, "little"), 64)
        return Status.cudaSuccess, handle

    def cudaIpcOpenMemHandle(self, handle, flags):
        address = int.from_bytes(ctypes.string_at(handle.getPtr(), 64), "little")
        if address not in self.memory:
            return Status.cudaErrorMapBufferObjectFailed, None
        self.opened.add(address)
        return Status.cudaSuccess, address

    def cudaIpcCloseMemHandle(self, address):
        self.opened.remove(address)
        return (Status.cudaSuccess,)

    def cudaHostRegister(self, address, nbytes, flags):
        self.registered.add(address)
        return (Status.cudaSuccess,)

    def cudaHostUnregister(self, address):
        self.registered.remove(address)
        return (Status.cudaSuccess,)

    def cudaHostGetDevicePointer(self, address, flags):
        return Status.cudaSuccess, address

    def cudaStreamCreateWithFlags(self, flags):
        return Status.cudaSuccess, 77

    def cudaStreamQuery(self, stream):
        return (self.stream_status,)

    def cudaDriverGetVersion(self):
        return Status.cudaSuccess, 13000

    def cudaGetErrorString(self, error):
        return Status.cudaSuccess, b"as the fake says"

    # driver
    def cuLaunchCooperativeKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, params):
        (first,) = np.frombuffer(ctypes.string_at(params, 8), np.uint64)
        self.launched = {"function": function, "grid": (gx, gy, gz), "block": (bx, by, bz), "shared": shared, "stream": stream}
        self.launched["params"] = int(first)
        self.stream_status = Status.cudaErrorNotReady
        return (Status.CUDA_SUCCESS,)

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(self, function, threads, shared):
        return Status.CUDA_SUCCESS, self.blocks_per_sm

    def __getattr__(self, name):
        if name.startswith("cu"):  # what needs no answer
            return lambda *args: (Status.cudaSuccess,)
        raise AttributeError(name)


class IpcHandle:
    def __init__(self):
        self._bytes = ctypes.create_string_buffer(64)

    def getPtr(self):
        return ctypes.addressof(self._bytes)


def _recording(fake: FakeCuda, extra: dict) -> types.SimpleNamespace:
    class Module(types.SimpleNamespace):
        def __getattr__(self, name):
            function = getattr(fake, name)

            def call(*args):
                fake.calls.append(name)
                return function(*args)

            return call

    return Module(**extra)


def install(monkeypatch, fake: FakeCuda) -> None:
    """Puts `fake` where `import cupy` and `from cuda.bindings import …` look."""

    class Names:
        def __getattr__(self, name):
            return name.removeprefix("cudaDevAttr")

    runtime = _recording(fake, {"cudaError_t": Status, "cudaDeviceAttr": Names(), "cudaMemcpyKind": Names()})
    runtime.cudaIpcMemHandle_t = IpcHandle
    for flag in ("cudaStreamNonBlocking", "cudaHostRegisterMapped", "cudaIpcMemLazyEnablePeerAccess"):
        setattr(runtime, flag, 1)
    driver = _recording(fake, {"CUfunction_attribute": Names(), "CUresult": Status})
    bindings = types.ModuleType("cuda.bindings")
    bindings.driver, bindings.runtime = driver, runtime
    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(Device=lambda ordinal: types.SimpleNamespace(use=lambda: None))
    cupy.get_default_memory_pool = lambda: types.SimpleNamespace(free_all_blocks=lambda: None)
    kernel = types.SimpleNamespace(kernel=types.SimpleNamespace(ptr=4242))
    cupy.RawModule = lambda path: types.SimpleNamespace(get_function=lambda entry: kernel)
    cuda = types.ModuleType("cuda")
    cuda.bindings = bindings
    for name, module in (("cuda", cuda), ("cuda.bindings", bindings), ("cupy", cupy)):
        monkeypatch.setitem(sys.modules, name, module)
