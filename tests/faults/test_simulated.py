"""Every fault, on two ranks that are simulators in processes of their own. The cases that need GPUs are in tests/multi_gpu."""

from __future__ import annotations

import json
import mmap
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from imex_persist import LLM, FaultError
from tests.runtime.groups import pids
from tests.runtime.test_llm import CONFIG

from . import cases

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes share memory through /proc")
SETTINGS = dict(load_format="dummy", device="sim", tensor_parallel_size=2, max_model_len=2048, max_num_seqs=3, deadline_s=2)
INTERRUPTS, DAILY = 100, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return str(path)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank(folder, victim):
    cases.killed_rank(folder, SETTINGS, victim)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent(folder, how):
    cases.killed_parent(folder, SETTINGS, how)


@pytest.mark.parametrize("seed", [pytest.param(n, marks=pytest.mark.full if n >= DAILY else []) for n in range(INTERRUPTS)])
def test_ctrl_c(folder, seed):
    cases.interrupted(folder, SETTINGS, seed)


def test_a_rank_that_stands_still_for_a_while(folder):
    """Less than the deadline. On GPUs the kernel would not even notice."""
    cases.suspended_rank(folder, SETTINGS | {"deadline_s": 10}, 1, 1.0)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_stands_still_for_too_long(folder, victim):
    cases.suspended_for_too_long(folder, SETTINGS | {"deadline_s": 1}, victim)


def test_a_reader_that_sleeps(folder):
    cases.sleeping_reader(folder, SETTINGS)


def test_a_corrupted_descriptor(folder):
    cases.corrupted_descriptor(folder, SETTINGS)


def test_an_error_of_the_user(folder):
    cases.user_error(folder, SETTINGS)


def test_two_groups_on_one_host(folder):
    cases.two_groups(folder, SETTINGS, SETTINGS)


def test_a_flipped_epoch(folder):
    """Words in a rank's memory lose a bit of their epochs, again and again: the deadline passes of who waits for
    them, or of the other rank, which waits for what would come of them."""
    with cases.Nothing(), LLM(folder, **SETTINGS) as llm:
        begin, end = int(llm.shape["off_o_part"]), int(llm.shape["off_down_part"])
        stream = llm.stream(cases.PROMPTS[0], cases.greedy(2000))
        next(stream)
        path = next(p for p in Path(f"/proc/{pids(llm.group)[1]}/fd").iterdir() if "imex-symmetric" in os.readlink(p))
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            words = np.frombuffer(memory, np.uint64)[begin:end]
            while llm.group.error is None:
                words ^= np.uint64(1 << 40)
            del words
        with pytest.raises(FaultError, match=r"rank \d, block \d+ waited 2.\d s for words of ") as caught:
            list(stream)
        expected, seen = map(int, re.search(r"expected (\d+), saw (\d+)", str(caught.value)).groups())
        assert expected != seen and cases.ids(stream.result)
        cases.one_message(caught.value)


LIMITED = """
import resource, sys
from imex_persist import LLM, DeviceError
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
try:
    LLM(sys.argv[1], load_format="dummy", device="sim", tensor_parallel_size=2, max_model_len=131072, max_num_seqs=16)
except DeviceError as error:
    print(error)
"""


def test_no_memory_at_the_start(tmp_path):
    config = CONFIG | {"max_position_embeddings": 131072, "num_hidden_layers": 4, "num_key_value_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with cases.Nothing():
        done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert re.fullmatch(r"the simulator could not get \d+\.\d+ GiB .*\n", done.stdout), done.stdout + done.stderr
    assert done.returncode == 0 and "Traceback" not in done.stderr


@pytest.mark.full
def test_the_soak_runs_and_goes_on(tmp_path):
    """The script that soaks two GPUs, twice with the same state file."""
    state = tmp_path / "soak.json"
    for faults in (3, 6):
        options = ["--device", "sim", "--faults", str(faults), "--tokens", "100", "--round-s", "1", "--state", str(state)]
        command = [sys.executable, "-m", "tests.multi_gpu.soak", *options]
        done = subprocess.run(command, cwd=cases.ROOT, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0 and "reached: " in done.stdout, done.stdout + done.stderr
        assert json.loads(state.read_text())["faults"] == faults
