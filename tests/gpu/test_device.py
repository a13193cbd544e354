"""CudaDevice on a real GPU: memory, copies, mapped host memory, launches, and its refusals while a kernel is resident."""

from __future__ import annotations

import mmap
import time

import numpy as np
import pytest

from imex_persist import abi
from imex_persist.errors import DeviceError

from .bench import KERNELS, make_shape

DEADLINE_US = 20_000_000


def test_identity_and_machine(device):
    identity = device.identity()
    assert identity["uuid"].startswith("GPU-")
    assert len(identity["uuid"]) == 40
    assert identity["arch"].startswith("sm_")
    assert device.machine.num_blocks >= 16
    assert device.machine.shared_memory_bytes >= 99 * 1024


def test_memory_is_zeroed_and_copied(device):
    data = np.random.default_rng(0).integers(0, 256, 1_000_003, np.uint8)
    for make in (device.zeros, device.symmetric):
        buffer = make(len(data) + 16)
        assert not device.download(buffer, 0, buffer.nbytes).any()
        device.upload(buffer, 16, data)
        np.testing.assert_array_equal(device.download(buffer, 16, len(data)), data)
        with pytest.raises(ValueError, match="outside a buffer"):
            device.upload(buffer, 32, data)


def test_upload_from_the_device_and_a_view(device):
    xp = device.xp
    buffer = device.zeros(4096 * 4)
    device.upload(buffer, 0, xp.arange(4096, dtype=np.uint32)[::-1])
    np.testing.assert_array_equal(device.download(buffer, 0, buffer.nbytes).view(np.uint32), np.arange(4096)[::-1])
    view = device.view(buffer, np.uint32, (64, 64))
    view += xp.uint32(5)
    np.testing.assert_array_equal(device.download(buffer, 0, buffer.nbytes).view(np.uint32), np.arange(4096)[::-1] + 5)
    del view


def test_out_of_memory_says_how_much(device):
    _, total = device.memory()
    with pytest.raises(DeviceError, match=r"GiB free, and .* GiB more are needed"):
        device.zeros(total * 2)


def launch_parameters(device, num_ranks: int, num_blocks: int, mailbox: int):
    told = [device.zeros(num_blocks * 16) for _ in range(num_ranks)]
    params = np.zeros((), abi.LaunchParams)
    params["num_ranks"] = num_ranks
    for rank in range(num_ranks):
        params["ranks"][rank]["rank"] = rank
        params["ranks"][rank]["tap"] = told[rank].address
        params["ranks"][rank]["mailbox"] = mailbox
        params["ranks"][rank]["deadline_us"] = DEADLINE_US
    return params[()], told


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_launch_echo_and_host_memory(device, num_ranks):
    """Parameters by value, all of the shared memory, every block at once; then the host talks to the running kernel with no calls."""
    num_blocks = device.machine.num_blocks // num_ranks
    shape = make_shape(num_blocks=num_blocks, smem_bytes=device.machine.shared_memory_bytes)
    host = mmap.mmap(-1, mmap.PAGESIZE)
    mail = memoryview(host).cast("I")
    kernel = device.load(shape, source=KERNELS, entry="echo")
    params, told = launch_parameters(device, num_ranks, num_blocks, device.map_host(memoryview(host)))
    launch = device.launch(kernel, params)
    calls, times = device.host_calls, []
    for i in range(1, 1001):
        began = time.perf_counter()
        mail[0] = i
        while mail[16] != i and time.perf_counter() - began < 5:
            pass
        times.append(time.perf_counter() - began)
    assert mail[16] == 1000, "the kernel does not see the host's memory, or the host not the kernel's"
    assert device.host_calls == calls, "talking to a resident kernel must need no host call"
    assert not launch.done()
    for forbidden in (lambda: device.zeros(16), lambda: device.download(told[0], 0, 16), lambda: device.xp, device.close_peers):
        with pytest.raises(DeviceError, match="resident"):
            forbidden()
    assert not launch.wait(0.01)
    mail[1] = 1
    assert launch.wait(5)
    assert launch.done()
    for rank, buffer in enumerate(told):
        got = device.download(buffer, 0, buffer.nbytes).view(np.uint32).reshape(num_blocks, 4)
        want = [[rank, num_ranks, block & 0xFF, DEADLINE_US] for block in range(num_blocks)]
        np.testing.assert_array_equal(got, want)
    print(f"host to kernel and back: median {sorted(times)[500] * 1e6:.2f} us")
    mail.release()


def test_a_grid_that_does_not_fit_is_refused(device):
    shape = make_shape(num_blocks=device.machine.num_blocks, smem_bytes=device.machine.shared_memory_bytes)
    kernel = device.load(shape, source=KERNELS, entry="echo")
    params, _ = launch_parameters(device, 2, device.machine.num_blocks, 0)
    with pytest.raises(DeviceError, match="all must run together"):
        device.launch(kernel, params)


def test_a_handle_of_this_process_is_refused(device):
    handle = device.export(device.symmetric(1 << 16))
    with pytest.raises(DeviceError, match="its own handle"):
        device.open(handle, 1 << 16)
    with pytest.raises(DeviceError, match="no handle"):
        device.open("something else", 1 << 16)


def test_launch_blocking_is_refused(device, monkeypatch):
    from imex_persist.device.cuda import CudaDevice

    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    with pytest.raises(DeviceError, match="CUDA_LAUNCH_BLOCKING"):
        CudaDevice(device.ordinal)
