"""The exchange between two GPUs, a process each: checked bit for bit by the benchmark itself."""

from __future__ import annotations

import json
import time

import pytest

from imex_persist import planner
from imex_persist.cli import main
from imex_persist.runtime import strategy
from imex_persist.runtime.group import Group
from imex_persist.runtime.placement import place_ranks
from tests.build.shapes import LLAMA_3_1_8B, LLAMA_3_2_1B
from tests.gpu.test_llm import SIMULATED

pytestmark = pytest.mark.skipif(SIMULATED, reason="the simulator's times mean nothing, and tests/bench has it")


def test_exchange(capsys, record_property):
    words = "--device cuda --tp 2 --sizes 512,2048,4096,8192 --hidden-size 4096 --json".split()
    assert main(["bench", "exchange", *words]) == 0
    r = json.loads(capsys.readouterr().out)
    for row in r["rows"]:
        assert "us" in row, row
        record_property(f"{row['variant']}, {row['values']} values, µs", f"{row['us']:.2f} (floor {row['bound_us']:.2f})")
        assert 0.3 < row["us"] < 200
    fp32 = [row["error"] for row in r["rows"] if "error" in row and "bf16" not in row["variant"]]
    assert max(fp32) < 1e-6


def test_floor(capsys, record_property):
    assert main(["bench", "floor", "--device", "cuda", "--tp", "2", "--json"]) == 0
    r = json.loads(capsys.readouterr().out)
    (pair,) = r["peers_one_way"]
    record_property("one way by a tagged word, µs", f"{pair['us']:.2f}")
    assert pair["pair"] == [0, 1] and 0.2 < pair["us"] < 50 and len(r["read"]["tb_s"]) == 2


@pytest.mark.parametrize("config", [LLAMA_3_2_1B, LLAMA_3_1_8B], ids=["1b", "8b"])
def test_the_strategy_is_measured_in_a_second(config, record_property):
    """Once its kernels are built, which the first measurement does."""
    group = Group(place_ranks("cuda", 2), deadline_s=2.0)
    try:
        machine = group.open()[0]
        plan = planner.make_shape(config, world_size=2, max_rows=8, max_model_len=4096, machine=machine)
        strategy.measure(group, plan, machine)
        began = time.monotonic()
        times = strategy.measure(group, plan, machine)
        seconds = time.monotonic() - began
    finally:
        group.close()
    for name, by_rows in times.items():
        record_property(
            f"{name.name}, µs by rows of {config.hidden_size}", {rows: round(us, 2) for rows, us in by_rows.items()}
        )
    record_property("chosen", strategy.choose(times))
    record_property("measured in, s", f"{seconds:.2f}")
    assert seconds < 1.0 and all(0.3 < us < 200 for by_rows in times.values() for us in by_rows.values())
