"""Tracing that is off costs nothing: the machine code is that of a kernel whose sources never heard of it."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest

from imex_persist import planner
from imex_persist.device import nvrtc, sources
from imex_persist.errors import DeviceError

from .disassembly import basic_blocks, nvdisasm
from .shapes import CASES, MACHINES

WITHOUT = """#pragma once
#include "block.cuh"
namespace imex {
DEV void mark(Block&, Mark, u32 = 0) {}
DEV void mark_clock(Block&, Mark) {}
DEV bool traced(u32) { return false; }
struct Sent {};
DEV void mark_sent(Block&, int, Sent&, const UnitNote&, bool) {}
DEV bool align_clocks(Block&) { return true; }
DEV bool plan_aligns(u32, bool, u32&) { return false; }
DEV u32 take_word_clocks(Block&) { return 0; }
DEV u32 take_tile_clocks(Block&) { return 0; }
}  // namespace imex
"""
# Which register holds a number, and how it gets there, is the compiler's whim; these are not.
MEANT = (
    "LD",
    "ST",
    "RED",
    "ATOM",
    "S2",
    "BAR",
    "SYNCS",
    "UBLKCP",
    "FENCE",
    "MEMBAR",
    "WARPSYNC",
    "VOTE",
    "SHFL",
    "HMMA",
    "CALL",
    "EXIT",
)

WHIM = 64  # instructions, of some 18,000: moves between registers, and what fills a line behind them


def opcodes(shape, arch: str) -> Counter:
    try:
        nvrtc.version()
    except DeviceError as error:
        pytest.skip(str(error))
    build = nvrtc.compile_kernel(shape, arch)
    tool = nvdisasm()
    if tool is None:
        pytest.skip("nvdisasm was not found: the wheel nvidia-cuda-nvdisasm has it")
    return Counter(opcode for block in basic_blocks(build.cubin, tool) for opcode in block)


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_off_is_as_if_it_were_not_there(case, monkeypatch, tmp_path):
    arch = "sm_90a"
    shape, rows = case.shape(arch)
    on = planner.make_shape(case.config, world_size=case.world_size, max_rows=rows, machine=MACHINES[arch], trace=8192)
    off, traced = opcodes(shape, arch), opcodes(on, arch)
    folder = tmp_path / "cuda_src"
    shutil.copytree(sources.cuda_src(), folder)
    (folder / "trace.cuh").write_text(WITHOUT)
    monkeypatch.setattr(sources, "cuda_src", lambda: folder)
    without = opcodes(shape, arch)

    def meant(found: Counter) -> dict[str, int]:
        return {opcode: count for opcode, count in found.items() if opcode.startswith(MEANT)}

    assert abs(off.total() - without.total()) <= WHIM
    assert meant(off) == meant(without)
    assert meant(traced) != meant(without)
