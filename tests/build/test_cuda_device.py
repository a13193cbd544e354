"""CudaDevice's own logic on a fake CUDA: refusals, ownership, what a launch is given. tests/gpu has the real one."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from imex_persist import abi
from imex_persist.device import cuda, nvrtc
from imex_persist.device.cuda_peers import PeerHandle
from imex_persist.errors import DeviceError
from tests.gpu.bench import make_shape

from .fake_cuda import FakeCuda, Status, install

OTHER_GPU = "GPU-ffffffff-0000-0000-0000-000000000000"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING", "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    build = nvrtc.Build(Path("/nowhere"), "sm_90a", "")
    monkeypatch.setattr(nvrtc, "compile_kernel", lambda shape, arch, source=None: build)


@pytest.fixture
def fake(monkeypatch):
    fake = FakeCuda()
    install(monkeypatch, fake)
    return fake


def parameters(num_ranks: int = 1) -> np.void:
    params = np.zeros((), abi.LaunchParams)
    params["num_ranks"] = num_ranks
    return params[()]


def test_identity_and_environment(fake):
    device = cuda.CudaDevice(0)
    assert (device.arch, device.machine.num_blocks, device.machine.shared_memory_bytes) == ("sm_90a", 132, 232448)
    assert device.uuid == "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert os.environ["CUDA_MODULE_LOADING"] == "EAGER"
    assert device.host_calls >= len(fake.calls)


class FullCuda(FakeCuda):
    """Somebody else has all of the GPU's memory."""

    def cudaSetDevice(self, ordinal):
        return (Status.cudaErrorMemoryAllocation,)


@pytest.mark.parametrize(
    ("fake", "ordinal", "says"),
    [
        (FakeCuda(capability=(8, 0)), 0, "compute capability 8.0: 9.0 or later"),
        (FakeCuda(count=0), 0, "no GPU can be used"),
        (FakeCuda(count=2), 2, "GPU 2 does not exist: 2 can be seen"),
        (FullCuda(), 0, "GPU 0 has no memory left for a CUDA context: .* use another GPU"),
    ],
)
def test_a_machine_that_cannot(monkeypatch, fake, ordinal, says):
    install(monkeypatch, fake)
    with pytest.raises(DeviceError, match=says):
        cuda.CudaDevice(ordinal)


def test_missing_packages_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match=r"pip install 'imex-persist\[cuda13\]'"):
        cuda.CudaDevice(0)


def test_launch_blocking_is_refused(monkeypatch, fake):
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    with pytest.raises(DeviceError, match="CUDA_LAUNCH_BLOCKING"):
        cuda.CudaDevice(0)


def test_memory(fake):
    device = cuda.CudaDevice(0)
    buffer = device.zeros(100)
    device.upload(buffer, 4, np.arange(24, dtype=np.uint32))
    want = np.concatenate([np.zeros(1, np.uint32), np.arange(24, dtype=np.uint32)])
    np.testing.assert_array_equal(device.download(buffer, 0, 100).view(np.uint32), want)
    device.upload(buffer, 0, np.arange(50, dtype=np.uint16)[::2])  # not contiguous
    np.testing.assert_array_equal(device.download(buffer, 0, 50).view(np.uint16), np.arange(0, 50, 2))
    with pytest.raises(ValueError, match="outside a buffer of 100 bytes"):
        device.download(buffer, 96, 8)
    assert len(fake.memory[device.symmetric(1000).address]) == 2 << 20
    with pytest.raises(DeviceError, match="GiB free, and"):
        device.zeros(1 << 30)
    device.close()
    assert not fake.memory


def test_host_memory_stays_until_the_device_is_closed(fake):
    device = cuda.CudaDevice(0)
    block = mmap.mmap(-1, 3 * mmap.PAGESIZE)
    whole = memoryview(block)
    address = device.map_host(whole)
    assert fake.registered == {address}
    assert device.map_host(whole[mmap.PAGESIZE + 64 :]) == address + mmap.PAGESIZE + 64, "pages are registered once"
    assert fake.registered == {address}
    whole.release()
    with pytest.raises(BufferError):
        block.close()
    device.close()
    assert not fake.registered
    block.close()


def test_launch(fake):
    device = cuda.CudaDevice(0)
    kernel = device.load(make_shape(num_blocks=66, smem_bytes=200_000))
    launch = device.launch(kernel, parameters(2))
    given = dict(fake.launched)
    assert given.pop("params")
    assert given == {
        "function": 4242,
        "grid": (132, 1, 1),
        "block": (abi.NUM_WARPS * 32, 1, 1),
        "shared": 200_000,
        "stream": 77,
    }
    before = len(fake.calls)
    assert not launch.done()
    assert not launch.wait(0.01)
    assert set(fake.calls[before:]) == {"cudaStreamQuery"}, "asking about a resident kernel must not touch the device"
    assert fake.calls.index("cudaDeviceSynchronize") < fake.calls.index("cuLaunchCooperativeKernel")
    for forbidden in (
        lambda: device.zeros(1),
        lambda: device.symmetric(1),
        lambda: device.load(kernel.shape),
        lambda: device.launch(kernel, parameters()),
        lambda: device.map_host(memoryview(bytearray(8))),
        lambda: device.xp,
        device.memory,
        device.close_peers,
        device.close,
    ):
        with pytest.raises(DeviceError, match="resident"):
            forbidden()
    fake.stream_status = Status.cudaSuccess
    assert launch.wait(1)
    assert launch.done()
    device.zeros(1)
    device.close()


def test_a_grid_that_does_not_fit_is_refused(fake):
    device = cuda.CudaDevice(0)
    kernel = device.load(make_shape(num_blocks=132))
    with pytest.raises(DeviceError, match=r"2 rank\(s\) of 132 blocks are 264 blocks, and GPU 0 \(Fake H100\) runs 132"):
        device.launch(kernel, parameters(2))
    assert not fake.launched


def test_a_failed_kernel(fake):
    device = cuda.CudaDevice(0)
    device.zeros(64)
    launch = device.launch(device.load(make_shape()), parameters())
    fake.stream_status = Status.cudaErrorIllegalAddress
    with pytest.raises(DeviceError, match=r"cudaErrorIllegalAddress .* start a new process"):
        launch.wait(1)
    before = len(fake.calls)
    device.close()
    assert len(fake.calls) == before, "a lost context is not called any more"


def test_peers(fake, monkeypatch):
    device = cuda.CudaDevice(0)
    buffer = device.symmetric(4096)
    text = device.export(buffer)
    own = PeerHandle.from_text(text)
    assert (own.pid, own.nbytes, own.uuid) == (os.getpid(), 4096, device.uuid)
    peer = PeerHandle(OTHER_GPU, os.getpid() + 1, own.nbytes, own.handle)
    opened = device.open(peer.to_text(), 4096)
    assert opened.address == buffer.address
    assert fake.opened == {buffer.address}
    device.close_peers()
    assert not fake.opened
    for handle, says in (
        (text, "its own handle"),
        (PeerHandle(device.uuid, own.pid + 1, 4096, own.handle).to_text(), "share the GPU"),
        (PeerHandle(OTHER_GPU, own.pid + 1, 64, own.handle).to_text(), "64 bytes and 4096 are needed"),
        (PeerHandle(OTHER_GPU, own.pid + 1, 4096, bytes(64)).to_text(), "--ipc=host"),
        ("cuda-ipc/1 nonsense", "no handle"),
    ):
        with pytest.raises(DeviceError, match=says):
            device.open(handle, 4096)
