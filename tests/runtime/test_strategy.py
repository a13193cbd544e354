"""The exchange strategy: which kernels are tried, what their times lead to, and that trials leave nothing behind."""

from __future__ import annotations

import json
import logging
import os
import signal
import time

import pytest

from imex_persist import LLM, FaultError, SamplingParams, planner
from imex_persist.abi import Strategy
from imex_persist.device import sources
from imex_persist.runtime import strategy
from tests.bench.conftest import needs_linux
from tests.build.shapes import LLAMA_3_1_8B, LLAMA_3_2_1B
from tests.gpu.test_llm import CONFIG, save_model
from tests.runtime import groups

ONE, LOCAL, TWO = Strategy.ONE_SHOT, Strategy.ONE_SHOT_LOCAL, Strategy.TWO_SHOT


def maker(config, **sizes):
    return lambda **fixed: planner.make_shape(config, **{"max_model_len": 4096, "num_slots": 8, **sizes, **fixed})


def named(shapes) -> list[tuple[int, Strategy]]:
    return [(int(shape["one_shot_rows"]), Strategy(int(shape["strategy"]))) for shape in shapes]


def test_candidates_differ_in_how_they_exchange_only():
    make = maker(LLAMA_3_2_1B, world_size=2, max_rows=8)
    plan = make()
    shapes = strategy.candidates(plan, make)
    assert named(shapes) == [(1, LOCAL), (0, LOCAL), (1, TWO)]
    assert all(shape[name] == plan[name] for shape in shapes for name in ("down_slices", "symmetric_words", "num_pages"))
    wide = maker(
        LLAMA_3_1_8B, world_size=2, max_rows=8
    )  # where ONE_SHOT costs a ring stage it is tried for one row all the same
    assert named(strategy.candidates(wide(), wide)) == [(0, LOCAL), (1, LOCAL), (0, TWO)]
    assert make(one_shot_rows=1)["ring_stages"] <= make(one_shot_rows=0, strategy=LOCAL)["ring_stages"]


def test_candidates_have_the_plans_slices():
    """Which the planner would choose otherwise for another strategy."""
    make = maker(LLAMA_3_2_1B, world_size=2, max_rows=16, num_slots=16, machine=planner.Machine(memory_tb_s=4.8))
    plan = make()
    assert plan["down_slices"] > make(one_shot_rows=0, strategy=TWO)["down_slices"]
    assert len(strategy.candidates(plan, make)) >= 3


def test_candidates_of_one_row_of_one_rank_and_where_nothing_else_fits():
    one_row = maker(LLAMA_3_1_8B, world_size=2, max_rows=1)
    assert named(strategy.candidates(one_row(), one_row)) == [(1, LOCAL), (0, LOCAL), (0, TWO)]
    alone = maker(LLAMA_3_1_8B, max_rows=1)
    assert len(strategy.candidates(alone(), alone)) == 1

    def nothing(**_fixed):
        raise ValueError("no room")

    assert len(strategy.candidates(one_row(), nothing)) == 1


def test_no_two_candidates_do_the_same_at_the_rows_that_are_timed():
    """Or noise would choose between them. With one slot only steps of one row are timed."""
    make = maker(LLAMA_3_2_1B, world_size=2, max_rows=8, num_slots=1)
    assert strategy.timed_rows(make()) == [1]
    assert named(strategy.candidates(make(), make)) == [(1, LOCAL), (0, LOCAL)]


def test_the_plan_stays_unless_another_is_faster():
    shapes = ["plan", "a", "b"]
    assert strategy.choose(shapes, [{"1": 100.0, "8": 200.0}, {"1": 99.9, "8": 200.0}, {"1": 120.0, "8": 200.0}]) == "plan"
    assert strategy.choose(shapes, [{"1": 100.0, "8": 200.0}, {"1": 102.0, "8": 180.0}, {"1": 90.0, "8": 230.0}]) == "a"


# ------------------------------------------------------------------------------------------------ trials
def prepared(monkeypatch, problem: str = ""):
    """A group of fake workers with two kernels."""
    monkeypatch.setenv("FAKE_WORKER", problem)
    group = groups.open_group()
    group.open()
    shape = planner.make_shape(groups.CONFIG, world_size=2, num_slots=2, max_model_len=groups.MAX_MODEL_LEN)
    group.prepare([shape, shape.copy()], {}, groups.MAX_MODEL_LEN)
    return group, shape


