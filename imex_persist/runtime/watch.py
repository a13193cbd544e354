"""The thread that watches a resident group: shows the kernel that the host lives, hears of workers' ends, and shuts down."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable

from imex_persist.errors import FaultError
from imex_persist.runtime import faults
from imex_persist.runtime.control import Closed
from imex_persist.runtime.mailbox import Mailbox
from imex_persist.runtime.process import WorkerProcess

BEAT_S = 0.25
GRACE_S = 1.0  # after the first sign of a fault, for the other kernels to return and leave their records
SHUTDOWN_S = 1.0  # beyond the deadline, for kernels that were asked to return


class Watcher:
    """Owns the workers' sockets from launch on. `error` is set once, before the callback runs."""

    def __init__(self, workers: list[WorkerProcess], mailbox: Mailbox, fault_view: memoryview, *, deadline_s: float):
        self.error: Exception | None = None
        self._workers = workers
        self._mailbox = mailbox
        self._fault_view = fault_view
        self._world_size = sum(len(w.place.ranks) for w in workers)
        self._deadline_s = deadline_s
        self._callback: Callable[[Exception], None] | None = None
        self._lock = threading.Lock()
        self._shutdown = False
        self._leave = True  # when the kernels have returned, the processes end
        self._probe = False
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="imex-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def on_fault(self, callback: Callable[[Exception], None]) -> None:
        with self._lock:
            self._callback = callback
            error = self.error
        if error is not None:
            callback(error)

    def probe(self) -> None:
        self._probe = True
        self._wake()

    def shut_down(self, leave: bool = True) -> None:
        """Asks the kernels to return and waits for it, at most the deadline, SHUTDOWN_S and GRACE_S; then the thread has ended, and the
        processes too unless `leave` is False: then what each said of its kernel stands in its `returned`."""
        self._leave = leave
        self._shutdown = True
        self._wake()
        self._thread.join(self._deadline_s + SHUTDOWN_S + GRACE_S + 1)
        if not self._thread.is_alive():
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _wake(self) -> None:
        os.write(self._wake_write, b"x")

    # ---------------------------------------------------------------------------------------- the thread
    def _run(self) -> None:
        while self.error is None:
            if self._shutdown:
                self._stop_in_order()
                return
            if self._probe:
                self._probe = False
                self._send_all({"do": "probe"})
            if cause := self._listen(BEAT_S):
                self._fail(cause)

    def _listen(self, timeout_s: float) -> str | None:
        """One round: a beat, then whatever the workers say. Returns the cause when one of them ended unasked."""
        self._mailbox.beat(time.monotonic_ns() >> 20)
        alive = [w for w in self._workers if w.returned is None]
        ready = select.select([w.channel for w in alive] + [self._wake_read], [], [], timeout_s)[0]
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)
        cause = None
        for worker in alive:
            if worker.channel in ready or worker.channel.pending:
                cause = self._hear(worker) or cause
        return cause

    def _hear(self, worker: WorkerProcess) -> str | None:
        try:
            message = worker.channel.receive(0.0)
        except (Closed, ValueError):
            worker.returned = {"ended": True}
            return f"{worker.title} is gone: its process {worker.how_it_ended()}"
        if message is None or "did" in message or "progress" in message:
            return None
        if "error" in message:
            worker.returned = {"ended": True}
            return f"{worker.title}: {message['error']['message']}"
        worker.returned = message
        if message["problem"]:
            return f"{worker.title}: {message['problem']}"
        return f"the kernel of {worker.title} returned" if message["ended"] else f"the kernel of {worker.title} does not return"

    def _fail(self, cause: str) -> None:
        """Ends everything: the other kernels get a moment to leave their fault records, then their processes end."""
        self._mailbox.stop()
        limit = time.monotonic() + GRACE_S
        own_fault = cause.startswith("the kernel of")  # the fault records say it better
        while self._running() and (left := limit - time.monotonic()) > 0:
            other = self._listen(min(left, BEAT_S))
            if own_fault and other and not other.startswith("the kernel of"):
                cause, own_fault = other, False
        records = faults.read_faults(self._fault_view, self._world_size)
        if own_fault:
            text = faults.explain(records)
        else:
            text = cause + (f" ({faults.explain(records)})" if records else "")
        for worker in self._workers:
            worker.process.kill()  # all of them first
        for worker in self._workers:
            worker.kill()
        with self._lock:
            self.error = FaultError(text + "; all ranks were ended, a new LLM can be made")
            callback = self._callback
        if callback is not None:
            callback(self.error)

    def _stop_in_order(self) -> None:
        """SHUTDOWN, and if that takes too long the stop word; workers whose kernels do not return even then are killed by the group."""
        asked = False
        limit = time.monotonic() + self._deadline_s + SHUTDOWN_S
        while self._running() and time.monotonic() < limit:
            self._mailbox.poll()  # records nobody waits for: a full ring would keep the kernel from going on
            asked = asked or self._mailbox.shutdown() is not None
            self._listen(0.01)
        self._mailbox.stop()
        limit = time.monotonic() + GRACE_S
        while self._running() and time.monotonic() < limit:
            self._listen(0.01)
        if not self._leave:
            return
        if not self._running():
            self._send_all({"do": "disconnect"})
            self._await_all("disconnect")
        self._send_all({"do": "exit"})

    def _await_all(self, step: str) -> None:
        """Waits for everybody's answer, at most GRACE_S; a worker that has no good one is ended all the same."""
        limit = time.monotonic() + GRACE_S
        for worker in self._workers:
            try:
                while (message := worker.channel.receive(max(0.0, limit - time.monotonic()))) is not None:
                    if message.get("did") == step or "error" in message:
                        break
            except (Closed, ValueError):
                pass

    def _running(self) -> bool:
        return any(w.returned is None for w in self._workers)

    def _send_all(self, message: dict) -> None:
        for worker in self._workers:
            try:
                worker.channel.send(message)
            except Closed:
                pass  # heard of in _listen
