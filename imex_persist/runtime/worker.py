"""A worker process: the ranks of one machine. `python -m imex_persist.runtime.worker`, started by group.py and by nobody else.

It talks JSON lines over an inherited socket: the parent sends {"do": step, …}, the worker answers {"did": step, …} or {"error": …}.
Steps, in order: open, build, load, connect, verify, clear_marks, launch; then, on request, probe; after a kernel on trial clear, and
launch again; at the end, disconnect and exit.
The parent sends a step when all workers have answered the one before, which makes every step a barrier. While the kernel is resident
the worker only reads shared memory and its socket: no call reaches the device.
"""

from __future__ import annotations

import argparse
import os
import queue
import socket
import sys
import threading
import time

from imex_persist import planner
from imex_persist.errors import ImexError
from imex_persist.planner import Machine
from imex_persist.runtime import capacity, faults
from imex_persist.runtime.control import Channel, Closed
from imex_persist.runtime.lifeline import exit_after, follow_parent
from imex_persist.runtime.machines import open_device
from imex_persist.runtime.mailbox import ArenaLayout, Mailbox
from imex_persist.runtime.marks import Marks
from imex_persist.runtime.rank import RankMemory, launch_params
from imex_persist.runtime.shared import SharedBlock

WATCH_S = 0.05  # how often shared memory is looked at while the kernel is resident
STOP_S = 1.0  # for a kernel to return once it knows that it must: after a fault or the stop word
GRACE_S = 3.0  # beyond the deadline, for this process to end


