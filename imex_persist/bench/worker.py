"""A process of the benchmark kernels (cuda_src/bench): the ranks of one machine. Started by bench/ranks.py and by nobody else.

It talks JSON lines like the engine's workers (runtime/worker.py), one answer a message; the parent sends a message when all workers
have answered the one before, so every message is a barrier.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
import traceback

import numpy as np

from imex_persist.bench.probe import Probe, fill, kernel_source
from imex_persist.device.base import Buffer, Device
from imex_persist.errors import ImexError
from imex_persist.runtime import capacity
from imex_persist.runtime.control import Channel, Closed
from imex_persist.runtime.lifeline import exit_after, follow_parent
from imex_persist.runtime.machines import SIM_BLOCKS, open_device
from imex_persist.runtime.shared import SharedBlock

END_S = 10.0  # for this process to free its memory and exit
ECHO_S = 20.0  # for all echoes of the host's line


class Worker:
    """One method a message."""

    def __init__(self) -> None:
        self.device: Device | None = None
        self.data: Buffer | None = None
        self.probe: Probe | None = None

    def open(self, m: dict) -> dict:
        self.ranks = list(m["ranks"])
        self.device = _open(m, self.ranks)
        machine = self.device.machine
        fields = {name: getattr(machine, name) for name in type(machine).__dataclass_fields__}
        return {"machine": fields, "identity": self.device.identity()}

    def allocate(self, m: dict) -> dict:
        """Memory to read: `bytes` of arbitrary bits, or of words of epoch 1."""
        self.data = self.device.zeros(m["bytes"])
        fill(self.device, self.data, words=m["words"])
        return {}

    def build(self, m: dict) -> dict:
        self.device.compile([capacity.from_fields(fields) for fields in m["shapes"]], kernel_source(m["source"]))
        return {}

    def prepare(self, m: dict) -> dict:
        """Loads a kernel; its ranks' symmetric memory is offered to the others."""
        self.probe = Probe(self.device, capacity.from_fields(m["shape"]), m["source"], self.ranks)
        return {"handles": {str(rank): handle for rank, handle in self.probe.handles().items()}}

    def connect(self, m: dict) -> dict:
        self.probe.connect({int(rank): handle for rank, handle in m["handles"].items()})
        return {}

    def run(self, m: dict) -> dict:
        """One launch; times in ns by rank. `stride`: bytes from what one rank of this process reads to what the next does."""
        each = {rank: {"partner": m["partners"][str(rank)]} if "partners" in m else {} for rank in self.ranks}
        if "stride" in m:
            for i, rank in enumerate(self.ranks):
                each[rank]["data"] = self.data.address + i * m["stride"]
        return {"ns": {str(rank): ns for rank, ns in self.probe.run(m["job"], each).items()}}

    def result(self, m: dict) -> dict:
        """uint32 values that the kernel left, by rank."""
        return {"result": {str(rank): self.probe.result(rank, m["count"]).tolist() for rank in self.ranks}}

    def echo(self, m: dict) -> dict:
        """Round trips of a word: this thread, the kernel, this thread, `pause_s` apart, in which this thread looks at the answer's place.
        Shared memory as the mailbox's, mapped as it is."""
        block = SharedBlock.create(4096)
        words = block.view.cast("Q")
        launch = self.probe.launch(m["job"] | {"host": self.device.map_host(block.view)}, {})
        times = []
        limit = time.monotonic() + ECHO_S
        for epoch in range(self.probe.epoch + 1, self.probe.epoch + 1 + m["job"]["warmup"] + m["job"]["iterations"]):
            word, begin = epoch << 32, time.perf_counter() + m["pause_s"]
            while m["pause_s"] and time.perf_counter() < begin:
                words[16]
            began = time.perf_counter_ns()
            words[1] = word
            words[0] = word
            while words[16] >> 32 != epoch:
                if time.monotonic() > limit:
                    raise ImexError(f"the kernel did not answer echo {epoch} in {ECHO_S:.0f} s")
            times.append(time.perf_counter_ns() - began)
        self.probe.finish(launch, m["job"])
        self.keep = block  # mapped by the device until it is closed
        return {"ns": times[m["job"]["warmup"] :]}

    def disconnect(self, m: dict) -> dict:
        """All unmap their peers' memory before any frees its own."""
        close_peers = getattr(self.device, "close_peers", None)
        if close_peers is not None:
            close_peers()
        return {}

    STEPS = ("open", "allocate", "build", "prepare", "connect", "run", "result", "echo", "disconnect")


def _open(m: dict, ranks: list[int]) -> Device:
    if m["kind"] == "sim":
        from imex_persist.device.sim import SimDevice

        return SimDevice(num_blocks=SIM_BLOCKS * len(ranks), processes=True)  # the host's words count, so wall time does
    return open_device(m["kind"], m["ordinal"], m["uuid"], ranks, m["world_size"])


def serve(channel: Channel) -> int:
    worker = Worker()
    while True:
        try:
            message = channel.receive()
            if message["do"] == "exit":
                break
            assert message["do"] in Worker.STEPS
            try:
                channel.send({"did": message["do"], **getattr(worker, message["do"])(message)})
            except Closed:
                raise
            except Exception as error:  # whatever it is, the parent raises it
                ours = isinstance(error, (ValueError, ImexError))
                if not ours:
                    traceback.print_exc()
                text = str(error) if ours else f"{type(error).__name__}: {error}"
                channel.send({"error": {"kind": type(error).__name__ if ours else "DeviceError", "message": text}})
        except Closed:
            break
    exit_after(END_S)
    if worker.device is not None:
        worker.device.close()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="internal: started by imex_persist, not by hand")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    args = parser.parse_args()
    follow_parent(args.parent, lambda: os._exit(1))
    return serve(Channel(socket.socket(fileno=args.fd)))


if __name__ == "__main__":
    np.seterr(over="ignore")
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # destructors of device libraries may wait for peers that are gone
