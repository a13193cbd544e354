"""A worker process whose device runs the fake kernel: everything of the runtime but the compute, in milliseconds.

FAKE_WORKER says what goes wrong, as "rank:problem": `open`, `build`, `load`, `marks` raise; `handle` exports what nobody can open;
`die-<step>` kills the process there; `deaf` ignores SHUTDOWN and the stop word; `hang-load` never finishes loading; `fault` reports a
fault as soon as a request runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

import numpy as np

from imex_persist import abi
from imex_persist.device.sim import SimDevice
from imex_persist.errors import DeviceError
from imex_persist.runtime import weights, worker
from tests.runtime.fake_kernel import FakeKernel

_rank, _, PROBLEM = os.environ.get("FAKE_WORKER", "").partition(":")
WHERE = int(_rank or -1)


class FakeLaunch:
    def __init__(self, shape, params):
        self.host = list(params["ranks"][: int(params["num_ranks"])])
        self.mine = WHERE in [int(p["rank"]) for p in self.host]
        self.kernel = None
        first = self.host[0]
        if first["mailbox"]:
            nbytes = abi.Mailbox.itemsize + 4 * int(shape["num_slots"]) * 4096
            view = memoryview((ctypes.c_char * nbytes).from_address(int(first["mailbox"])))
            sizes = (int(shape[k]) for k in ("num_slots", "num_pages", "page_size"))
            self.kernel = FakeKernel(view, *sizes, step_s=0.005)
        self.peers_end = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        if self.mine and PROBLEM == "deaf":
            if self.kernel:
                self.kernel.header["resident"] = 1
            time.sleep(1000)
        if self.kernel is None:
            return  # a rank without a mailbox returns as soon as it is asked, see wait
        if self.mine and PROBLEM == "fault":
            threading.Thread(target=self.fault, daemon=True).start()
        self.kernel.run()

    def fault(self) -> None:
        while not self.kernel.running:
            time.sleep(0.001)
        time.sleep(0.05)
        address = int(self.host[0]["fault"])
        record = np.frombuffer((ctypes.c_char * 64).from_address(address), abi.FaultRecord, 1)
        for name, value in dict(
            rank=0, block=17, phase=5, layer=5, wait=0, expected=9, seen=8, waited_us=2_000_000, source=1, valid=1
        ).items():
            record[name] = value
        self.kernel.fault = record

    def done(self) -> bool:
        return self.kernel is not None and not self.thread.is_alive()

    def wait(self, timeout_s: float) -> bool:
        if self.kernel is None and not (self.mine and PROBLEM == "deaf"):
            return True
        self.thread.join(timeout_s)
        return not self.thread.is_alive()


class FakeMarks:
    """Of marks.cu: all is well, or the first rank's words from rank 0 do not come."""

    def __init__(self, params):
        first = params["ranks"][0]
        if PROBLEM == "marks" and int(first["rank"]) == WHERE:
            address = int(first["fault"])
            record = np.frombuffer((ctypes.c_char * 64).from_address(address), abi.FaultRecord, 1)
            for name, value in dict(rank=WHERE, expected=9, seen=0, waited_us=2_000_000, source=0, valid=1).items():
                record[name] = value

    def wait(self, timeout_s: float) -> bool:
        return True


class FakeDevice(SimDevice):
    ranks: list[int] = []

    def load(self, shape, *, source=None):
        if source is not None:
            return "marks"
        problem("build", self.ranks)
        self.shape = shape
        return shape

    def launch(self, kernel, params):
        if isinstance(kernel, str):
            return FakeMarks(params)
        problem("launch", self.ranks)
        self.host_calls += 1
        return FakeLaunch(kernel, params)

    def export(self, buffer):
        handle = super().export(buffer)
        return handle.replace(str(os.getpid()), "99999999") if WHERE in self.ranks and PROBLEM == "handle" else handle


def problem(step: str, ranks: list[int]) -> None:
    if WHERE not in ranks:
        return
    if step == PROBLEM:
        raise DeviceError(f"no {step} today")
    if f"die-{step}" == PROBLEM:
        os.kill(os.getpid(), signal.SIGKILL)
    if f"hang-{step}" == PROBLEM:
        time.sleep(1000)


def open_device(kind, ordinal, uuid, ranks, world_size):
    problem("open", ranks)
    device = FakeDevice(processes=True)
    device.ranks = ranks
    return device


def load_rank(device, model, shape, rank, progress):
    problem("load", [rank])
    progress(50, 100)
    buffer = device.zeros(64)
    return dict.fromkeys(("qkv", "o_proj", "gate_up", "down_proj", "lm_head", "embed", "norms", "rope"), buffer)


if __name__ == "__main__":
    worker.open_device = open_device
    weights.load_rank = load_rank
    code = worker.main()
    sys.stderr.flush()
    os._exit(code)
