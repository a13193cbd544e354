"""From cuda_src to a cubin with NVRTC: no GPU, no driver and no CUDA headers are needed, only two pip wheels.

The sizes of the model are compile-time constants (-DIMEX_SHAPE), so every shape is a build of its own, found again by its digest.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imex_persist import abi_render
from imex_persist.device import sources
from imex_persist.errors import DeviceError

TARGETS = ("sm_90a", "sm_100a", "sm_103a", "sm_120a")  # what CI compiles for
PACKAGES_HINT = "run: pip install 'imex-persist[cuda13]' (or [cuda12] for a CUDA 12 driver)"


@dataclass(frozen=True)
class Resources:
    """What ptxas says one function needs of a multiprocessor."""

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int = 0  # static shared memory; the kernel's own is dynamic
    barriers: int = 0

    @property
    def spills(self) -> bool:
        return bool(self.stack_bytes or self.spill_store_bytes or self.spill_load_bytes)


@dataclass(frozen=True)
class Build:
    """A compiled kernel in the cache."""

    folder: Path
    arch: str
    log: str  # what NVRTC and ptxas said

    @property
    def cubin(self) -> Path:
        return self.folder / "kernel.cubin"

    @property
    def ptx(self) -> str:
        return (self.folder / "kernel.ptx").read_text()

    @property
    def resources(self) -> dict[str, Resources]:
        """Per function (kernels and those that were not inlined)."""
        return parse_resources(self.log)


def _bindings():
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise DeviceError(f"cuda-python, which compiles the kernel, is missing ({error}): {PACKAGES_HINT}") from error
    return nvrtc


def version() -> tuple[int, int]:
    """NVRTC's version; raises DeviceError where it cannot be loaded."""
    nvrtc = _bindings()
    try:
        return _checked(nvrtc, nvrtc.nvrtcVersion(), "nvrtcVersion")
    except (RuntimeError, OSError) as error:
        if isinstance(error, DeviceError):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DeviceError(
            f"the NVRTC library, which compiles the kernel, cannot be loaded ({first}): {PACKAGES_HINT}"
        ) from error


def _checked(nvrtc, result: tuple, what: str):
    """The values behind a binding's status; NVRTC's own name of a failure otherwise."""
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise DeviceError(f"{what} failed with {status.name}: this NVRTC cannot do it; {PACKAGES_HINT}")
    return values[0] if len(values) == 1 else tuple(values)


def options(shape: np.void, arch: str) -> list[str]:
    """NVRTC's command line for a kernel of `shape`."""
    return [
        f"--gpu-architecture={arch}",
        "-std=c++17",
        "--ptxas-options=-v",  # registers and spills, for `resources`
        f"-DIMEX_SHAPE={abi_render.shape_initializer(shape)}",
        *(["-lineinfo"] if os.environ.get("IMEX_LINE_INFO") else []),  # for compute-sanitizer and profilers
        *(["-DIMEX_EVERYBODY_ARRIVES"] if os.environ.get("IMEX_EVERYBODY_ARRIVES") else []),  # for racecheck, see block.cuh
    ]


def compile_kernel(shape: np.void, arch: str, source: Path | None = None) -> Build:
    """Compiles `source` (cuda_src/decode.cu) for a GPU architecture such as "sm_90a", or finds it in the cache."""
    source = source or sources.cuda_src() / "decode.cu"
    flags = options(shape, arch)
    include = sources.cuda_src()
    key = sources.digest([source, *sources.source_files(without=["sim"])], *flags, *version())

    def build(folder: Path) -> None:
        cubin, ptx, log = _run(source, [*flags, f"--include-path={include}", f"--include-path={source.parent}"])
        (folder / "kernel.cubin").write_bytes(cubin)
        (folder / "kernel.ptx").write_bytes(ptx)
        (folder / "log.txt").write_text(log)

    folder = sources.cached(f"cuda/{key}", build)
    return Build(folder, arch, (folder / "log.txt").read_text())


def _run(source: Path, flags: list[str]) -> tuple[bytes, bytes, str]:
    """(cubin, PTX, log)."""
    nvrtc = _bindings()
    program = _checked(
        nvrtc, nvrtc.nvrtcCreateProgram(source.read_bytes(), str(source).encode(), 0, [], []), "nvrtcCreateProgram"
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
        log = _text(nvrtc, program, "ProgramLog").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise DeviceError(_why(source, flags, status.name, log))
        return _text(nvrtc, program, "CUBIN"), _text(nvrtc, program, "PTX"), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _text(nvrtc, program, what: str) -> bytes:
    size = _checked(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program), f"nvrtcGet{what}Size")
    out = bytearray(size)  # filled in place
    _checked(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, out), f"nvrtcGet{what}")
    out = bytes(out)
    return out if what == "CUBIN" else out.rstrip(b"\0 ")


def _why(source: Path, flags: list[str], status: str, log: str) -> str:
    arch = flags[0].partition("=")[2]
    if "INVALID_OPTION" in status:
        major, minor = version()
        return (
            f"NVRTC {major}.{minor} does not compile for {arch}, or does not know one of its options ({log.strip() or status}): "
            f"a newer one is needed; {PACKAGES_HINT}"
        )
    errors = [line for line in log.splitlines() if "error" in line.lower()] or [status]
    return f"{source.name} does not compile for {arch}: {errors[0].strip()}\n{log.strip()}"


_FUNCTION = re.compile(r"(?:Compiling entry function '(?P<entry>[^']+)'|Function properties for (?P<name>\S+))")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_BARRIERS = re.compile(r"used (\d+) barriers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse_resources(log: str) -> dict[str, Resources]:
    """What `ptxas -v` said, per function; a function that is called, not inlined, has no register count of its own (0)."""
    found: dict[str, dict[str, int]] = {}
    entry = name = ""
    for line in log.splitlines():
        if match := _FUNCTION.search(line):
            entry = match["entry"] or entry
            name = match["name"] or entry
            found.setdefault(name, {})
        elif match := _STACK.search(line):
            stack, stores, loads = map(int, match.groups())
            found[name] |= {"stack_bytes": stack, "spill_store_bytes": stores, "spill_load_bytes": loads}
        elif match := _USED.search(line):
            found.setdefault(entry, {})["registers"] = int(match[1])
            for pattern, field in ((_BARRIERS, "barriers"), (_SHARED, "shared_bytes")):
                if more := pattern.search(line):
                    found[entry][field] = int(more[1])
    empty = {"registers": 0, "stack_bytes": 0, "spill_store_bytes": 0, "spill_load_bytes": 0}
    return {name: Resources(**(empty | values)) for name, values in found.items()}
