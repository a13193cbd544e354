"""Traces of a GPU: two ranks in one launch, their clocks aligned by words, and planted delays that the critical path must name.

`TEST_DEVICE=sim pytest --noconftest tests/gpu/test_trace.py` runs it in the simulator, to test the tests.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from imex_persist import abi, planner
from imex_persist.abi import Phase
from imex_persist.device import nvrtc
from imex_persist.device.sim import SimDevice
from imex_persist.model.config import ModelConfig
from imex_persist.observe.capture import clocks_of
from imex_persist.observe.clocks import TIMER_WRAP, signed
from imex_persist.observe.hops import hop_check
from imex_persist.observe.report import decode_steps, report
from imex_persist.observe.spans import Trace, decode
from tests.gpu.bench import capable_gpus
from tests.observe.traced import AXIS, TracedRun

SIMULATED = os.environ.get("TEST_DEVICE") == "sim"
CONFIG = ModelConfig(
    hidden_size=256 if SIMULATED else 1024, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
    intermediate_size=512 if SIMULATED else 4096, vocab_size=1000, tie_word_embeddings=True,
)  # fmt: skip
WORLD, BLOCKS = 2, 4 if SIMULATED else 64
REQUEST = [{"prompt": [5, 9, 2], "max_tokens": 16 if SIMULATED else 200}]
DELAY_NS = 60_000
LATE = [(1, 2, Phase.O_PROJ, 1), (0, 3, Phase.DOWN_PROJ, 2), (1, 0, Phase.GATE_UP, 0)]  # rank, block, phase, layer
TRACE = 1 << 15
EXCHANGES = {
    "ONE_SHOT": {},
    "ONE_SHOT_LOCAL": {"strategy": abi.Strategy.ONE_SHOT_LOCAL, "one_shot_rows": 0},
    "TWO_SHOT": {"strategy": abi.Strategy.TWO_SHOT, "one_shot_rows": 0},
}


def open_device(delay: str, folder: Path):
    if SIMULATED:
        return SimDevice(1, BLOCKS, defines=(f"IMEX_PLANTED_DELAY={delay}",) if delay else ())
    from imex_persist.device.cuda import CudaDevice

    class Delayed(CudaDevice):
        """Compiles the kernel with a planted delay."""

        def load(self, shape, **options):
            return super().load(shape, source=source_of(delay, folder), **options)

    return Delayed(capable_gpus()[0][0])


def source_of(delay: str, folder: Path) -> Path | None:
    """A kernel with a planted delay; None: the usual one."""
    if not delay:
        return None
    source = folder / f"delayed{''.join(c if c.isdigit() else '_' for c in delay)}.cu"
    source.write_text(f'#define IMEX_PLANTED_DELAY {delay}\n#include "decode.cu"\n')
    return source


def shape_on(machine, exchange: str, trace: int) -> np.void:
    machine = replace(machine, num_blocks=min(BLOCKS, machine.num_blocks // (1 if SIMULATED else WORLD)))
    return planner.make_shape(
        CONFIG, world_size=WORLD, max_rows=1, max_model_len=256, machine=machine, trace=trace, **EXCHANGES[exchange]
    )


@lru_cache
def traced(folder: Path, exchange: str = "ONE_SHOT", delay: str = "", trace: int = TRACE) -> tuple[list, Trace | None, list]:
    """(tokens, trace, records) of a run on a device of its own; nothing of it stays on the GPU."""
    device = open_device(delay, folder)
    shape = shape_on(device.machine, exchange, trace)
    try:
        kernel = TracedRun(device, shape, CONFIG)
        tokens = kernel.decode(REQUEST)
        if not trace:
            return tokens, None, kernel.records
        events, alignments, reader = kernel.fetch()
    finally:
        if not SIMULATED:
            device.close()
    assert not reader.lost
    clocks = clocks_of([(events, alignments)], shape, one_clock=False)
    return tokens, decode(events, shape, AXIS, clocks), kernel.records


def delay_of(rank: int, block: int, phase: Phase, layer: int) -> str:
    return f"{{{rank}, {block}, {int(phase)}, {layer}, {DELAY_NS}}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For the kernels' sources. On a GPU all of them are compiled first, side by side."""
    folder = tmp_path_factory.mktemp("kernel")
    if not SIMULATED:
        device = open_device("", folder)
        arch, shapes = device.arch, {exchange: shape_on(device.machine, exchange, TRACE) for exchange in EXCHANGES}
        device.close()
        builds = [
            (shape, source_of(delay, folder))
            for shape in shapes.values()
            for delay in ("", *(delay_of(*late) for late in LATE))
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda build: nvrtc.compile_kernel(build[0], arch, build[1]), builds))
    return folder


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_no_word_is_seen_before_it_left(folder, exchange):
    """The check that failed where clocks were interpolated over a whole step, or over four."""
    _, trace, _ = traced(folder, exchange)
    hops, e = hop_check(trace), trace.errors
    print(f"{exchange}: {e}, {hops}")
    assert hops["contradictions"] == 0 and hops["checked"] > 100
    assert e.blocks < 3 and 0 < e.ranks < 3  # µs; half round trips through L2 are in them
    if not SIMULATED:  # a hop takes 0.3 µs at least, so one that seems to take none shows an error that is not stated
        assert min(hops["shortest_local_us"], hops["shortest_peers_us"]) > 0.2 - e.blocks - e.ranks - e.drift
        assert e.drift < 1


def test_phases_follow_each_other_and_end_before_their_records(folder):
    _, trace, records = traced(folder)
    for step in trace.steps:
        table = trace.table(step)
        assert np.all(table["end"] >= table["begin"])
        assert np.all(table["begin"][..., 1:] >= table["end"][..., :-1])
    tokens = [int(r["time_ns"]) for r in records if r["kind"] == abi.Record.TOKEN]
    late_us = trace.errors.timer + 2.0
    ends = [float(trace.table(step)["end"][0, 0, -1]) for step in decode_steps(trace).steps]
    assert len(tokens) <= len(ends)
    for token, end in zip(tokens, ends, strict=False):
        since = signed(token - trace.origin_ns, TIMER_WRAP)
        assert end - late_us < since / 1e3 and (SIMULATED or since / 1e3 < end + 50.0)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(("rank", "block", "phase", "layer"), LATE)
def test_a_planted_delay_is_named(folder, exchange, rank, block, phase, layer):
    _, trace, _ = traced(folder, exchange, delay_of(rank, block, phase, layer))
    numbers = report(trace)
    worst = numbers["critical_path"]["suspects"][0]
    assert (worst["rank"], worst["block"], worst["phase"], worst["worst_layer"]) == (rank, block, phase.name.lower(), layer)
    assert worst["worst_us"] == pytest.approx(DELAY_NS / 1e3, rel=0.3)
    assert worst["excess_us"] == pytest.approx(DELAY_NS / 1e3, rel=0.3)


def test_tracing_changes_no_token(folder):
    assert traced(folder)[0] == traced(folder, trace=0)[0]