@needs_linux
def test_trials_and_then_one_for_good(monkeypatch):
    group, shape = prepared(monkeypatch)
    try:
        for index in (0, 1, 0):
            with group.trial(index) as mailbox:
                times = strategy.step_us(group, mailbox, shape, groups.MAX_MODEL_LEN)
            assert set(times) == {"1"} and 4000 < times["1"] < 50_000, "a fake step takes 5 ms"
            assert group.mailbox is None and not any(group._mailbox_block.view), "what a trial wrote is still there"
        mailbox = group.start(1)
        assert mailbox.resident == 1 and group.shape is group._shapes[1]
    finally:
        group.close()


@needs_linux
def test_a_fault_during_a_trial_ends_the_group(monkeypatch):
    """With the kernel's own words, not those of whoever waited for tokens."""
    group, shape = prepared(monkeypatch, "0:fault")
    processes = groups.pids(group)
    with pytest.raises(FaultError, match=r"block 17 waited 2\.0 s"), group.trial(0) as mailbox:
        strategy.step_us(group, mailbox, shape, groups.MAX_MODEL_LEN)
    assert groups.all_gone(processes, 5), "a worker was left behind"


@needs_linux
def test_a_worker_that_dies_during_a_trial(monkeypatch):
    group, shape = prepared(monkeypatch)
    processes, began = groups.pids(group), time.monotonic()
    with pytest.raises(FaultError, match="rank 1 is gone: its process was killed"), group.trial(0) as mailbox:
        os.kill(processes[1], signal.SIGKILL)
        strategy.step_us(group, mailbox, shape, groups.MAX_MODEL_LEN)
    assert groups.all_gone(processes, 5) and time.monotonic() - began < 10


@needs_linux
def test_a_kernel_that_does_not_return_from_its_trial(monkeypatch):
    group, shape = prepared(monkeypatch, "1:deaf")
    processes = groups.pids(group)
    with pytest.raises(FaultError, match="does not return"), group.trial(0) as mailbox:
        strategy.step_us(group, mailbox, shape, groups.MAX_MODEL_LEN)
    assert groups.all_gone(processes, 5), "a worker was left behind"


# ------------------------------------------------------------------------------------------------ whole starts
@needs_linux
@pytest.mark.parametrize("device", ["sim", "sim:0"])
def test_a_start_measures_once(device, tmp_path, monkeypatch, caplog):
    """In the simulator, whose times mean nothing: every candidate decodes, and the one that stays gives the tokens of any other."""
    builds, cache = sources.cache_dir() / "sim", tmp_path / "cache"
    builds.mkdir(parents=True, exist_ok=True)
    cache.mkdir()
    (cache / "sim").symlink_to(builds)  # what was measured is new, what was built need not be
    monkeypatch.setenv("IMEX_CACHE", str(cache))
    monkeypatch.setattr(strategy, "TOKENS", 12)
    caplog.set_level(logging.INFO)
    folder, trials = save_model(tmp_path, CONFIG), []
    given = dict(device=device, tensor_parallel_size=2, max_model_len=128, max_rows=2, max_num_seqs=2)
    trial = groups.Group.trial
    monkeypatch.setattr(groups.Group, "trial", lambda group, index: trials.append(index) or trial(group, index))

    def tokens(exchange: str) -> list:
        with LLM(folder, **given, exchange=exchange) as llm:
            greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
            return [output.outputs[0].token_ids for output in llm.generate([[5, 6, 7], [9, 8]], greedy)]

    expected = tokens("PLANNED")
    assert not trials and "(planned)" in caplog.text
    assert tokens("MEASURED") == expected and sorted(set(trials)) == list(range(len(trials) // strategy.ROUNDS))
    assert caplog.text.count("exchange tried: ") == len(trials) // strategy.ROUNDS
    (kept,) = (cache / "exchange").rglob("us.json")
    assert all(set(times) == {"1", "2"} and min(times.values()) > 0 for times in json.loads(kept.read_text()))
    trials.clear()
    assert tokens("MEASURED") == expected and not trials and "(measured)" in caplog.text
    kept.write_text(kept.read_text()[:20])  # a disk was full
    assert tokens("MEASURED") == expected and trials and json.loads(kept.read_text())
    kept.unlink()
    monkeypatch.setattr(sources, "cache_is_writable", lambda: False)
    trials.clear()
    caplog.clear()
    assert tokens("MEASURED") == expected and not trials and "(planned)" in caplog.text
