"""What the simulator says when a kernel cannot go on."""

from __future__ import annotations

import multiprocessing
import time

import numpy as np
import pytest

from imex_persist.errors import DeviceError
from tests.sim.kernels import Small


@pytest.mark.parametrize("lanes", [1, 32])
def test_deadlock_names_who_waits_for_what(lanes):
    said = r"deadlock.*\n.*rank 0 block 0 warp 0.*in o_proj of layer 7, waits for words of rank 1 .*epoch 5, seen 0"
    with pytest.raises(DeviceError, match=said):
        Small("stuck.cu", lanes, world=2).run()


def test_deadlock_at_a_barrier():
    with pytest.raises(DeviceError, match="at consumer_sync, where 7 have arrived"):
        Small("stuck.cu", 1, case=1).run()


@pytest.mark.parametrize("lanes", [1, 32])
def test_deadlines_expire_in_virtual_time(lanes):
    kernel = Small("stuck.cu", lanes, world=2, on_deadlock="expire", deadline_us=5_000_000)
    began = time.monotonic()
    kernel.run()
    assert time.monotonic() - began < 2
    fault = kernel.fault(0)
    assert (fault["valid"], fault["expected"], fault["seen"], fault["source"]) == (1, 5, 0, 1)
    assert 5_000_000 <= fault["waited_us"] < 6_000_000


@pytest.mark.parametrize(("case", "said"), [(2, "more arrivals than its count"), (3, "not multiples of 16")])
def test_misuse_is_said(case, said):
    kernel = Small("stuck.cu", 1, case=case)
    with pytest.raises(DeviceError, match=said):
        kernel.run()
    with pytest.raises(DeviceError, match=said):  # and leaves the simulator usable
        kernel.run()


@pytest.mark.parametrize("lanes", [1, 32])
def test_mailbox_waits_for_the_host(lanes):
    kernel = Small("stuck.cu", lanes, case=4, deadline_us=1000)
    launch = kernel.start()
    assert not launch.wait(0.1)  # idle waits have no deadline
    kernel.device.upload(kernel.memory[0], 8, np.ones(1, np.uint32))
    assert launch.wait(10)
    assert kernel.result(0)[0] == 1


def test_stop_ends_a_launch():
    kernel = Small("stuck.cu", 1, case=4)
    launch = kernel.start()
    with pytest.raises(DeviceError, match="already running"):
        kernel.device.launch(kernel.kernel, kernel.params)
    launch.stop()
    with pytest.raises(DeviceError, match="stopped by the host"):
        launch.wait(10)
    kernel.device.close()


def test_an_abort_word_ends_every_wait():
    kernel = Small("stuck.cu", 1, case=4)
    launch = kernel.start()
    kernel.device.upload(kernel.memory[0], int(kernel.shape["off_abort"]) * 8, np.ones(1, np.uint32))
    kernel.device.upload(kernel.memory[0], 8, np.ones(1, np.uint32))
    assert launch.wait(10)


def _rank(rank: int, pipe, deadline_us: int, silent: bool) -> None:
    kernel = Small("stuck.cu", 1, world=2, case=5, processes=True, deadline_us=deadline_us)
    memory = kernel.device.symmetric(4096 * 8)
    pipe.send(kernel.device.export(memory))
    peer = kernel.device.open(pipe.recv(), 4096 * 8)
    kernel.params["num_ranks"] = 1
    kernel.params["ranks"][0] = kernel.params["ranks"][rank]
    kernel.params["ranks"][0]["peers"][rank], kernel.params["ranks"][0]["peers"][1 - rank] = memory.address, peer.address
    if not silent:
        kernel.results[0], kernel.faults[0] = kernel.results[rank], kernel.faults[rank]
        kernel.run()
        pipe.send((float(kernel.result(0)[0]), int(kernel.fault(0)["valid"])))
    pipe.recv()


@pytest.mark.parametrize("silent", [False, True])
def test_ranks_in_processes(silent):
    """Both halves arrive; or, when one rank never runs, the other's deadline passes in wall time."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    ranks = [
        context.Process(target=_rank, args=(r, pipes[r][1], 300_000 if silent else 20_000_000, silent and r == 1), daemon=True)
        for r in range(2)
    ]
    for process in ranks:
        process.start()
    handles = [pipes[r][0].recv() for r in range(2)]
    for r in range(2):
        pipes[r][0].send(handles[1 - r])
    answers = [pipes[r][0].recv() if not (silent and r) else None for r in range(2)]
    for r in range(2):
        pipes[r][0].send(None)
    for process in ranks:
        process.join(10)
        assert process.exitcode == 0
    assert answers[0] == ((0.0, 1) if silent else (41.0, 0))
    assert silent or answers[1] == (40.0, 0)
