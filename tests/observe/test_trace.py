"""Traces of the simulated kernel against what is known otherwise: record times, planted delays, packed sizes, moved clocks."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from imex_persist import abi
from imex_persist.abi import Phase
from imex_persist.model.packing import rank_bytes
from imex_persist.observe.clocks import SharedClock
from imex_persist.observe.path import critical_path
from imex_persist.observe.report import decode_steps, distribution, phase_bytes, report
from imex_persist.observe.ring import RingReader
from imex_persist.observe.spans import decode, num_phases, pairs_of

from .traced import AXIS, CONFIG, REQUESTS, run, trace_of

EXCHANGES = (
    {},
    {"strategy": abi.Strategy.ONE_SHOT_LOCAL, "one_shot_rows": 0},
    {"strategy": abi.Strategy.TWO_SHOT, "one_shot_rows": 0},
    {"strategy": abi.Strategy.ONE_SHOT, "down_slices": 2},
)


@lru_cache
def traced(exchange: int = 0, delay: str = "", world: int = 2):
    return run(world=world, delay=delay, **EXCHANGES[exchange])


@pytest.mark.parametrize("exchange", range(len(EXCHANGES)))
def test_every_block_has_every_span_in_order(exchange):
    trace = trace_of(traced(exchange))
    assert not trace.lost and trace.steps == list(range(len(trace.steps)))
    assert len(trace.spans) == len(trace.steps) * 2 * 4 * num_phases(trace.shape)
    for step in trace.steps:
        table = trace.table(step)
        assert np.all(table["order"] == np.arange(num_phases(trace.shape)))
        assert np.all(table["end"] >= table["begin"])
        assert np.all(np.diff(table["begin"], axis=-1) >= 0)
        assert np.all(table["begin"][..., 1:] >= table["end"][..., :-1])


def test_times_are_the_records_times():
    """A token is published after its step's end on rank 0's block 0, by a mailbox that may be late."""
    kernel = traced()
    trace = trace_of(kernel)
    tokens = [int(r["time_ns"]) for r in kernel.records if r["kind"] == abi.Record.TOKEN]
    ends = [float(trace.table(step)["end"][0, 0, -1]) * 1e3 + trace.origin_ns for step in decode_steps(trace).steps]
    latest = [*ends[2:], np.inf, np.inf]  # the mailbox is a warp like others: it may look two steps late
    for token, end, late in zip(tokens, ends, latest, strict=True):
        assert end - 10 <= token < late


@pytest.mark.parametrize("exchange", range(len(EXCHANGES)))
def test_paths_sum_up(exchange):
    trace = trace_of(traced(exchange))
    for step in trace.steps:
        path = critical_path(trace, step)
        assert sum(s.us for s in path.segments) == pytest.approx(path.us)
        assert path.end_us == trace.table(step)["end"][0, 0, -1]
        for a, b in zip(path.segments, path.segments[1:], strict=False):
            assert a.end_us == pytest.approx(b.begin_us)


@pytest.mark.parametrize("exchange", range(len(EXCHANGES)))
@pytest.mark.parametrize(
    ("rank", "block", "phase", "layer"), [(1, 2, Phase.O_PROJ, 1), (0, 3, Phase.DOWN_PROJ, 2), (1, 0, Phase.GATE_UP, 0)]
)
def test_a_planted_delay_is_named(exchange, rank, block, phase, layer):
    numbers = report(trace_of(traced(exchange, f"{{{rank}, {block}, {int(phase)}, {layer}, 60000}}")))
    worst = numbers["critical_path"]["suspects"][0]
    assert (worst["rank"], worst["block"], worst["phase"], worst["worst_layer"]) == (rank, block, phase.name.lower(), layer)
    assert worst["worst_us"] == pytest.approx(60, rel=0.2)
    assert numbers["step_us"]["p50"] > report(trace_of(traced(exchange)))["step_us"]["p50"] + 30
    if phase in (Phase.O_PROJ, Phase.DOWN_PROJ):
        late = {row["rank"]: row for row in numbers["exchanges"]}
        assert late[rank]["late_by_us"]["max"] > 30 > late[1 - rank]["late_by_us"]["max"]


@pytest.mark.parametrize("exchange", range(len(EXCHANGES)))
def test_words_are_seen_after_they_have_left(exchange):
    numbers = report(trace_of(traced(exchange)))
    assert numbers["hops"]["checked"] > 100 and numbers["hops"]["contradictions"] == 0


def test_waits_belong_to_the_phase_that_waited():
    """Of the own rank's words: attention, o_proj and down_proj; of all ranks': those after an exchange, and `sample`. Not `embed`."""
    trace = trace_of(traced())
    kinds = {
        Phase.ATTENTION: "words",
        Phase.O_PROJ: "words",
        Phase.DOWN_PROJ: "words",
        Phase.GATE_UP: "peers",
        Phase.QKV: "peers",
    }
    kinds |= {Phase.LM_HEAD: "peers", Phase.SAMPLE: "peers"}
    for phase in Phase:
        mine = trace.spans[trace.spans["phase"] == phase]
        waited = {name for name in ("words", "peers") if mine[name].any()}
        assert waited == ({kinds[phase]} if phase in kinds else set()), phase


def test_a_step_without_logits_multiplies_no_further_than_its_last_o_proj():
    """The prompt's first two of three positions are a step of their own."""
    trace = trace_of(traced())
    last = int(trace.shape["num_layers"]) - 1
    for step, samples in ((0, False), (1, True)):
        table = trace.table(step)
        for phase in (Phase.GATE_UP, Phase.DOWN_PROJ):
            spans = table[(table["phase"] == phase) & (table["layer"] == last)]
            assert (spans["value"] == samples).all() and (~np.isnan(spans["sent"])).any() == samples
        assert (table["value"][table["phase"] == Phase.LM_HEAD] == samples).all()
        assert (table["value"][(table["phase"] == Phase.GATE_UP) & (table["layer"] < last)] == 1).all()


