"""Fuzzes: all targets, each in a process with little memory that is watched for hangs.

    python -m tests.fuzz.run [target …] [--share 0.02] [--seed 0]

`--share 1` is the whole, more than 10⁵ inputs. An input that crashes, hangs, allocates out of all proportion, or is refused in any other
way than by one sentence is shown, smaller ones first tried by Hypothesis. Exit code 1: there was one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings

from .targets import TARGETS, folder

ROOT = Path(__file__).parents[2]
MEMORY_BYTES = 1 << 30  # more than the process has when it begins
INPUT_S = 10  # that one input may take
SECONDS_FOR_1000 = 60  # that inputs may take before a target is given up as hanging: far more than they need


def one_sentence(error: ValueError) -> None:
    text = str(error)
    assert "\n" not in text and 0 < len(text) < 600, f"refused in {len(text)} characters: {text[:700]!r}"


def fuzz(name: str, count: int, number: int) -> int:
    """In this process. How many inputs were tried; raises for a find."""
    target, tried = TARGETS[name], 0
    last = os.open(folder() / "last", os.O_RDWR | os.O_CREAT)  # for whoever finds this process dead

    def one(value) -> None:
        nonlocal tried
        tried += 1
        os.ftruncate(last, 0)
        os.pwrite(last, repr(value)[:10_000].encode(errors="replace"), 0)
        signal.setitimer(signal.ITIMER_REAL, INPUT_S)
        try:
            target.act(value)
        except ValueError as error:
            one_sentence(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    if target.make is not None:
        for i in range(count):
            one(target.make(number * 1_000_000 + i))
        return tried

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False)
    @seed(number)
    @given(target.strategy)
    def attempt(value) -> None:
        one(value)

    attempt()
    return tried


def limited(name: str, count: int, number: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    signal.signal(signal.SIGALRM, _too_long)
    warnings.simplefilter("ignore")
    print(f"folder {folder()}", flush=True)
    print(f"tried {fuzz(name, count, number)}", flush=True)


def _too_long(*_signal) -> None:
    raise TimeoutError(f"an input took more than {INPUT_S} s")


def run(name: str, share: float, number: int = 0) -> tuple[int, str]:
    """(inputs tried, what was found or "")."""
    count = max(20, round(TARGETS[name].inputs * share))
    command = [sys.executable, "-m", "tests.fuzz.run", "--here", name, "--count", str(count), "--seed", str(number)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60 + count * SECONDS_FOR_1000 / 1000)
        out, err, how = done.stdout, done.stderr, f"exit code {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        out, err, how = (error.stdout or b"").decode(), (error.stderr or b"").decode(), "no end"
    lines = dict(line.split(" ", 1) for line in out.splitlines() if " " in line)
    last = Path(lines.get("folder", "/nowhere")) / "last"
    found = f"{how}\n{err[-4000:]}\nthe last input: {last.read_text()[:1000] if last.exists() else '?'}" if how else ""
    shutil.rmtree(last.parent, ignore_errors=True)
    return int(lines.get("tried", 0)), found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="target")
    parser.add_argument("--share", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--here", choices=TARGETS, help="one target in this process")
    parser.add_argument("--count", type=int)
    args = parser.parse_args()
    if args.here:
        limited(args.here, args.count, args.seed)
        return 0
    total, bad = 0, 0
    for name in args.targets or TARGETS:
        began = time.monotonic()
        tried, found = run(name, args.share, args.seed)
        total, bad = total + tried, bad + bool(found)
        how = f"a find: {found}" if found else "none crashed, hung or was refused badly"
        print(f"{name}: {tried} inputs, {how} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{total} inputs, {bad} targets with a find")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
