"""Every subcommand in the simulator, whose times mean nothing: that each ends, measures what it says, and sets it beside its bound."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress

import pytest

from imex_persist.bench.peers.run import run_limited
from imex_persist.cli import main
from imex_persist.llm import LLM

from .conftest import needs_linux

SIM = ("--device", "sim", "--load-format", "dummy")
pytestmark = needs_linux


@pytest.mark.parametrize("device", ["sim", "sim:0"])
def test_floor(bench, device):
    r = bench("floor", "--device", device, "--tp", "2")
    assert set(r["read"]["tb_s"]) == {"0", "1"} and all(rate > 0 for rate in r["read"]["tb_s"].values())
    assert [row["words"] for row in r["gather"]] == [1024, 4096, 8192, 16384]
    assert r["gather"][-1]["us"] > r["gather"][0]["us"] > 0 and r["barrier_us"] > 0
    assert [row["pair"] for row in r["peers_one_way"]] == [[0, 1]] and r["peers_one_way"][0]["us"] > 0
    assert 0 < r["doorbell"]["min_us"] <= r["doorbell"]["median_us"]


@pytest.mark.parametrize(("device", "world"), [("sim", 2), ("sim:0", 3)])
def test_exchange(bench, device, world):
    r = bench("exchange", "--device", device, "--tp", str(world), *"--sizes 96,192,576 --hidden-size 192".split())
    names = {row["variant"] for row in r["rows"]}
    assert names >= {"ONE_SHOT", "ONE_SHOT_LOCAL", "TWO_SHOT", "SEMAPHORE", "all-gather", "ONE_SHOT float24"}
    for name in names:
        rows = [row for row in r["rows"] if row["variant"] == name]
        assert [(row["values"], row["rows"]) for row in rows] == [(96, 1), (192, 1), (576, 3)]
        assert all(row["us"] > 0 and row["bound_us"] > 0 for row in rows)


def test_decode(bench, model):
    words = "--tp 2 --context 16,4 --rows 1,3 --steps 8 --n-prompt 5".split()
    r = bench("decode", model, *SIM, *words)
    assert [(row["test"], row["rows"]) for row in r["rows"]] == [
        ("pp5", 1),
        ("tg8 @ d4", 1),
        ("tg8 @ d16", 1),
        ("tg8 @ d4", 3),
        ("tg8 @ d16", 3),
    ]
    assert r["kernel"]["max_rows"] == 3 and r["rows"][0]["steps"] == 2
    for row in r["rows"]:
        assert row["us"] > row["bound_us"] > 0 and row["ratio"] == pytest.approx(row["us"] / row["bound_us"])
    assert [row["steps"] for row in r["rows"][1:]] == [8] * 4
    one, three = r["rows"][2], r["rows"][4]
    kv = 2 * 2 * 1 * 32 * 2  # layers, k and v, heads of a rank, head size, bytes
    more, all_at_once = three["bytes"] - one["bytes"], (2 * (16 + 4) + 1) * kv + 2 * 2 * 64
    assert 2 * 2 * kv < more <= all_at_once + 3 * 3 * kv  # where the machine is busy the others may come some tokens late


def test_peers_that_are_not_run_are_named(bench, capsys, model):
    r = bench("decode", model, *SIM, *"--context 2 --steps 2 --n-prompt 0 --peers".split())
    names = {peer["name"]: peer["why_not"] for peer in r["peers"]}
    assert set(names) == {"torch.compile, CUDA graphs", "torch, hand-captured CUDA graph", "torch prefill, CUDA graph", "vLLM"}
    assert all("not installed" in why or "needs a GPU" in why for why in names.values())
    assert main(["bench", "exchange", "--device", "sim", "--sizes", "64", "--peers"]) == 0
    out = capsys.readouterr().out
    for name in ("NCCL in a CUDA graph", "torch symmetric memory, one-shot", "vLLM custom all-reduce", "FlashInfer all-reduce"):
        assert f"{name} was not run: " in out


def test_a_peer_that_hangs_or_fails_costs_its_time_only():
    python = [sys.executable, "-c"]
    assert run_limited([*python, "pass"], os.environ, 20) is None
    assert "exit code 3: last words" in run_limited([*python, "print('last words'); import sys; sys.exit(3)"], os.environ, 20)
    began = time.monotonic()
    hangs = "import subprocess; subprocess.Popen(['sleep', '300']); import time; time.sleep(300)"
    assert "did not end in 1 s" in run_limited([*python, hangs], os.environ, 1)
    assert time.monotonic() - began < 20


def test_latency(bench, model, tmp_path):
    out = tmp_path / "latency.json"
    words = f"--input-len 8 --output-len 4 --batch-size 2 --num-iters 3 --num-iters-warmup 1 --output-json {out}".split()
    r = bench("latency", model, *SIM, *words)
    assert len(r["latencies"]) == 3 and r["avg_latency"] == pytest.approx(sum(r["latencies"]) / 3)
    assert set(r["percentiles"]) == {"10", "25", "50", "75", "90", "99"} and r["avg_latency"] > r["bound"] > 0
    assert json.loads(out.read_text()) == r


def test_latency_computes_every_prompt(bench, model, monkeypatch):
    cached, generate = [], LLM.generate

    def spied(*args):
        outputs = generate(*args)
        cached.extend(output.num_cached_tokens for output in outputs)
        return outputs

    monkeypatch.setattr(LLM, "generate", spied)
    bench("latency", model, *SIM, *"--input-len 130 --output-len 2 --num-iters 2 --num-iters-warmup 1".split())
    assert cached == [0, 0, 0]


def test_doorbell(bench, model):
    r = bench("doorbell", model, *SIM)
    assert r["noop"]["count"] == 20 and 0 < r["noop"]["min_us"] <= r["noop"]["median_us"] <= r["noop"]["p99_us"]
    assert r["first_token_beyond_us"] == pytest.approx(r["first_token_us"] - r["step_us"])
    assert 0 < r["first_token_ack_us"] <= r["first_token_us"] and r["first_token_device_beyond_us"] < r["first_token_beyond_us"]


def test_tables_say_that_it_was_simulated(capsys, model):
    for words in (
        ["floor", "--device", "sim"],
        ["exchange", "--device", "sim", "--sizes", "64"],
        ["decode", model, *SIM, *"--context 2 --steps 2 --n-prompt 0".split()],
        ["latency", model, *SIM, *"--input-len 2 --output-len 2 --num-iters 1 --num-iters-warmup 0".split()],
        ["doorbell", model, *SIM],
    ):
        assert main(["bench", *words]) == 0
        out = capsys.readouterr().out
        assert "say nothing about a GPU" in out
        assert ("virtual" in out) == (words[0] not in ("floor", "exchange"))  # those have kernels of their own, by wall time


def test_no_ratio_of_virtual_time(capsys, model):
    """One place in the simulator counts turns of its scheduler, the floor is of wall time; two places are of wall time as well."""
    for world in (1, 2):
        words = f"--context 2 --steps 2 --n-prompt 0 --tp {world}".split()
        assert main(["bench", "decode", model, *SIM, *words]) == 0
        out = capsys.readouterr().out
        (line,) = [line.split() for line in out.splitlines() if line.startswith(" tg2 @ d2")]
        assert (line[6] == "–") == ("ratio to the floor means nothing" in out) == (world == 1)


def test_a_table_is_printed_though_no_file_can_be_written(capsys, model, tmp_path):
    words = f"--context 2 --steps 2 --n-prompt 0 --output-json {tmp_path / ('x' * 300)}".split()
    with suppress(OSError):
        assert main(["bench", "decode", model, *SIM, *words]) != 0
    assert "tg2 @ d2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["decode", "x", "--steps", "1"], "--steps is 1: at least 2"),
        (["decode", "x", "--rows", "0"], "at least one number above 0"),
        (["decode", "x", "--rows", "8", "--max-rows", "2"], "max_rows is 2 but --rows has 8"),
        (["decode", "x", *SIM, "--max-model-len", "64"], "bench decode chooses max_model_len"),
        (["decode", "x", *SIM, "--max-num-seqs", "4"], "leave out --max-num-seqs"),
        (["decode", "x", *SIM, "--kv-cache-memory-bytes", "99999"], "leave out --kv-cache-memory-bytes"),
        (["latency", "x", *SIM, "--max-model-len", "64"], "bench latency chooses max_model_len"),
        (["latency", "x", *SIM, "--enable-prefix-caching"], "leave out --enable-prefix-caching"),
        (["doorbell", "x", *SIM, "--max-rows", "4"], "bench doorbell chooses max_rows"),
        (["latency", "x", "--batch-size", "0"], "--batch-size is 0: at least 1"),
        (["decode", "--device", "sim"], "no model was given"),
        (["exchange", "--device", "sim", "--tp", "1"], "an exchange needs two ranks"),
        (["exchange", "--device", "sim", "--sizes", "500"], "500 values are no exchange"),
        (["exchange", "--device", "sim", "--sizes", "0"], "--sizes needs at least one number above 0"),
        (["exchange", "--device", "sim", "--hidden-size", "0"], "--hidden-size is 0: at least 32"),
        (["exchange", "--device", "sim", "--hidden-size", "-32"], "--hidden-size is -32: at least 32"),
        (
            ["floor", "--device", "sim", "--output-json", "/nowhere/x.json"],
            "--output-json is '/nowhere/x.json': /nowhere is no folder",
        ),
        (["decode", "x", *SIM, "--output-json", "/"], "that is a folder"),
        (["floor", "--device", "sim:0", "--tp", "9"], "tensor_parallel_size is 9"),
    ],
)
def test_bad_input_is_a_sentence(capsys, words, says):
    assert main(["bench", *words]) == 2
    assert says in capsys.readouterr().err
