"""Hunts mutations and writes who caught what, after how many runs and seconds.

python -m tests.schedules.hunt [name …]             rows of the table in docs/schedules.md, of all or of some
python -m tests.schedules.hunt --by schedules NAME  one hunt, in this process
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from imex_persist.device import sources
from imex_persist.device.sim import SimKernel
from imex_persist.errors import DeviceError

from . import drills, sanitized
from .campaign import DEADLINE_US, Kernel, _library
from .configuration import SCHEDULES, Schedule, configuration, schedule
from .mutations_across import MUTATIONS
from .observation import Wrong

ROOT = Path(__file__).parents[2]
QUICK_CXX = f"{sys.executable} {Path(__file__).with_name('quick_cxx.py')}"
STRIDE = 3  # seeds of the campaign, but more configurations than it would have run by then
RUNS, SECONDS = 2000, 240.0


@dataclass
class Found:
    by: str
    runs: int
    seconds: float
    what: str

    @property
    def kind(self) -> str:
        """What was seen, in a word or two."""
        return next((kind for words, kind in KINDS if words in self.what), "wrong bits")


NAMES = {"schedules": "schedules", "threads": "schedules of threads", "tsan": "ThreadSanitizer", "drill": "drill"}
KINDS = (  # text of a find -> its kind
    ("data race", "race"), ("deadlock", "deadlock"), ("a wait", "a wait gave up"), ("misused", "misuse"), ("no end", "no end"),
    ("crash", "crash"), ("stopped", "no end"), ("announced", "a record that was not there"),
)  # fmt: skip


def row(name: str, found: Found | None) -> str:
    """One of the table in docs/schedules.md."""
    seen = f"{NAMES[found.by]}: {found.kind} | {found.runs} runs, {found.seconds:.0f} s" if found else "**nobody** | "
    return f"| `{name}` | {MUTATIONS[name].breaks} | {seen} |"


def source_of(name: str) -> Path:
    folder = sources.cache_dir() / "mutations"
    folder.mkdir(parents=True, exist_ok=True)
    return MUTATIONS[name].apply(folder)


def _known_kernels(lanes: int, **build):
    """(seed, kernel, what a run of it must show): the mutant's memory, and the round-robin run of the kernel as it is."""
    kernel, number = None, None
    for seed in range(0, RUNS * STRIDE, STRIDE):
        if number != seed // SCHEDULES:
            number = seed // SCHEDULES
            if kernel:
                kernel.close()
            kernel = Kernel(configuration(number, lanes), DEADLINE_US, **build)
            kernel.timeout_s = 10
            mutant, kernel.kernel = kernel.kernel, SimKernel(_library(lanes, cxx=QUICK_CXX), kernel.shape)
            try:
                known = kernel.run(Schedule(0))
            except (Wrong, DeviceError) as error:
                raise RuntimeError(f"the kernel as it is fails in configuration {number}: {error}") from None
            kernel.kernel = mutant
        yield seed, kernel, known


def by_schedules(name: str, seconds: float = SECONDS, lanes: int = 1) -> str:
    began = None
    for runs, (seed, kernel, known) in enumerate(_known_kernels(lanes, source=source_of(name), cxx=QUICK_CXX), 1):
        began = began or time.monotonic()
        print(f"runs {runs}", flush=True)  # of a process that may crash
        try:
            kernel.check(known, schedule(seed))
        except (Wrong, DeviceError) as error:
            return f"seed {seed}: {str(error).splitlines()[0][:160]}"
        if time.monotonic() - began > seconds:
            break
    return ""


def by_drill(name: str) -> str:
    for drill in drills.DRILLS:
        try:
            drill(source_of(name))
        except (Wrong, DeviceError) as error:
            return f"{drill.__name__}: {str(error).splitlines()[0][:160]}"
    return ""


def by_tsan(name: str) -> Found | None:
    began = time.monotonic()
    for runs, (lanes, which) in enumerate(((32, "t0"), (32, "t1"), (1, "t0"), (1, "t1")), 1):
        out, err = sanitized.run("tsan", lanes, source_of(name), which)
        if "does not compile" in err:
            raise RuntimeError(err.splitlines()[-1])
        races = sanitized.races(err)
        if races or out != "right":
            said = [line for line in err.splitlines() if "Wrong: " in line or "Error: " in line]
            what = (races or said or err.splitlines()[-1:] or [out])[0][:160]
            return Found("tsan", runs, time.monotonic() - began, what)
    return None


def hunt(name: str, by: str) -> Found | None:
    """In a process of its own: a mutant may crash, and it may never end."""
    if by == "tsan":
        return by_tsan(name)
    began = time.monotonic()
    command = [sys.executable, "-m", "tests.schedules.hunt", "--by", by, name]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290)
        out, crashed = done.stdout, done.returncode not in (0, 3)
        why = f"crash, status {done.returncode}" + (f": {done.stderr.splitlines()[-1][:120]}" if done.stderr else "")
    except subprocess.TimeoutExpired as error:
        out, crashed, why = (error.stdout or b"").decode(), True, "no end"
    if "does not compile" in why or "mutation " in why or "as it is" in why:
        raise RuntimeError(why)
    runs = out.count("runs ")
    said = [line.removeprefix("caught ") for line in out.splitlines() if line.startswith("caught ")]
    if said or crashed:
        return Found(by, max(runs, 1), time.monotonic() - began, said[0] if said else why)
    return None


def first_to_find(name: str) -> Found | None:
    """Whoever is expected to, then the others."""
    expected = MUTATIONS[name].by
    for by in sorted(("schedules", "drill", "tsan", "threads"), key=lambda each: each != expected):
        if found := hunt(name, by):
            return found
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.schedules.hunt")
    parser.add_argument("names", nargs="*", metavar="name")
    parser.add_argument("--by", choices=("schedules", "threads", "drill"))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of schedules")
    args = parser.parse_args()
    if args.by:
        name, lanes = args.names[0], 32 if args.by == "threads" else 1
        if said := by_drill(name) if args.by == "drill" else by_schedules(name, args.seconds, lanes):
            print("caught " + said)
        return 3 if said else 0
    for name in args.names or MUTATIONS:
        print(row(name, first_to_find(name)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
