"""The benchmark on one GPU: figures that a GPU of this kind can have, and no more memory than is promised."""

from __future__ import annotations

import json

import pytest

from imex_persist.cli import main
from imex_persist.front.cards import choose_card
from imex_persist.runtime.discover import find_gpus

from .bench import capable_gpus


@pytest.fixture
def one_gpu() -> str:
    return f"cuda:{capable_gpus()[0][0]}"


def bench(capsys, *words: str) -> dict:
    assert main(["bench", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_floor(capsys, one_gpu, record_property):
    r = bench(capsys, "floor", "--device", one_gpu)
    card, _ = choose_card(None, find_gpus())
    found = r["read"]["tb_s"]["0"]
    record_property("read ceiling, TB/s", f"{found:.3f}")
    record_property("barrier, µs", f"{r['barrier_us']:.2f}")
    record_property("CPU -> GPU -> CPU, µs", f"{r['doorbell']['median_us']:.2f}")
    assert 0.5 * card.datasheet_tb_s < found < 1.02 * card.datasheet_tb_s
    assert 0.2 < r["barrier_us"] < 20 and 0.5 < r["doorbell"]["median_us"] < 100
    assert all(0.2 < row["us"] < 100 for row in r["gather"])


def test_decode(capsys, one_gpu, record_property):
    words = "--context 128 --rows 1 --steps 200 --n-prompt 64".split()
    r = bench(capsys, "decode", "llama-3.2-1b", "--device", one_gpu, *words)
    prompt, step = r["rows"]
    record_property("Llama-3.2-1B shapes, one row, ms", f"{step['us'] / 1e3:.4f} ({step['ratio']:.3f} of the floor)")
    assert 0.97 < step["ratio"] < 3 and step["bytes"] == pytest.approx(2.48e9, rel=0.01)
    assert step["host_us"] == pytest.approx(step["us"], rel=0.1)
    assert prompt["us"] > prompt["bound_us"] and r["busy"], "no clocks were read while it ran"


def test_doorbell(capsys, one_gpu, record_property):
    r = bench(capsys, "doorbell", "llama-3.2-1b", "--device", one_gpu)
    record_property("no-op descriptor, µs", f"{r['noop']['median_us']:.2f}")
    record_property("first token of an idle kernel beyond its step, µs", f"{r['first_token_beyond_us']:.1f}")
    assert r["noop"]["median_us"] < 20 and r["first_token_beyond_us"] < 100
