"""compute-sanitizer's four tools on the phase tests of a GPU, and what they said in a few lines.

    python -m tests.gpu.sanitize [--tools memcheck racecheck synccheck initcheck] [--cases 4] [--minutes 8]

Each phase runs alone, as tests/kernel/test_phases.py has it, on the first `--cases` random models; deadlines are SLOWER times as long.
racecheck does not follow threads that meet and of which one then arrives at an mbarrier for all: for it the kernel is built so that all do.
API errors are not asked for: CuPy and cuda-python try functions that a driver may not have.
A report is clean, or named in KNOWN with the reason why it is no bug. Exit code 1: something is neither. The whole log of a tool stays in
the folder that the last line names.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from imex_persist.abi import Phase

from .bench import capable_gpus

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SLOWER = 50
# (tool, text that must be in the report) -> why it is no bug. Nothing is explained before it has been seen.
NO_REPORT = re.compile(r"COMPUTE-SANITIZER|(ERROR|RACECHECK|LEAK) SUMMARY|Target application|Total Hazards")
KNOWN: dict[tuple[str, str], str] = {}


def find_tool() -> str:
    """In PATH, in CUDA's folder, or in a wheel such as nvidia-cuda-sanitizer-api."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin", *map(Path, site.getsitepackages())]
    if found := shutil.which("compute-sanitizer"):
        return found
    for folder in folders:
        for path in sorted(folder.rglob("compute-sanitizer")) if folder.is_dir() else ():
            if path.is_file() and os.access(path, os.X_OK):
                return str(path)
    raise SystemExit("compute-sanitizer was not found: it is in the CUDA toolkit, and in the wheel nvidia-cuda-sanitizer-api")


def chosen_tests(cases: int) -> list[str]:
    return [f"tests/gpu/test_kernel.py::test_{phase.name.lower()}[{index}]" for phase in Phase for index in range(cases)]


def pytest_command(tests: list[str]) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]


def environment(tool: str) -> dict[str, str]:
    more = {"IMEX_EVERYBODY_ARRIVES": "1"} if tool == "racecheck" else {}
    return {**os.environ, "TEST_PATIENCE": str(SLOWER), "IMEX_LINE_INFO": "1", **more}


def reports(log: str) -> list[str]:
    """What a tool found: each report's first line and the place it names, without thread numbers and addresses."""
    found = []
    for block in re.split(r"\n(?:=+ *\n)+", log):
        lines = [re.sub(r"^=+ ?", "", line).strip() for line in block.splitlines()]
        text = [line for line in lines if line and not NO_REPORT.match(line)]
        if not text:
            continue
        place = next((line for line in text if re.search(r"\.cuh?:\d+|\bat .*\+0x", line)), "")
        found.append(re.sub(r"\(\d+,\d+,\d+\)|0x[0-9a-f]+", "…", " | ".join(dict.fromkeys((text[0], place)))).strip(" |"))
    return found


def run(tool: str, sanitizer: str, tests: list[str], folder: Path, seconds: float) -> tuple[str, Counter, str]:
    """(verdict, unexplained reports, pytest's last line)."""
    log, said = folder / f"{tool}.log", folder / f"{tool}.pytest"
    options = [
        "--tool",
        tool,
        "--target-processes",
        "all",
        "--print-limit",
        "200",
        "--log-file",
        str(log),
        "--report-api-errors",
        "no",
    ]
    with said.open("w") as out:
        command = [sanitizer, *options, *pytest_command(tests)]
        try:
            code = subprocess.run(command, cwd=ROOT, env=environment(tool), stdout=out, stderr=out, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            code = None
    found = Counter(reports(log.read_text(errors="replace") if log.exists() else ""))
    unknown = Counter({r: n for r, n in found.items() if not any(tool == t and text in r for t, text in KNOWN)})
    last = (said.read_text(errors="replace").strip().splitlines() or ["pytest said nothing"])[-1]
    if unknown:
        return f"{sum(unknown.values())} reports", unknown, last
    if code is None:
        return f"no end within {seconds:.0f} s", unknown, last
    if code or not re.search(r"\d+ passed", last):
        return f"pytest ended with {code}", unknown, last
    return f"clean, {sum(found.values())} explained" if found else "clean", unknown, last


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.sanitize", description=__doc__.split("\n")[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--cases", type=int, default=4, help="random models")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    args = parser.parse_args()
    if why := capable_gpus()[1]:
        raise SystemExit(f"this needs a GPU: {why}")
    sanitizer, tests = find_tool(), chosen_tests(args.cases)
    folder, end, bad = Path(tempfile.mkdtemp(prefix="imex-sanitize-")), time.monotonic() + 60 * args.minutes, 0
    for build in {frozenset(environment(tool).items()) for tool in args.tools}:  # what has to be compiled
        subprocess.run(pytest_command(tests), cwd=ROOT, env=dict(build), stdout=subprocess.DEVNULL)
    for i, tool in enumerate(args.tools):
        began = time.monotonic()
        verdict, unknown, last = run(tool, sanitizer, tests, folder, max(10.0, (end - began) / (len(args.tools) - i)))
        bad += not verdict.startswith("clean")
        print(f"{tool}: {verdict} ({time.monotonic() - began:.0f} s; {last})", flush=True)
        for report, count in unknown.most_common(12):
            print(f"  {count} x {report[:300]}", flush=True)
    print(f"logs: {folder}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
