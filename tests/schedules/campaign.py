"""The campaign: whole-kernel runs under seeded schedules, each compared bit for bit with the round-robin run of its configuration.

    python -m tests.schedules.campaign --seeds 1000 [--first 0] [--jobs 2] [--lanes 1]

Every failing seed prints the one command that runs it again. `make simulate` is this.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from imex_persist import abi, planner
from imex_persist.abi import Command
from imex_persist.device import hostcc
from imex_persist.device.sim import MODES, SimDevice, SimKernel, SimLaunch, load_library
from imex_persist.errors import DeviceError
from imex_persist.model.dummy import DummyWeights
from tests.kernel.harness import FAULT_BYTES, KernelRun
from tests.kernel.pages import garbage

from . import observation
from .configuration import SCHEDULES, Configuration, Schedule, configuration, schedule
from .observation import Observation, Wrong, compare, expect

ROOT = Path(__file__).parents[2]
DEADLINE_US = 1_000_000  # virtual; it passes with the wall's time only while nothing can run


@cache
def _library(lanes: int, **build):
    """Built once a process: somebody may be editing the sources meanwhile."""
    return load_library(str(hostcc.build(lanes, **build)))


class Device(SimDevice):
    def load(self, shape: np.void) -> SimKernel:
        return SimKernel(_library(**self._build), shape)


class Kernel(KernelRun):
    """A configuration's kernel and memory, made once and run under many schedules."""

    def __init__(self, configuration: Configuration, deadline_us: int = DEADLINE_US, tap: bool = True, **build):
        self.configuration, self.deadline_us, self.timeout_s = configuration, deadline_us, 60.0
        case = configuration.case
        device = Device(configuration.lanes, case.num_blocks, max_stages=configuration.max_stages, **build)
        pages = [-(-r.positions // case.page_size) for r in configuration.requests]
        shape = planner.make_shape(case.config, machine=device.machine, num_pages=sum(pages) + 1, **case.options, tap=tap)
        shape["window"], shape["renew_steps"] = configuration.window, configuration.renew_steps
        super().__init__(device, case.config, DummyWeights(case.config, case.seed), shape)
        self.table = np.zeros((int(shape["num_slots"]), int(shape["pages_per_slot"])), np.uint32)
        for i, count in enumerate(pages):  # not in order, the last page nobody's
            self.table[i, :count] = sum(pages) - 1 - np.arange(sum(pages[:i]), sum(pages[: i + 1]))
        rng = np.random.default_rng([abs(configuration.number), 7])
        self.first_pages = [garbage(rng, rank.kv.nbytes // 2) for rank in self.ranks]

    @cached_property
    def launch_params(self) -> np.void:
        params = np.array(self.params(mailbox=True))
        params["ranks"]["deadline_us"] = self.deadline_us
        return params[()]

    def reset(self) -> None:
        """As before the first launch: zeroed words and counters, pages full of garbage."""
        self.host[:], self.faults[:] = 0, 0
        for rank, tap, pages in zip(self.ranks, self.taps, self.first_pages, strict=True):
            for buffer in filter(None, (rank.symmetric, rank.claims, tap)):
                self.device.upload(buffer, 0, np.zeros(buffer.nbytes, np.uint8))
            nobody = np.full_like(self.table, self.table.max() + 1)
            self.device.upload(rank.symmetric, int(self.shape["off_page_table"]) * 8, nobody)
            self.device.upload(rank.kv, 0, pages)

    def submit(self) -> int:
        """Writes all descriptors; how many."""
        mailbox = self.host[: abi.Mailbox.itemsize].view(abi.Mailbox)[0]
        arena = self.host[abi.Mailbox.itemsize :].view(np.uint32)
        requests, at, count = self.configuration.requests, 0, 0

        def put(command: Command, **fields) -> None:
            nonlocal count
            count += 1
            self._descriptor(mailbox, count, command, **fields)

        for i, r in enumerate(requests):
            pages = self.table[i, : -(-r.positions // self.configuration.case.page_size)]
            words = r.sampling.words if r.sampling else ()
            body = [*r.prompt, *(int(p) for p in pages), *r.stop, *words]
            arena[at : at + len(body)] = body
            put(Command.SUBMIT, request=i, slot=i, arena=at, prompt_len=len(r.prompt), num_pages=len(pages), num_stop=len(r.stop),
                max_tokens=r.max_tokens, min_tokens=r.min_tokens, draw=r.sampling.draw if r.sampling else 0,
                num_logprobs=r.sampling.num_logprobs if r.sampling else 0, first_token=r.prompt[0], first_page=int(pages[0]))  # fmt: skip
            at += len(body)
        for i, r in enumerate(requests):
            if r.cancel_after is not None:
                for _ in range(r.cancel_after):
                    put(Command.NOOP)
                put(Command.CANCEL, request=i)
        put(Command.SHUTDOWN)
        return count

    def run(self, schedule: Schedule) -> Observation | None:
        """One launch; None if the schedule aborted it. Wrong or DeviceError when it did not go as every run must."""
        self.reset()
        count = self.submit()
        launch = self.start(schedule)
        if not launch.wait(self.timeout_s):
            launch.stop()
            raise Wrong(f"no end after {self.timeout_s:.0f} s: {launch.report[:2000]}")
        self.stats = launch.stats
        for i in range(self.world):
            fault = self.fault(i)
            expect(
                not fault["valid"], f"a wait of rank {i} gave up: {dict(zip(fault.dtype.names, fault.tolist(), strict=True))}"
            )
        if 0 < schedule.options.get("abort_step", 0) <= launch.stats["steps"]:
            observation.read_prefix(self.configuration, self.records, count)
            return None
        return self.observe(count)

    @property
    def records(self) -> np.ndarray:
        return self.host[: abi.Mailbox.itemsize].view(abi.Mailbox)[0]["records"]

    def start(self, schedule: Schedule) -> SimLaunch:
        config = self.device.config
        config.seed = schedule.seed
        options = {
            "mode": "rr",
            "delay_stores": False,
            "delay_copies": False,
            "split_words": False,
            "stalls": False,
            "preempt": 0,
            "abort_step": 0,
        }
        config.host_bytes = self.host.nbytes
        for name, value in (options | schedule.options).items():
            setattr(config, name, MODES.index(value) if name == "mode" else value)
        return self.device.launch(self.kernel, self.launch_params)

    def fault(self, rank: int) -> np.void:
        return self.faults[rank * FAULT_BYTES :][: abi.FaultRecord.itemsize].view(abi.FaultRecord)[0]

    def observe(self, num_commands: int) -> Observation:
        seen = observation.read_records(self.configuration, self.records, num_commands)
        width = 2 * planner.plan_words(int(self.shape["max_rows"]))
        first = None
        for rank in self.ranks:
            words = self.device.download(rank.symmetric, int(self.shape["off_plan"]) * 8, width * 8).view(np.uint64)
            rows = observation.last_rows(self.shape, words)
            first = rows if first is None else first
            expect(rows == first, f"rank {rank.rank} ended with another plan than rank 0")
            if self.taps[0]:
                observation.observe_rows(seen, rank.rank, self.shape, self.tap(rank.rank), rows)
            bits = self.device.download(rank.kv, 0, rank.kv.nbytes).view(np.uint16)
            observation.observe_pages(seen, self.configuration, self.shape, self.table, bits)
        return seen

    def check(self, known: Observation, schedule: Schedule) -> None:
        """One launch, which must show what `known` does, or end at once if the schedule aborts it."""
        if seen := self.run(schedule):
            compare(self.configuration, known, seen)

    def close(self) -> None:
        self.device.close()


@dataclass
class Result:
    seed: int
    seconds: float
    wrong: str = ""  # what, if anything
    reference: bool = False  # the round-robin run of the configuration itself went wrong


def run_seeds(seeds: Iterable[int], lanes: int | None = None, **build) -> Iterator[Result]:
    """Runs the seeds, in order. `build`: SimDevice's options of the compiler, such as another `source`."""
    kernel, known, number = None, None, None
    try:
        for seed in seeds:
            began, wrong, reference = time.perf_counter(), "", False
            try:
                if number != seed // SCHEDULES:
                    if kernel:
                        kernel.close()
                    number = seed // SCHEDULES
                    kernel, known = None, None
                    kernel = Kernel(configuration(number, lanes), **build)
                if known is None:
                    reference = True
                    known = kernel.run(Schedule(0))
                    reference = False
                kernel.check(known, schedule(seed))
            except (DeviceError, Wrong) as error:
                if "does not compile" in str(error):
                    raise
                wrong = str(error)
            yield Result(seed, time.perf_counter() - began, wrong, reference)
    finally:
        if kernel:
            kernel.close()


def replay_command(seed: int, lanes: int | None) -> str:
    return f"make simulate FIRST={seed} SEEDS=1" + (f" LANES={lanes}" if lanes else "")


def describe(seed: int, lanes: int | None = None) -> str:
    return f"{configuration(seed // SCHEDULES, lanes)}; {schedule(seed).options}"


def _shares(first: int, seeds: int, jobs: int) -> list[tuple[int, int]]:
    """(first, count) of each job, cut at configurations."""
    borders = [first, *(first + seeds * j // jobs // SCHEDULES * SCHEDULES for j in range(1, jobs)), first + seeds]
    return [(a, b - a) for a, b in pairwise(borders) if b > a]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.schedules.campaign", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--lanes", type=int, choices=(1, 32), help="this form of the simulator only")
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    if args.jobs > 1 and args.seeds > 1:
        command = [sys.executable, "-m", "tests.schedules.campaign", *(["--lanes", str(args.lanes)] if args.lanes else [])]
        jobs = [
            subprocess.Popen([*command, "--first", str(a), "--seeds", str(n)], cwd=ROOT, env={**os.environ})
            for a, n in _shares(args.first, args.seeds, args.jobs)
        ]
        return max(job.wait() for job in jobs)
    failed = 0
    for result in run_seeds(range(args.first, args.first + args.seeds), args.lanes):
        if result.wrong:
            failed += 1
            what = "in round robin" if result.reference else ""
            print(f"seed {result.seed} failed {what}: {result.wrong.splitlines()[0][:300]}")
            print(f"  again: {replay_command(result.seed, args.lanes)}", flush=True)
            if args.seeds == 1:
                print(f"  {describe(result.seed, args.lanes)}\n{result.wrong}")
    seconds = time.perf_counter() - began
    print(
        f"{args.seeds} runs, seeds {args.first} to {args.first + args.seeds - 1}: {failed} failed, {args.seeds / seconds:.1f} runs/s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
