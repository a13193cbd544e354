"""Compiles the kernel for the simulator: cuda_src/decode.cu and cuda_src/sim with whatever C++17 compiler this host has.

The result is a shared library in the cache of sources.py, named by a digest of everything that went into it. The kernel and the
simulator's own files are separate objects, so that a change of the kernel compiles the kernel only.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from imex_persist.device import sources
from imex_persist.errors import DeviceError

RUNTIME = ("scheduler.cpp", "memory.cpp", "sync.cpp", "report.cpp", "launch.cpp")
FLAGS = (
    "-std=c++17 -O3 -g -fPIC -march=native -fvisibility=hidden -fno-exceptions -fno-rtti -fno-threadsafe-statics "
    "-fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi -Wno-unknown-pragmas -Wno-unused-function"
).split()
ZIG_FLAGS = ("-fno-sanitize=undefined",)


@dataclass(frozen=True)
class Compiler:
    command: tuple[str, ...]
    version: str

    @property
    def is_zig(self) -> bool:
        return "ziglang" in self.command or Path(self.command[0]).stem == "zig"


def find_compiler(cxx: str | None = None) -> Compiler:
    """`cxx`, else $CXX, g++, clang++, or the ziglang wheel's; DeviceError if this host has none of them."""
    wanted = cxx or os.environ.get("CXX")
    candidates = [_words(wanted)] if wanted else [("g++",), ("c++",), ("clang++",)]
    if not wanted and importlib.util.find_spec("ziglang"):
        candidates.append((sys.executable, "-m", "ziglang", "c++"))
    for command in candidates:
        program = shutil.which(command[0])
        if program and (version := _version(program, command)):
            return Compiler(command, version)
    if wanted:
        raise DeviceError(f"the C++ compiler {wanted!r} does not run; name one that does in CXX, or unset it")
    raise DeviceError(
        "the simulator needs a C++ compiler and this host has none: install g++ or clang++, or `pip install ziglang`"
    )


def _words(command: str) -> tuple[str, ...]:
    try:
        if words := tuple(shlex.split(command)):
            return words
    except ValueError as error:
        raise DeviceError(
            f"the C++ compiler {command!r} is no command ({error}); name one that is in CXX, or unset it"
        ) from None
    raise DeviceError(f"the C++ compiler {command!r} is no command; name one that is in CXX, or unset it")


@lru_cache
def _version(program: str, command: tuple[str, ...]) -> str:
    """What the compiler at `program` says of itself; "" if it does not run."""
    try:
        answer = subprocess.run([program, *command[1:], "--version"], capture_output=True, text=True)
    except OSError:  # no program that this machine knows
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


@lru_cache
def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    keys = ("flags", "Features", "model name", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(keys)}))


def _cached(name: str, key: str, make: Callable[[Path], None]) -> Path:
    """The file `name` in the cache's folder sim/<key>; `make(path)` writes it if it is not there."""
    return sources.cached(f"sim/{key}", lambda folder: make(folder / name)) / name


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DeviceError(f"{what} does not compile for the simulator:\n{shlex.join(command)}\n{done.stderr.strip()[:8000]}")


def build(
    lanes: int = 1, source: str | Path | None = None, *, tsan: bool = False, cxx: str | None = None, defines: tuple = ()
) -> Path:
    """The shared library that simulates `source` (None: decode.cu) with one fiber a warp (`lanes` 1) or a thread (32).

    `defines`: extra "NAME=value" for the kernel only. `tsan`: instruments the kernel for ThreadSanitizer.
    """
    if lanes not in (1, 32):
        raise ValueError(f"lanes is {lanes}: a warp is simulated as 1 fiber or as 32")
    root, compiler = sources.cuda_src(), find_compiler(cxx)
    flags = [*FLAGS, f"-DSIM_LANES={lanes}", *(ZIG_FLAGS if compiler.is_zig else ())]
    if tsan:
        if "g++" not in Path(compiler.command[0]).name:
            raise DeviceError(f"the simulator's ThreadSanitizer build needs g++, not {shlex.join(compiler.command)}")
        flags.append("-DSIM_TSAN")
    toolchain = (compiler.command, compiler.version, _cpu(), flags)

    def compile_object(path: Path, files: Iterable[Path], extra: list[str]) -> Path:
        def make(made: Path) -> None:
            _run([*compiler.command, *flags, *extra, "-c", str(path), "-o", str(made)], path.name)

        return _cached(f"{path.stem}.o", sources.digest(files, path.name, extra, *toolchain), make)

    tree = sources.source_files(without=("cuda",))
    runtime = [path for path in tree if path.name == "abi.cuh" or (path.parent.name == "sim" and path.suffix in (".h", ".cpp"))]
    objects = [compile_object(root / "sim" / name, runtime, []) for name in RUNTIME]
    extra = [f"-I{root}", *(f"-D{define}" for define in defines)]
    if source is not None:
        source = Path(source).resolve()
        extra.append(f'-DIMEX_KERNEL_SOURCE="{source}"')
        tree = [*tree, *sorted(path for path in source.parent.iterdir() if path.suffix in (".cu", ".cuh", ".h"))]
    if tsan:
        extra += ["-fsanitize=thread", "-O1"]
    objects.append(compile_object(root / "sim" / "kernel.cpp", tree, extra))

    link = [
        "-shared",
        *(["-nostdlib++"] if compiler.is_zig else []),
        *(["-fsanitize=thread"] if tsan else []),
        *map(str, objects),
        "-lm",
    ]

    def make_library(made: Path) -> None:
        _run([*compiler.command, *link, "-o", str(made)], "the simulator")

    return _cached("sim.so", sources.digest([], *toolchain, *objects), make_library)


def tsan_environment() -> dict[str, str]:
    """Environment of a process that loads a `tsan` build: ThreadSanitizer must be there before everything else."""
    library = subprocess.run(
        [*find_compiler().command, "-print-file-name=libtsan.so"], capture_output=True, text=True
    ).stdout.strip()
    options = "report_thread_leaks=0 history_size=3 exitcode=66 report_signal_unsafe=0"
    return {**os.environ, "LD_PRELOAD": str(Path(library).resolve()), "TSAN_OPTIONS": options}
