"""Groups of worker processes: from nothing to resident and back, and every way in which they may fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from imex_persist import DeviceError, FaultError
from imex_persist.runtime.request import Submission
from tests.runtime.fake_kernel import token_of
from tests.runtime.groups import all_gone, launch, open_group, pids
from tests.runtime.test_engine import finished

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes share memory through /proc")


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def run_and_close(world_size: int, device: str = "sim") -> None:
    group = open_group(world_size, device=device)
    seen = []
    try:
        engine = launch(group, lambda *args: seen.append(args))
        assert set(seen) == {(rank, 50, 100) for rank in range(world_size)}
        request = engine.submit(Submission((1, 2), max_tokens=8))
        assert finished(request) == ([token_of((1, 2), i) for i in range(8)], "length")
        engine.close()
        numbers = pids(group)
    finally:
        group.close()
    assert all_gone(numbers, 1)
    assert [worker.process.returncode for worker in group.workers] == [0] * len(numbers)
    assert [worker.returned["host_calls"] for worker in group.workers] == [0] * len(numbers)
    assert group.error is None


@pytest.mark.parametrize(("world_size", "device"), [(1, "sim"), (2, "sim"), (3, "sim"), (2, "sim:0"), (4, "sim:0,1")])
def test_a_whole_life(world_size, device):
    run_and_close(world_size, device)


def test_nothing_is_left_behind():
    run_and_close(2)
    before = open_fds()
    for _ in range(3):
        run_and_close(2)
    assert open_fds() == before


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ("1:open", "no open today"),
        ("0:build", "no build today"),
        ("1:build", "no build today"),
        ("1:load", "no load today"),
        ("0:die-build", "rank 0 was killed by SIGKILL during the step 'build'"),
        ("1:die-load", "rank 1 was killed by SIGKILL during the step 'load'"),
        ("1:die-launch", "rank 1 was killed by SIGKILL during the step 'launch'"),
        ("1:marks", r"what rank 0 stored into rank 1's memory did not arrive in 2.0 s: peer access does not work"),
        ("1:handle", "the memory of peer process 99999999 cannot be opened"),
    ],
)
def test_what_fails_at_the_start_is_one_error(monkeypatch, problem, words):
    monkeypatch.setenv("FAKE_WORKER", problem)
    group = open_group()
    with pytest.raises(FaultError if "die" in problem else DeviceError, match=words):
        launch(group)
    assert all_gone(pids(group), 1)
    group.close()


def test_a_worker_that_hangs_at_the_start_is_given_up(monkeypatch):
    monkeypatch.setenv("FAKE_WORKER", "1:hang-load")
    monkeypatch.setattr("imex_persist.runtime.group.STEP_S", {"load": 0.5})
    group = open_group()
    start = time.monotonic()
    with pytest.raises(FaultError, match="rank 1 did not finish the step 'load'"):
        launch(group)
    assert time.monotonic() - start < 20 and all_gone(pids(group), 1)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_group_and_its_requests(victim):
    group = open_group()
    engine = launch(group)
    request = engine.submit(Submission((5,), max_tokens=200))
    request.events.get(timeout=5)
    start = time.monotonic()
    os.kill(pids(group)[victim], signal.SIGKILL)
    with pytest.raises(FaultError, match=f"rank {victim} is gone: its process was killed by SIGKILL") as caught:
        finished(request)
    assert time.monotonic() - start < 1 + 3 and "\n" not in str(caught.value)
    assert all_gone(pids(group), 1)
    with pytest.raises(FaultError):
        engine.submit(Submission((5,), max_tokens=1))
    engine.close()
    group.close()
    run_and_close(2)  # a new one works at once


def test_a_stopped_rank_is_killed_with_the_group():
    group = open_group()
    engine = launch(group)
    os.kill(pids(group)[1], signal.SIGSTOP)
    os.kill(pids(group)[0], signal.SIGKILL)
    assert all_gone(pids(group), 6)
    engine.close()
    group.close()


def test_a_fault_record_becomes_a_sentence(monkeypatch):
    monkeypatch.setenv("FAKE_WORKER", "0:fault")
    group = open_group()
    engine = launch(group)
    request = engine.submit(Submission((5,), max_tokens=200))
    with pytest.raises(FaultError) as caught:
        finished(request)
    assert str(caught.value).startswith(
        "rank 1 stopped answering: rank 0, block 17 waited 2.0 s for words of down_proj of layer 5 of rank 1"
    )
    engine.close()
    group.close()
    assert all_gone(pids(group), 1)


def test_kernels_that_do_not_return_are_ended(monkeypatch):
    monkeypatch.setenv("FAKE_WORKER", "0:deaf")
    group = open_group(deadline_s=0.2)
    engine = launch(group)
    engine.close()
    start = time.monotonic()
    group.close()
    assert time.monotonic() - start < 0.2 + 1 + 1.5 + 3 + 2 and all_gone(pids(group), 1)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_children_die_with_their_parent(kind):
    parent = subprocess.Popen([sys.executable, "-m", "tests.runtime.groups"], stdout=subprocess.PIPE, text=True)
    numbers = [int(word) for word in parent.stdout.readline().split()]
    assert len(numbers) == 3
    parent.send_signal(kind)
    parent.wait(10)
    assert all_gone(numbers, 5)
    parent.stdout.close()


def test_children_outlive_a_parent_thread_that_ends():
    import threading

    made = []
    thread = threading.Thread(target=lambda: made.append(open_group()) or made.append(launch(made[0])))
    thread.start()
    thread.join()
    time.sleep(0.3)  # the parent-death signal is the parent thread's
    group, engine = made
    assert finished(engine.submit(Submission((5,), max_tokens=3)))[1] == "length"
    engine.close()
    group.close()
