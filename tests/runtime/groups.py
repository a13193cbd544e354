"""Groups of fake workers, for the tests of group, watcher and worker; run as a program it is a parent to be killed."""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace

from imex_persist import planner
from imex_persist.runtime.engine import Engine
from imex_persist.runtime.group import Group
from imex_persist.runtime.placement import place_ranks

COMMAND = (sys.executable, "-m", "tests.runtime.fake_worker")
MAX_MODEL_LEN = 256
CONFIG = SimpleNamespace(
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=64,
    vocab_size=1000,
    rms_norm_eps=1e-5,
)


def open_group(world_size: int = 2, deadline_s: float = 1.0, device: str = "sim") -> Group:
    return Group(place_ranks(device, world_size), deadline_s=deadline_s, command=COMMAND)


def launch(group: Group, progress=None) -> Engine:
    """Takes a group to a resident fake kernel."""
    group.open()
    shape = planner.make_shape(CONFIG, world_size=group.world_size, num_slots=2, max_model_len=MAX_MODEL_LEN)
    mailbox = group.launch(shape, {}, MAX_MODEL_LEN, progress)
    sizes = {name: int(shape[name]) for name in ("num_slots", "num_pages", "page_size")}
    engine = Engine(mailbox, **sizes, max_model_len=MAX_MODEL_LEN, on_silence=group.probe)
    group.on_fault(engine.fail)
    return engine


def pids(group: Group) -> list[int]:
    return [worker.process.pid for worker in group.workers]


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_gone(numbers: list[int], timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if not any(map(alive, numbers)):
            return True
        time.sleep(0.02)
    return False


if __name__ == "__main__":  # a parent that will be killed
    from imex_persist.runtime.request import Submission

    group_ = open_group()
    engine_ = launch(group_)
    request_ = engine_.submit(Submission((1,), max_tokens=200))
    request_.events.get(timeout=10)
    print(*pids(group_), os.getpid(), flush=True)
    time.sleep(1000)
