"""The exchange between two GPUs, a process each: checked bit for bit by the benchmark itself."""

from __future__ import annotations

import json

import pytest

from imex_persist.cli import main
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
    fp32 = [row["error"] for row in r["rows"] if "error" in row and "float24" not in row["variant"]]
    assert max(fp32) < 1e-6


def test_floor(capsys, record_property):
    assert main(["bench", "floor", "--device", "cuda", "--tp", "2", "--json"]) == 0
    r = json.loads(capsys.readouterr().out)
    (pair,) = r["peers_one_way"]
    record_property("one way by a tagged word, µs", f"{pair['us']:.2f}")
    assert pair["pair"] == [0, 1] and 0.2 < pair["us"] < 50 and len(r["read"]["tb_s"]) == 2
