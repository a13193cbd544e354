"""The self-test: through the real runtime in the simulator, and what it says when something is wrong."""

from __future__ import annotations

import json
import re
import sys

import pytest

from imex_persist import DeviceError, abi, planner
from imex_persist.cli import main
from imex_persist.front import doctor
from imex_persist.model.config import ModelConfig
from imex_persist.runtime.discover import Gpu

SIM = ["doctor", "--device", "sim", "--tp", "2"]
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="worker processes share memory through /proc")


@needs_linux
def test_the_simulator_passes(capsys):
    assert main(SIM) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[:4] == [
        "[imex] world size: 2, rank: 0",
        "[imex] world size: 2, rank: 1",
        "[imex] topology: simulated",
        "[imex] exchange: ENABLED (in-kernel, tagged words)",
    ]
    assert re.fullmatch(r"\[imex\] all-reduce strategy: ONE_SHOT <= \d+ KB, ONE_SHOT_LOCAL above \(planned\)", lines[4])
    assert re.fullmatch(r"\[imex\] kernel: resident, \d+ blocks, sim", lines[5])
    checks = [line.removeprefix("[imex] check: ") for line in lines[6:-2]]
    assert [check.split(":")[0] for check in checks] == [
        "write and verify",
        "exchange ONE_SHOT",
        "exchange ONE_SHOT_LOCAL",
        "decode step",
        "exchange TWO_SHOT",
        "exchange SEMAPHORE",
    ]
    assert all(": ok (" in check for check in checks)
    assert "nvidia-imex" in lines[-2] and lines[-1].startswith(
        "[imex] IMEX is active: 2 ranks exchange inside the kernel in the simulator"
    )
    assert [line.split(";")[0] for line in err.splitlines()] == [
        f"[imex] doctor: a start with the exchange {name}" for name in ("as planned", "TWO_SHOT", "SEMAPHORE")
    ]


@needs_linux
def test_wrong_tokens_are_found(capsys, monkeypatch):
    import imex_persist.model.reference as reference

    real = reference.logits
    monkeypatch.setattr(reference, "logits", lambda *args, **options: -real(*args, **options))
    assert main([*SIM, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["active"] and "exchange ONE_SHOT' failed, token " in report["verdict"]
    assert "report this" in report["verdict"] and [check["ok"] for check in report["checks"]] == [True, False, False, False]


@needs_linux
def test_one_rank_is_not_active(capsys):
    assert main(["doctor", "--device", "sim", "--tp", "1"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("one rank has nobody to exchange with: use --tp 2 or more")


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        ([], "no GPU was found"),
        ([Gpu(0, "GPU-0", "NVIDIA A100", (8, 0))], "NVIDIA A100 with compute capability 8.0 cannot run the kernel"),
    ],
)
def test_without_a_capable_gpu(capsys, monkeypatch, gpus, words):
    monkeypatch.setattr(doctor, "find_gpus", lambda: gpus)
    assert main(["doctor"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("[imex] IMEX is not active: ") and words in last and "doctor --device sim" in last


def test_a_machine_that_cannot_start_is_a_finding(capsys, monkeypatch):
    def fail(*_args, **_options):
        raise DeviceError("what rank 1 wrote did not arrive in rank 0's memory: peer access does not work")

    monkeypatch.setattr("imex_persist.LLM", fail, raising=False)
    assert main(SIM) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[imex] check: start: FAILED (DeviceError)"
    assert (
        lines[-1] == "[imex] IMEX is not active: what rank 1 wrote did not arrive in rank 0's memory: peer access does not work"
    )


def test_p2p_level_is_a_finding_too(capsys, monkeypatch):
    monkeypatch.setenv("NCCL_P2P_LEVEL", "LOC")
    assert main(SIM) == 1
    assert "IMEX is not active: p2p_level is LOC" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--device", "tpu"], ["--tp", "9"], ["--tp", "x"], ["--max-rows", "2"]])
def test_bad_input(capsys, arguments):
    assert main(["doctor", *arguments]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("machine", [planner.Machine(), planner.Machine(num_blocks=4), planner.Machine(num_blocks=16)])
def test_the_model_tries_every_strategy_on_any_number_of_ranks(machine):
    config = ModelConfig.from_dict(doctor.MODEL)
    for world in range(2, abi.MAX_RANKS + 1):
        tried = set()
        for strategy in (None, *abi.Strategy):
            sizes = dict(world_size=world, max_rows=doctor.ROWS, max_model_len=64, machine=machine)
            used = doctor.strategies(planner.make_shape(config, strategy=strategy, **sizes))
            assert strategy is not None or len(used) == 2
            assert strategy is None or strategy.name in used
            tried |= set(used)
        assert tried == {strategy.name for strategy in abi.Strategy}


def test_the_service_is_kept_apart(monkeypatch):
    monkeypatch.setattr(doctor, "_service_runs", lambda: True)
    assert "it runs here" in doctor.service_line() and "neither needs nor uses it" in doctor.service_line()
