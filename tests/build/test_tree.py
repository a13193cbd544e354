"""Rules of the tree that no formatter knows: `make lint` runs only this file of the tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from imex_persist import abi_render

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("imex_persist", "cuda_src", "tests", "examples", ".ci")
CODE = {".py", ".cu", ".cuh", ".cpp", ".h", ".hpp", ".S", ".sh"}
MAX_LINES = 400


def ours() -> list[Path]:
    return sorted(
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in CODE and "__pycache__" not in path.parts
    )


def kernel_files() -> list[Path]:
    """What both machines compile: cuda_src without the two bodies of the primitives."""
    source = ROOT / "cuda_src"
    return [path for path in ours() if path.is_relative_to(source) and path.relative_to(source).parts[0] not in ("sim", "cuda")]


def stripped(path: Path) -> str:
    """A C++ file without comments and string literals."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    return re.sub(r'"(?:\\.|[^"\\\n])*"', '""', text)


pytestmark = pytest.mark.skipif(not (ROOT / "cuda_src").is_dir(), reason="not in a checkout")


def test_the_rendered_header_is_current():
    assert (ROOT / "cuda_src" / "abi.cuh").read_text() == abi_render.render(), "cuda_src/abi.cuh is out of date: make abi"


def test_no_file_is_too_long():
    written = [path for path in ours() if path.name != "abi.cuh"]  # which is rendered: abi.py is read instead
    long = {str(path.relative_to(ROOT)): count for path in written if (count := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long, f"files of more than {MAX_LINES} lines: {long}"


def test_ptx_is_in_one_file():
    for path in ours():
        if path.suffix not in {".cu", ".cuh"} or path.is_relative_to(ROOT / "cuda_src" / "sim"):
            continue
        if path != ROOT / "cuda_src" / "cuda" / "primitives.cuh":
            assert not re.search(r"\basm\b", stripped(path)), (
                f"{path.relative_to(ROOT)} has asm: it belongs in cuda/primitives.cuh"
            )


def test_the_kernel_knows_no_machine():
    for path in kernel_files():
        text = stripped(path)
        if path.name not in {"primitives.cuh", "abi.cuh"}:
            found = re.search(
                r"__CUDA\w*|__shared__|__syncthreads|\b(threadIdx|blockIdx|blockDim)\b|\b__\w+_sync\b|\bIMEX_SIM\b", text
            )
            assert not found, f"{path.relative_to(ROOT)} uses {found[0]}: that is a primitive's business"
        assert not re.search(r"\bvolatile\b", text), f"{path.relative_to(ROOT)} has volatile: loads and stores are primitives"
