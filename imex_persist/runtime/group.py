"""All ranks of one engine: starts the workers, takes them step by step to a resident kernel, watches them, and ends them.

Until the kernel is resident the caller's thread talks to the workers; from then on one watching thread does. Any worker's error or death
becomes one exception, and the whole group ends with it.
"""

from __future__ import annotations

import contextlib
import secrets
import select
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from imex_persist import errors, planner
from imex_persist.log import log
from imex_persist.planner import Machine
from imex_persist.runtime import capacity, faults, shared
from imex_persist.runtime.control import Closed
from imex_persist.runtime.mailbox import ArenaLayout, Mailbox
from imex_persist.runtime.placement import Placement
from imex_persist.runtime.process import COMMAND, WorkerProcess
from imex_persist.runtime.shared import SharedBlock
from imex_persist.runtime.watch import Watcher

STEP_S = {"open": 120.0, "build": 900.0, "load": 3600.0}  # how long a step may take; the others STEP_DEFAULT_S
STEP_DEFAULT_S = 60.0
RESIDENT_S = 30.0  # beyond the deadline, for the kernel to say that it polls
SLOW_S = 1.0  # after which a step says what it does
END_S = 3.0  # for the workers to end by themselves

Progress = Callable[[int, int, int], None]  # rank, bytes so far, bytes in all


