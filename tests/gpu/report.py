"""Runs all tests that need a GPU, file by file, and prints a short table last: `python3 tests/gpu/report.py`.

Every file runs in a process of its own with a time limit, so that a crash or a hang costs that file only. The whole output goes to
gpu_tests.log in the folder $OUT (or to the file $OUT), else to a temporary file. Nothing of the GPU is ever set, only asked.
Arguments that are not this script's go to pytest, such as `-k tp2` or `-x`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.gpu.bench import capable_gpus  # noqa: E402

QUERY = "index,name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,memory.used,memory.total"
PACKAGES = (
    "cupy-cuda13x",
    "cupy-cuda12x",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-nvrtc-cu12",
    "torch",
    "transformers",
)
TEST_S = 120  # of one test, where pytest-timeout is installed
MAX_FAILED = 20  # of one file: a kernel that hangs costs its deadline every time


def said(*command: str) -> str:
    """What a command prints; "" where there is none or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def installed() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def cards() -> str:
    return said("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader") or "no GPU"


def commit() -> str:
    name = said("git", "rev-parse", "--short", "HEAD")
    if not name:
        return "no git here"
    return name + (", with changes" if said("git", "status", "--porcelain") else "")


def test_files() -> list[Path]:
    """The longest last. tests/multi_gpu is among them even where it will skip: the table then says why."""
    folders = [ROOT / "tests" / name for name in ("gpu", "multi_gpu")]
    files = [path for folder in folders for path in sorted(folder.glob("test_*.py"))]
    return [ROOT / "tests/model/test_cupy.py", *sorted(files, key=lambda path: path.name == "test_kernel.py")]


# ------------------------------------------------------------------------------------------------ one file
@dataclass
class Result:
    """What became of one file."""

    name: str
    seconds: float = 0.0
    counts: Counter = field(default_factory=Counter)  # passed, failed, skipped
    problems: list[str] = field(default_factory=list)  # a line each
    reasons: Counter = field(default_factory=Counter)  # why tests were skipped
    measured: list[str] = field(default_factory=list)  # record_property's


def run_file(path: Path, limit_s: float, log, options: list[str]) -> Result:
    result = Result(str(path.relative_to(ROOT)))
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "--durations=8", f"--maxfail={MAX_FAILED}"]
        command += ["-o", f"timeout={TEST_S}", "-o", "timeout_method=signal", f"--junitxml={told}", str(path), *options]
        log.write(f"\n=== {result.name}\n")
        log.flush()
        start = time.monotonic()
        unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}  # so that the log names the test that hung
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=unbuffered, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
            if code not in (0, 1, 5) or not told.exists():  # 1: tests failed, 5: none was chosen
                result.problems.append(f"pytest ended with exit code {code}; the log ends: {last_words(log.name)}")
        except subprocess.TimeoutExpired:
            result.problems.append(f"was ended after {limit_s:.0f} s; the log ends: {last_words(log.name)}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own group: it has a session of its own
                process.wait(20)
        result.seconds = time.monotonic() - start
        if told.exists():
            read_junit(told, result)
    return result


def last_words(path: str) -> str:
    with open(path, errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
    return " | ".join(lines[-3:])[-400:]


def read_junit(path: Path, result: Result) -> None:
    for case in xml.parse(path).iter("testcase"):
        skipped, problem = case.find("skipped"), next((e for e in case if e.tag in ("failure", "error")), None)
        if problem is not None:
            result.counts["failed"] += 1
            words = (problem.get("message") or "").strip().splitlines() or ["?"]
            result.problems.append(f"{case.get('name')}: {words[0][:200]}")
        elif skipped is not None:
            result.counts["skipped"] += 1
            result.reasons[(skipped.get("message") or "")[:120]] += 1
        else:
            result.counts["passed"] += 1
        result.measured += [f"{p.get('name')}: {p.get('value')}" for p in case.iter("property")]


# ------------------------------------------------------------------------------------------------ all of them
def print_table(results: list[Result]) -> None:
    width = max(len(result.name) for result in results)
    for result in results:
        for line in result.measured:
            print(f"  {line}")
    for result in results:
        for reason, count in result.reasons.items():
            print(f"  skipped {count} of {result.name}: {reason}")
    print(f"{'file':<{width}} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}")
    for result in results:
        counts = [result.counts[key] for key in ("passed", "failed", "skipped")]
        print(f"{result.name:<{width}} {counts[0]:>7} {counts[1]:>7} {counts[2]:>8} {result.seconds:>8.1f}")
    for result in results:
        for line in result.problems:
            print(f"FAILED {result.name}: {line}")
    total = sum((result.counts for result in results), Counter())
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped", end="")
    print(f" in {sum(result.seconds for result in results):.0f} s")


def open_log():
    given = os.environ.get("OUT")
    if given:
        path = Path(given) / "gpu_tests.log" if Path(given).is_dir() else Path(given)
    else:
        path = Path(tempfile.mkdtemp(prefix="imex-")) / "gpu_tests.log"
    return path.open("w")


def main() -> int:
    parser = argparse.ArgumentParser(description="runs all tests that need a GPU")
    parser.add_argument("--limit", type=float, default=540, help="seconds for everything (default %(default)s)")
    parser.add_argument("--file-limit", type=float, default=240, help="seconds for one file (default %(default)s)")
    parser.add_argument("--only", metavar="TEXT", action="append", default=[], help="files whose path has this in it")
    parser.add_argument("--without", metavar="TEXT", action="append", default=[], help="no file whose path has this in it")
    args, options = parser.parse_known_args()
    end = time.monotonic() + args.limit
    with open_log() as log:
        facts = [f"card: {card}" for card in cards().splitlines()]
        facts += [f"commit: {commit()}", f"python {sys.version.split()[0]}, {', '.join(installed())}", f"log: {log.name}"]
        gpus, why = capable_gpus()
        facts.append(f"capable GPUs: {len(gpus)}" + (f" ({why})" if why else ""))
        print("\n".join(facts), flush=True)
        log.write("\n".join([*facts, said("nvidia-smi", "topo", "-m")]) + "\n")
        results = []
        for path in test_files():
            name = str(path.relative_to(ROOT))
            if (args.only and not any(text in name for text in args.only)) or any(text in name for text in args.without):
                continue
            left = end - time.monotonic()
            if left < 5:
                results.append(Result(name, problems=["no time was left to run it"]))
                continue
            results.append(run_file(path, min(left, args.file_limit), log, options))
            print(f"{results[-1].name}: {dict(results[-1].counts)}, {results[-1].seconds:.1f} s", flush=True)
    if not results:
        print("no file is left by --only and --without")
        return 2
    print()
    print_table(results)
    for card in cards().splitlines():
        print(f"afterwards: {card}")
    return int(any(result.problems for result in results))


if __name__ == "__main__":
    sys.exit(main())
