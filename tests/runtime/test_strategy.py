"""The exchange strategy: what measured times lead to, that they are measured once, and what a plan makes of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from imex_persist import planner
from imex_persist.abi import Strategy
from imex_persist.model.config import ModelConfig
from imex_persist.runtime import strategy
from imex_persist.runtime.group import Group
from imex_persist.runtime.placement import place_ranks
from imex_persist.runtime.strategy import Choice, choose, replan, rows_to_try
from tests.bench.conftest import needs_linux
from tests.build.shapes import LLAMA_3_1_8B

ONE, LOCAL, TWO = Strategy.ONE_SHOT, Strategy.ONE_SHOT_LOCAL, Strategy.TWO_SHOT


def test_one_shot_as_far_as_nothing_is_faster():
    times = {ONE: {1: 1.0, 2: 2.0, 4: 4.0}, LOCAL: {1: 1.5, 2: 1.99, 4: 2.5}, TWO: {1: 2.0, 2: 2.1, 4: 2.4}}
    assert choose(times) == Choice(2, TWO)  # 2.0 against 1.99 is a tie; above, only four rows count
    times[ONE][1] = 1.6
    assert choose(times) == Choice(0, LOCAL)  # over all rows LOCAL takes less
    times[ONE] = {1: 0.9}  # more rows did not fit
    assert choose(times) == Choice(1, LOCAL)


def test_rows_to_try():
    assert rows_to_try(1) == [1] and rows_to_try(8) == [1, 2, 4, 8] and rows_to_try(6) == [1, 2, 4, 6]


def test_a_choice_costs_the_plan_no_ring_stage():
    """The residual of eight rows in every block would take half of the ring of Llama-3.1-8B on two ranks."""
    sizes = {"world_size": 2, "max_rows": 8, "max_model_len": 4096}
    plan = planner.make_shape(LLAMA_3_1_8B, **sizes)

    def make(choice: Choice) -> np.void:
        return planner.make_shape(LLAMA_3_1_8B, **sizes, one_shot_rows=choice.one_shot_rows, strategy=choice.strategy)

    shape = replan(Choice(8, TWO), plan, make)
    assert shape["strategy"] == TWO and shape["ring_stages"] == plan["ring_stages"] and shape["one_shot_rows"] < 8
    assert make(Choice(int(shape["one_shot_rows"]) + 1, TWO))["ring_stages"] < plan["ring_stages"]
    assert replan(Choice(1, LOCAL), plan, lambda choice: make(Choice(8, LOCAL))) is plan


def test_every_row_count_of_one_shot_is_measured_for_the_others(monkeypatch):
    """Hidden size 8192: fewer rows fit ONE_SHOT's residual than a step may have."""
    machine = planner.Machine()
    plan = np.zeros((), planner.abi.Shape)
    for name, value in {"hidden_size": 8192, "world_size": 2, "max_rows": 7, "down_slices": 2}.items():
        plan[name] = value

    class Fake:
        def build_bench_kernels(self, source, shapes):
            self.rows = [int(shape["max_rows"]) for shape in shapes]

        def bench_kernel(self, source, shape):
            return lambda job: {0: 1000 * job["rows"], 1: 900}

    group = Fake()
    times = strategy.measure(group, plan, machine)
    assert group.rows[0] < 7 and group.rows[1:] == [7, 7]
    assert list(times[LOCAL]) == [1, 2, 4, 7] and set(times[ONE]) < set(times[LOCAL])
    assert choose(times).one_shot_rows == max(times[ONE])


@needs_linux
@pytest.mark.parametrize("device", ["sim", "sim:0"])
def test_the_workers_measure_once(device, tmp_path, monkeypatch):
    """In the simulator, whose times mean nothing: every strategy at every number of rows, then from the cache."""
    monkeypatch.setenv("IMEX_CACHE", str(tmp_path))
    config = ModelConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=96, vocab_size=64
    )
    group = Group(place_ranks(device, 2), deadline_s=20.0)
    try:
        machine = group.open()[0]
        plan = planner.make_shape(config, world_size=2, max_rows=3, machine=machine)
        first = strategy.measured_choice(group, plan, machine)
        (kept,) = (tmp_path / "exchange").rglob("us.json")
        times = json.loads(kept.read_text())
        assert set(times) == {"ONE_SHOT", "ONE_SHOT_LOCAL", "TWO_SHOT"}
        assert all(set(rows) == {"1", "2", "3"} and min(rows.values()) > 0 for rows in times.values())
        monkeypatch.setattr(strategy, "measure", lambda *_: pytest.fail("measured twice"))
        assert strategy.measured_choice(group, plan, machine) == first
    finally:
        group.close()