class Worker:
    """One method a step. Everything runs in the main thread but the socket's reader."""

    def __init__(self, channel: Channel, parent: int):
        self.channel = channel
        self.parent = parent  # process id
        self.inbox: queue.SimpleQueue[dict | None] = queue.SimpleQueue()  # None: the parent is gone
        self.device = None
        self.memory: dict[int, RankMemory] = {}
        self.mailbox: Mailbox | None = None
        self.launch = None
        self.deadline_s = 1.0
        self.returned = False

    # ---------------------------------------------------------------------------------------- steps
    def open(self, m: dict) -> dict:
        self.ranks, self.world_size = list(m["ranks"]), int(m["world_size"])
        self.deadline_s = float(m["deadline_s"])
        self.device = open_device(m["kind"], m["ordinal"], m["uuid"], self.ranks, self.world_size)
        machine = self.device.machine
        fields = {name: getattr(machine, name) for name in Machine.__dataclass_fields__}
        free = self.device.memory()[0] // len(self.ranks)
        return {"machine": fields, "identity": self.device.identity(), "free_bytes": free}

    def build(self, m: dict) -> dict:
        shapes = [capacity.from_fields(fields) for fields in m["shapes"]]
        if len(shapes) > 1:
            self.device.compile(shapes)  # side by side
        self.kernels = [self.device.load(shape) for shape in shapes]
        self.shape = shapes[0]  # they differ in how they exchange only
        self.marks = Marks(self.device, self.shape)
        return {}

    def load(self, m: dict) -> dict:
        from imex_persist.runtime.weights import load_rank  # imports the model packages, which not every test needs

        for rank in self.ranks:
            self.memory[rank] = memory = RankMemory(self.device, self.shape, rank)

            def progress(done: int, total: int, rank: int = rank) -> None:
                self.channel.send({"progress": {"rank": rank, "bytes": done, "total": total}})

            memory.weights = load_rank(self.device, m["model"], self.shape, rank, progress)
        return {"handles": {str(rank): self.device.export(self.memory[rank].symmetric) for rank in self.ranks}}

    def connect(self, m: dict) -> dict:
        self.faults = SharedBlock.attach(m["fault_fd"], m["fault_bytes"])
        block = SharedBlock.attach(m["mailbox_fd"], m["mailbox_bytes"])
        self.mailbox = Mailbox(block.view, ArenaLayout(**m["layout"]))
        mailbox_address = self.device.map_host(block.view) if 0 in self.ranks else 0
        fault_address = self.device.map_host(self.faults.view)
        trace_address, trace_bytes = 0, planner.trace_bytes(self.shape)
        if trace_bytes:
            self.trace = SharedBlock.attach(m["trace_fd"], m["trace_bytes"])
            trace_address = self.device.map_host(self.trace.view)
        handles = {int(rank): handle for rank, handle in m["handles"].items()}
        for memory in self.memory.values():
            memory.connect(handles, self.memory)
        self.params = launch_params(
            [
                memory.params(
                    mailbox=mailbox_address if rank == 0 else 0,
                    fault=fault_address + faults.fault_offset(rank),
                    deadline_us=round(self.deadline_s * 1e6),
                    trace=trace_address + rank * trace_bytes if trace_bytes else 0,
                )
                for rank, memory in sorted(self.memory.items())
            ]
        )
        return {}

    def verify(self, m: dict) -> dict:
        self.marks.verify(self.params, m["nonce"], self.faults.view)
        return {}

    def clear_marks(self, m: dict) -> dict:
        for memory in self.memory.values():
            memory.clear_marks()
        return {}

    def start(self, m: dict) -> dict:
        self.launch, self.returned = self.device.launch(self.kernels[m["index"]], self.params), False
        self.calls_before = self.device.host_calls
        return {}

    def clear(self, m: dict) -> dict:
        """After all ranks' kernels have returned from a trial: as before it, so that another may start."""
        self.launch = None
        for memory in self.memory.values():
            memory.clear()
        return {}

    def probe(self, m: dict) -> dict:
        """Asks the device whether the kernel still runs: only when it has been silent, since this is a call into the device."""
        if not self.returned and self.launch.done():
            self._collect()
        return {}

    def disconnect(self, m: dict) -> dict:
        """Unmaps the peers' memory. All workers do before any frees its own: to free what a peer still maps is undefined in CUDA."""
        close_peers = getattr(self.device, "close_peers", None)
        if close_peers is not None:
            close_peers()
        return {}

    STEPS = {
        "open": open,
        "build": build,
        "load": load,
        "connect": connect,
        "verify": verify,
        "clear_marks": clear_marks,
        "launch": start,
        "clear": clear,
        "probe": probe,
        "disconnect": disconnect,
    }

    # ---------------------------------------------------------------------------------------- life
    def run(self) -> int:
        threading.Thread(target=self._read_socket, daemon=True).start()
        while True:
            try:
                message = self.inbox.get(timeout=WATCH_S if self.launch and not self.returned else None)
            except queue.Empty:
                self._look()
                continue
            if message is None or message["do"] == "exit":
                return self._leave(message is None)
            self._step(message)

    def _step(self, message: dict) -> None:
        step = message["do"]
        try:
            self.channel.send({"did": step, **self.STEPS[step](self, message)})
        except Closed:
            pass  # the socket's reader sees it too
        except Exception as error:  # whatever it is, the parent raises it
            self._report(error)

    def _report(self, error: Exception) -> None:
        ours = isinstance(error, (ValueError, ImexError))
        kind = type(error).__name__ if ours else "DeviceError"
        text = str(error) if ours else f"{type(error).__name__}: {error}"
        if not ours:
            import traceback

            traceback.print_exc()
        try:
            self.channel.send({"error": {"kind": kind, "message": text, "ranks": self.ranks}})
        except Closed:
            pass

    def _look(self) -> None:
        """What a resident worker does every WATCH_S: shared memory only."""
        if os.getppid() != self.parent:
            self.orphaned()
        elif self._ended():
            self._collect()
        elif 0 in self.ranks:
            self.mailbox.beat(time.monotonic_ns() >> 20)  # the parent does so too; suspended (Ctrl-Z), it may not

    def _ended(self) -> bool:
        """Whether shared memory says that the kernels return: no call into the device."""
        return self.mailbox.resident == 2 or self.mailbox.stopped or self._faults()

    def _faults(self) -> bool:
        return bool(faults.read_faults(self.faults.view, self.world_size))

    def _collect(self) -> None:
        """Waits for the kernel's return, at most the deadline and a little more, and tells the parent."""
        self.returned = True
        patience_s = STOP_S if self.mailbox.stopped or self._faults() else self.deadline_s + STOP_S
        calls = self.device.host_calls - self.calls_before  # the decode loop's: none, unless the parent asked for probes
        try:
            ended, problem = self.launch.wait(patience_s), None
        except ImexError as error:
            ended, problem = True, str(error)
        self._tell({"event": "returned", "ended": ended, "problem": problem, "host_calls": calls})

    def _tell(self, message: dict) -> None:
        try:
            self.channel.send(message)
        except Closed:
            pass

    def _leave(self, orphaned: bool) -> int:
        exit_after(self.deadline_s + GRACE_S)
        running = self.launch is not None and not self.returned
        if running:
            if orphaned and self.mailbox is not None:
                self.mailbox.stop()
            self._collect()
        self.device and self.device.close()
        return 1 if orphaned else 0

    def _read_socket(self) -> None:
        try:
            while True:
                self.inbox.put(self.channel.receive())
        except (Closed, ValueError):
            self.orphaned()

    def orphaned(self) -> None:
        """The parent is gone: the kernel stops, and this process ends even if its main thread never looks up again."""
        exit_after(self.deadline_s + 2 * GRACE_S)
        if self.mailbox is not None:
            self.mailbox.stop()
        self.inbox.put(None)


def main() -> int:
    parser = argparse.ArgumentParser(description="internal: started by imex_persist, not by hand")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    args = parser.parse_args()
    worker = Worker(Channel(socket.socket(fileno=args.fd)), args.parent)
    follow_parent(args.parent, worker.orphaned)
    return worker.run()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # destructors of device libraries may wait for peers that are gone
