"""The parent's side of the benchmark kernels: one process a machine, started, asked step by step, and ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from imex_persist.errors import FaultError
from imex_persist.planner import Machine
from imex_persist.runtime import capacity
from imex_persist.runtime.control import Closed
from imex_persist.runtime.group import rebuild_error
from imex_persist.runtime.placement import Placement
from imex_persist.runtime.process import WorkerProcess

COMMAND = (sys.executable, "-P", "-m", "imex_persist.bench.worker")
STEP_S = 180.0  # a build included
END_S = 12.0


class Ranks:
    """Use as a context manager. Raises what the workers raise; every step ends in bounded time."""

    def __init__(self, placement: Placement):
        self.placement = placement
        self.world_size = sum(len(place.ranks) for place in placement.places)
        self.workers: list[WorkerProcess] = []
        self.machines: list[Machine] = []
        self.identities: list[dict] = []

    def __enter__(self) -> Ranks:
        try:
            for place in self.placement.places:
                self.workers.append(WorkerProcess(place, (), COMMAND))
            replies = self.step("open", lambda w: {**asdict(w.place), "world_size": self.world_size})
            self.machines = [Machine(**reply["machine"]) for reply in replies]
            self.identities = [reply["identity"] for reply in replies]
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_exc) -> None:
        self.close()

    def build(self, source: str, shapes: list[np.void]) -> None:
        """Compiles kernels; `prepare` does it too, one at a time. One worker does, the others find them."""
        self.step("build", {"source": source, "shapes": [capacity.to_fields(s) for s in shapes]}, self.workers[:1])

    def prepare(self, source: str, shape: np.void) -> None:
        """Loads a kernel, and maps every rank's memory into every other."""
        self.build(source, [shape])
        replies = self.step("prepare", {"source": source, "shape": capacity.to_fields(shape)})
        handles = {rank: handle for reply in replies for rank, handle in reply["handles"].items()}
        self.step("connect", {"handles": handles})

    def run(self, job: dict, **more) -> dict[int, int]:
        """One launch on every machine: nanoseconds of the timed iterations by rank. `more` is for bench/worker.py."""
        replies = self.step("run", {"job": job, **more})
        return {int(rank): ns for reply in replies for rank, ns in reply["ns"].items()}

    def results(self, count: int | None = None) -> dict[int, np.ndarray]:
        """What the last launch left, uint32 by rank; all of it, or the first `count`."""
        replies = self.step("result", {"count": count})
        return {int(rank): np.array(values, np.uint32) for reply in replies for rank, values in reply["result"].items()}

    def step(
        self,
        name: str,
        message: dict | Callable[[WorkerProcess], dict] | None = None,
        workers: list[WorkerProcess] | None = None,
    ) -> list[dict]:
        """Sends one message to all workers and returns their answers, in order: a barrier."""
        workers = self.workers if workers is None else workers
        for worker in workers:
            try:
                worker.channel.send({"do": name, **(message(worker) if callable(message) else message or {})})
            except Closed:
                pass  # found below, with its reason
        limit = time.monotonic() + STEP_S
        return [self._answer(worker, name, limit) for worker in workers]

    def _answer(self, worker: WorkerProcess, name: str, limit: float) -> dict:
        try:
            reply = worker.channel.receive(max(0.0, limit - time.monotonic()))
        except Closed:
            raise FaultError(
                f"the benchmark process of {worker.title} {worker.how_it_ended()} during '{name}'; its own words are on stderr"
            ) from None
        if reply is None:
            raise FaultError(f"the benchmark process of {worker.title} did not finish '{name}' in {STEP_S:.0f} s")
        if "error" in reply:
            raise rebuild_error(reply["error"])
        return reply

    def close(self) -> None:
        try:
            if len(self.workers) > 1:
                self.step("disconnect")
        except Exception:  # one of them has ended: so do the others, below
            pass
        for worker in self.workers:
            worker.channel.close()
        for worker in self.workers:
            worker.end(END_S)
        self.workers.clear()