class Group:
    """Use: `open()`, then `launch(shape, …)`, then `mailbox`; `close()` in every case. Raises ValueError, DeviceError or FaultError.

    Where several kernels could be the one: `prepare` them, `trial` each, `start` one.
    """

    def __init__(self, placement: Placement, *, deadline_s: float, command: tuple[str, ...] = COMMAND):
        self.placement = placement
        self.world_size = sum(len(place.ranks) for place in placement.places)
        self.deadline_s = deadline_s
        self.machines: list[Machine] = []
        self.identities: list[dict] = []
        self.free_bytes = 0  # of memory that every rank may have
        self.strategy_source = "planned"  # where the exchange strategy is from, for the log
        self.shape: np.void | None = None
        self.mailbox: Mailbox | None = None
        self.workers: list[WorkerProcess] = []
        self._command = command
        self._watcher: Watcher | None = None
        self._mailbox_fd = shared.reserve()
        self._mailbox_block: SharedBlock | None = None
        self._trace_fd = shared.reserve()
        self.trace: SharedBlock | None = None  # the trace rings of all ranks, planner.trace_bytes each
        self._faults = SharedBlock.create(faults.fault_bytes(self.world_size))
        self._shapes: list[np.void] = []  # of the prepared kernels
        self._closed = False

    # ---------------------------------------------------------------------------------------- start
    def open(self) -> list[Machine]:
        """Starts the processes and opens their machines."""
        try:
            for place in self.placement.places:
                self.workers.append(WorkerProcess(place, (self._mailbox_fd, self._faults.fd, self._trace_fd), self._command))
            common = {"world_size": self.world_size, "deadline_s": self.deadline_s}
            replies = self._step("open", lambda w: {**common, **_place_fields(w)})
            self.machines = [Machine(**reply["machine"]) for reply in replies]
            self.identities = [reply["identity"] for reply in replies]
            self.free_bytes = min(reply["free_bytes"] for reply in replies)
            return self.machines
        except BaseException:
            self.close()
            raise

    def launch(self, shape: np.void, model: dict, max_model_len: int, progress: Progress | None = None) -> Mailbox:
        """`prepare` for one kernel, and `start`."""
        self.prepare([shape], model, max_model_len, progress)
        return self.start(0)

    def prepare(self, shapes: list[np.void], model: dict, max_model_len: int, progress: Progress | None = None) -> None:
        """Builds a kernel for every shape, loads, connects and verifies. The shapes may differ in how they exchange, not in what a rank
        holds: all kernels run over the same memory, one after the other."""
        try:
            self._prepare(shapes, model, max_model_len, progress)
        except BaseException:
            self.close()
            raise

    def _prepare(self, shapes: list[np.void], model: dict, max_model_len: int, progress: Progress | None) -> None:
        shape, fields = shapes[0], {"shapes": [capacity.to_fields(shape) for shape in shapes]}
        with _slowly(_building(len(shapes))):
            self._step("build", lambda w: fields, workers=self.workers[:1])  # one compiles, the others find it
        self._step("build", lambda w: fields, workers=self.workers[1:])
        loaded = self._step("load", lambda w: {"model": model}, progress=progress)
        handles = {rank: handle for reply in loaded for rank, handle in reply["handles"].items()}
        layout = ArenaLayout(int(shape["num_slots"]), max_model_len, int(shape["pages_per_slot"]))
        self._mailbox_block = SharedBlock.allocate(self._mailbox_fd, layout.nbytes)
        if shape["trace"]:
            self.trace = SharedBlock.allocate(self._trace_fd, planner.trace_bytes(shape) * self.world_size)
        self._step(
            "connect",
            lambda w: {
                "handles": handles,
                "layout": vars(layout),
                "mailbox_fd": self._mailbox_fd,
                "mailbox_bytes": self._mailbox_block.nbytes,
                "fault_fd": self._faults.fd,
                "fault_bytes": self._faults.nbytes,
                "trace_fd": self._trace_fd,
                "trace_bytes": self.trace.nbytes if self.trace else 0,
            },
        )
        nonce = {"nonce": secrets.randbits(64)}
        self._step("verify", lambda w: nonce)
        self._step("clear_marks", lambda w: {})
        self._shapes, self._layout = shapes, layout

    def start(self, index: int) -> Mailbox:
        """Launches a prepared kernel for good; returns when it polls its mailbox."""
        try:
            self._launch(index)
            self.shape = self._shapes[index]
            return self.mailbox
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def trial(self, index: int) -> Iterator[Mailbox]:
        """A prepared kernel for a while, watched like the one that stays. When it has returned, all ranks' memory is as before, whatever
        lies in KV pages. Whoever uses the mailbox has nothing resident at the end. Raises what ends the group meanwhile."""
        try:
            self._launch(index)
            yield self.mailbox
            self._watcher.shut_down(leave=False)
            watcher, self._watcher = self._watcher, None  # not before: interrupted, `close` has to end it
            self._check_returned(watcher)
            self._step("clear", lambda w: {})  # when all kernels have returned: a peer's may store until then
            self.mailbox.close()
            self.mailbox = None
            for block in filter(None, (self._mailbox_block, self.trace)):
                block.view[:] = bytes(block.nbytes)
        except BaseException:
            self.close()
            raise

    def _launch(self, index: int) -> None:
        self.mailbox = Mailbox(self._mailbox_block.view, self._layout)
        self.mailbox.beat(1)
        self._step("launch", lambda w: {"index": index})
        self._watcher = Watcher(self.workers, self.mailbox, self._faults.view, deadline_s=self.deadline_s)
        self._watcher.start()
        self._wait_resident()

    def _check_returned(self, watcher: Watcher) -> None:
        """After a trial. Raises the error it ended with, or FaultError for a kernel that did not return as it was asked to."""
        if watcher.error:
            raise watcher.error
        for worker in self.workers:
            said, worker.returned = worker.returned, None
            if said is None or not said["ended"]:
                raise errors.FaultError(f"the kernel of {worker.title} does not return from its trial")
            if said.get("problem"):
                raise errors.FaultError(f"{worker.title}: {said['problem']}")

    def _wait_resident(self) -> None:
        limit = time.monotonic() + self.deadline_s + RESIDENT_S
        while self.mailbox.resident == 0 or self._watcher.error:
            if self._watcher.error:
                raise self._watcher.error
            if time.monotonic() > limit:
                raise errors.FaultError(f"the kernel did not answer {self.deadline_s + RESIDENT_S:.0f} s after its launch")
            time.sleep(0.002)

    def _step(
        self, name: str, message: Callable[[WorkerProcess], dict], workers=None, progress: Progress | None = None
    ) -> list[dict]:
        """Sends one step to all workers and returns their answers, in order: a barrier."""
        workers = self.workers if workers is None else workers
        replies: dict[WorkerProcess, dict] = {}
        limit = time.monotonic() + STEP_S.get(name, STEP_DEFAULT_S)
        try:
            for worker in workers:
                worker.channel.send({"do": name, **message(worker)})
        except Closed:
            pass  # found below, with its reason
        while len(replies) < len(workers):
            waiting = [w for w in workers if w not in replies]
            ready = [w for w in waiting if w.channel.pending] or select.select(
                [w.channel for w in waiting], [], [], max(0.0, limit - time.monotonic())
            )[0]
            if not ready:
                names = ", ".join(w.title for w in waiting)
                raise errors.FaultError(f"{names} did not finish the step '{name}' in {STEP_S.get(name, STEP_DEFAULT_S):.0f} s")
            for worker in waiting:
                if worker in ready or worker.channel in ready:
                    self._take(worker, name, replies, progress)
        return [replies[worker] for worker in workers]

    def _take(self, worker: WorkerProcess, name: str, replies: dict, progress: Progress | None) -> None:
        try:
            message = worker.channel.receive(0.0)
        except Closed:
            how = worker.how_it_ended()
            raise errors.FaultError(
                f"the process of {worker.title} {how} during the step '{name}'; its own words are on stderr"
            ) from None
        if message is None:
            return
        if "error" in message:
            raise rebuild_error(message["error"])
        if "progress" in message:
            p = message["progress"]
            if progress is not None:
                progress(p["rank"], p["bytes"], p["total"])
        elif message.get("did") == name:
            replies[worker] = message

    # ---------------------------------------------------------------------------------------- running
    @property
    def error(self) -> Exception | None:
        """Why the group ended by itself, or None."""
        return self._watcher.error if self._watcher else None

    def on_fault(self, callback: Callable[[Exception], None]) -> None:
        """`callback(error)` once, in the watching thread, when the group ends by itself."""
        self._watcher.on_fault(callback)

    def probe(self) -> None:
        """Asks the workers whether their kernels still run; an answer comes as a fault or not at all."""
        self._watcher.probe()

    # ---------------------------------------------------------------------------------------- end
    def close(self) -> None:
        """Ends kernel and processes, in bounded time. May be called twice and after a fault; nobody may poll the mailbox any more."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._watcher is not None:
                self._watcher.shut_down()
        finally:
            for worker in self.workers:
                worker.channel.close()  # all of them first: they end at the same time
            limit = time.monotonic() + END_S
            for worker in self.workers:
                worker.end(max(0.0, limit - time.monotonic()))
            if self.mailbox is not None:
                self.mailbox.close()
            if self._mailbox_block is not None:
                self._mailbox_block.close()
            else:
                shared.discard(self._mailbox_fd)
            if self.trace is not None:
                self.trace.close()
            else:
                shared.discard(self._trace_fd)
            self._faults.close()


def _building(kernels: int) -> str:
    one = "building the kernel; the next start finds it in the cache"
    return (
        one
        if kernels == 1
        else f"building {kernels} kernels, of which one will be chosen; the next start finds it in the cache"
    )


@contextlib.contextmanager
def _slowly(text: str) -> Iterator[None]:
    """Logs `text` if what is inside takes longer than a moment."""
    timer = threading.Timer(SLOW_S, log, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def rebuild_error(fields: dict) -> Exception:
    """The exception that a worker reported."""
    kinds = {"ValueError": ValueError, "FaultError": errors.FaultError}
    return kinds.get(fields["kind"], errors.DeviceError)(fields["message"])


def _place_fields(worker: WorkerProcess) -> dict:
    place = worker.place
    return {"kind": place.kind, "ordinal": place.ordinal, "uuid": place.uuid, "ranks": list(place.ranks)}
