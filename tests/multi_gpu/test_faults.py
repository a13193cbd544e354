"""Every fault of tests/faults on two ranks with a GPU each. Kernels of GPUs do not stop with the processes that launched them.

`TEST_DEVICE=sim pytest tests/multi_gpu/test_faults.py` runs them on simulators, to test the tests.
"""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from imex_persist import LLM, DeviceError
from tests.faults import cases
from tests.gpu.test_llm import CONFIG, DEVICE, LARGE, SIMULATED, check_memory_is_back, save_model, used_bytes

from .test_two_gpus import WORLD, ordinals

SETTINGS = dict(
    device=DEVICE, tensor_parallel_size=WORLD, max_model_len=2048 if SIMULATED else 60_000, max_num_seqs=3, deadline_s=2.0
)
SIMULATORS = SETTINGS | {"device": "sim", "max_model_len": 2048, "deadline_s": 20.0}
INTERRUPTS, DAILY = 100, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), CONFIG)


@pytest.fixture(autouse=True)
def memory_is_back():
    """The GPUs' memory too is as before, whatever happened."""
    before = [] if SIMULATED else [used_bytes(ordinal) for ordinal in ordinals()]
    yield
    for ordinal, used in zip(ordinals(), before, strict=False):
        check_memory_is_back(ordinal, used)


@pytest.mark.parametrize("victim", range(WORLD))
def test_a_killed_rank(folder, victim):
    cases.killed_rank(folder, SETTINGS, victim)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent(folder, how):
    cases.killed_parent(folder, SETTINGS, how)


@pytest.mark.parametrize("seed", [pytest.param(n, marks=pytest.mark.full if n >= DAILY else []) for n in range(INTERRUPTS)])
def test_ctrl_c(folder, seed):
    cases.interrupted(folder, SETTINGS, seed)


@pytest.mark.parametrize("victim", range(WORLD))
def test_a_rank_whose_process_stands_still(folder, victim):
    """For twice the deadline: a resident kernel does not need its process. (Simulators stop with theirs: less than the deadline.)"""
    cases.suspended_rank(folder, SETTINGS | ({"deadline_s": 10.0} if SIMULATED else {}), victim, 1.0 if SIMULATED else 4.0)


def test_a_reader_that_sleeps(folder):
    cases.sleeping_reader(folder, SETTINGS)


def test_a_corrupted_descriptor(folder):
    cases.corrupted_descriptor(folder, SETTINGS)


def test_an_error_of_the_user(folder):
    cases.user_error(folder, SETTINGS)


def test_two_groups_on_one_host(folder):
    """One on the GPUs and one of simulators: two processes on one GPU are refused, since nothing promises that they run together."""
    cases.two_groups(folder, SETTINGS, SETTINGS if SIMULATED else SIMULATORS)


HOG = """
import sys
from cuda.bindings import runtime
runtime.cudaSetDevice(int(sys.argv[1]))
_, free, _ = runtime.cudaMemGetInfo()
status, _ = runtime.cudaMalloc(free - (int(sys.argv[2]) << 20))
print(int(status), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(SIMULATED, reason="tests/faults has the simulator's own")
@pytest.mark.parametrize(
    ("left_mib", "why"), [(256, "no memory left for a CUDA context"), (1536, "GiB more are needed|but may have")]
)
def test_no_memory_at_the_start(tmp_path_factory, left_mib, why):
    """Of the second rank's GPU, which another process has filled."""
    folder = save_model(tmp_path_factory.mktemp("large"), LARGE | {"num_hidden_layers": 2})
    hog = subprocess.Popen(
        [sys.executable, "-c", HOG, str(ordinals()[1]), str(left_mib)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert hog.stdout.readline() == "0\n"
        with cases.Nothing(), pytest.raises((DeviceError, ValueError), match=why) as caught:
            LLM(folder, **SETTINGS)
        cases.one_message(caught.value)
    finally:
        hog.communicate()