def test_a_report_of_steps_without_logits_has_only_numbers():
    kernel = run(requests=[{"prompt": [5, 9, 2, 7, 8, 1], "max_tokens": 2}])
    text = json.dumps(report(trace_of(kernel), decode_only=False), allow_nan=False)
    assert "exchanges" in text


def test_a_late_block_is_waited_for():
    """The other blocks of the rank wait for its words, those of the other rank do not before the next exchange."""
    numbers = {p["phase"]: p for p in report(trace_of(traced(0, "{1, 0, 4, 0, 60000}")))["phases"]}
    assert numbers["down_proj"]["wait_words_us"] > 60 * 3 / 8 * 0.8  # three of eight blocks
    assert numbers["qkv"]["wait_peers_us"] > 60 * 4 / 8 * 0.8  # four of eight


def test_bytes_are_the_packed_sizes():
    trace = decode_steps(trace_of(traced()))
    packed, found = rank_bytes(CONFIG, trace.shape), phase_bytes(trace.shape, trace.spans)
    norms = packed.pop("norms")
    streamed = sum(packed[name] for name in ("qkv", "o_proj", "gate_up", "down_proj", "lm_head")) + norms
    phases = (Phase.QKV, Phase.O_PROJ, Phase.GATE_UP, Phase.DOWN_PROJ, Phase.LM_HEAD)
    assert sum(found[p] for p in phases) == streamed
    # one page a layer and KV head: the context is short
    assert found[Phase.ATTENTION] == 3 * 1 * int(trace.shape["page_size"]) * int(trace.shape["head_dim"]) * 4


def test_what_was_overwritten_is_counted():
    kernel = run(trace=128)  # about two steps
    trace = trace_of(kernel)
    assert trace.lost and set(trace.lost).isdisjoint(trace.steps)
    for step in trace.steps:
        trace.table(step)


def test_one_step_of_three():
    assert all(step % 3 == 0 for step in trace_of(run(trace_every=3)).steps)


def test_tracing_changes_no_token():
    assert run(trace=0, world=1).tokens == run(trace=2048, world=1).tokens


def test_a_kernel_without_tracing_is_refused():
    shape = traced().shape.copy()
    shape["trace"] = 0
    with pytest.raises(ValueError, match="without tracing"):
        RingReader(b"", shape)


def test_distribution():
    values = list(range(1, 101))
    assert distribution(values)["p50"] == 50.5 and distribution(values)["max"] == 100
    assert distribution([])["p99"] == 0


def test_an_empty_trace():
    kernel = traced()
    nothing = kernel.fetch()[0][:0]
    trace = decode(nothing, kernel.shape, AXIS, SharedClock(pairs_of(nothing)))
    assert report(replace(trace))["steps"] == 0 and REQUESTS
