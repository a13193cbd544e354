"""Runs of the kernel in a process under a sanitizer, and what the sanitizer said. test_tsan.py and the hunt for mutations use it.

python -m tests.schedules.sanitized tsan|ubsan|asan <lanes> <source or -> <configuration> …    (t0, t1, t2: the tiny ones)
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from imex_persist.device import hostcc

from .campaign import Device, Kernel
from .configuration import Schedule, configuration, tiny
from .observation import compare

ROOT = Path(__file__).parents[2]
UBSAN = "g++ -fsanitize=undefined -fno-inline -fno-tree-vectorize"  # with inlining it compiles for minutes
# Stacks are fibers' own, which AddressSanitizer does not follow: it watches what is on the heap, globals, and what is poisoned by hand,
# that is the gaps between the blocks' shared memories (launch.cpp) and what follows each buffer (guarded, below).
ASAN = "g++ -fsanitize=address --param=asan-stack=0 -O1"
GUARD_BYTES = 4096
# ThreadSanitizer remembers four accesses of a word: what many threads read shows a late reader under some schedules only.
SCHEDULES = {
    32: (Schedule(0), Schedule(1, {"mode": "random", "preempt": 16})),
    1: tuple(
        Schedule(i, {"mode": "pct" if i % 3 else "random", "preempt": 8, "pct_steps": 5_000} if i else {}) for i in range(4)
    ),
}

# ThreadSanitizer's reports that are no bugs: text of the source line that both sides stand on -> why.
KNOWN: dict[str, str] = {}


def environment(kind: str) -> dict[str, str]:
    """Of a process that loads a sanitized build: the sanitizer must be there before everything else."""
    if kind == "tsan":
        return hostcc.tsan_environment()
    if kind == "asan":
        library = subprocess.run(
            ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        return {**os.environ, "LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}  # Python's own
    return {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"}


def run(kind: str, lanes: int, source: Path | None, *configurations: str, timeout_s: float = 170) -> tuple[str, str]:
    """(stdout, stderr): "right" and nothing if all is well."""
    command = [sys.executable, "-m", "tests.schedules.sanitized", kind, str(lanes), str(source or "-"), *configurations]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment(kind), capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        return "no end", (error.stderr or b"").decode()
    return done.stdout.strip(), done.stderr


def _frames(stack: str) -> list[tuple[str, str, int]]:
    """(function, file, line), innermost first, without the simulator's own."""
    found = re.findall(r"#\d+ (.+?) (/\S+?):(\d+)", stack)
    frames = [(function.split("(")[0], file, int(line)) for function, file, line in found]
    return [f for f in frames if not re.search(r"/sim/[^/]+$", os.path.normpath(f[1]))]


def _place(stack: str) -> tuple[str, str]:
    """("function of file:line", source line) of a stack's innermost frame in the kernel."""
    frames = _frames(stack)
    if not frames:
        return "the host, or a bulk copy", ""
    function, file, line = frames[0]
    lines = Path(file).read_text().splitlines()
    return f"{function} of {Path(file).name}:{line}", " ".join(lines[max(line - 2, 0) : line + 1])


def races(stderr: str) -> list[str]:
    """Every race that ThreadSanitizer reported and KNOWN does not, as "one place / the other"."""
    found = []
    for report in stderr.split("WARNING: ThreadSanitizer: ")[1:]:
        first, _, rest = report.partition("\n\n")
        second = rest.partition("\n\n")[0]
        (a, a_line), (b, b_line) = _place(first), _place(second)
        if not any(text in a_line and text in b_line for text in KNOWN):
            found.append(f"{report.splitlines()[0].split(' (')[0]}: {a} / {b}")
    return list(dict.fromkeys(found))


def guarded(zeros):
    """SimDevice.zeros, with bytes after each buffer that nobody may touch."""
    poison = ctypes.CDLL(None).__asan_poison_memory_region

    def allocate(self, nbytes: int):
        buffer = zeros(self, nbytes + GUARD_BYTES)
        poison(ctypes.c_void_p(buffer.address + nbytes), ctypes.c_size_t(GUARD_BYTES))
        return replace(buffer, nbytes=nbytes)

    return allocate


def main(kind: str, lanes: str, source: str, *names: str) -> None:
    build = {"tsan": True} if kind == "tsan" else {"cxx": UBSAN if kind == "ubsan" else ASAN}
    if kind == "asan":
        Device.zeros = guarded(Device.zeros)
    for name in names:
        chosen = tiny(int(name[1:]), int(lanes)) if name[0] == "t" else configuration(int(name), int(lanes))
        kernel = Kernel(chosen, source=None if source == "-" else source, tap=False, **build)
        first, *others = [kernel.run(schedule) for schedule in SCHEDULES[int(lanes)]]
        for other in others:
            compare(chosen, first, other)
        kernel.close()
    print("right")


if __name__ == "__main__":
    main(*sys.argv[1:])
