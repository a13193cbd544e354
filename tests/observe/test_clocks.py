"""Clocks that differ: the simulator's one clock is the truth; events are rewritten as SMs of other offsets and rates would have them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from imex_persist import abi
from imex_persist.observe.capture import clocks_of
from imex_persist.observe.clocks import TIMER_WRAP, WRAP, Errors
from imex_persist.observe.hops import hop_check
from imex_persist.observe.ring import EVENT
from imex_persist.observe.spans import decode, is_pair, pairs_of

from .traced import AXIS, run, trace_of

BLOCKS, WORLD = 4, 2
MOMENTS = ("begin", "input", "ready", "end", "sent")


@lru_cache
def traced(lanes: int = 1, world: int = WORLD, requests: int = 1):
    asked = [{"prompt": [5, 9, 2], "max_tokens": 24 if n == 0 else 6} for n in range(requests)]
    return run(world=world, lanes=lanes, trace=8192, requests=asked, max_rows=2, num_slots=2)


def change_timer(events: np.ndarray, which: np.ndarray, change) -> None:
    """Sets the timer of the pairs among these events to change(timer)."""
    e, at = events["event"], np.nonzero(which & is_pair(events["event"]["what"] & 0xFF))[0]
    timer = change(e["value"][at].astype(np.int64) | (e["what"][at].astype(np.int64) >> 8) << 32) % TIMER_WRAP
    e["value"][at], e["what"][at] = timer % WRAP, timer >> 32 << 8 | e["what"][at] & 0xFF


def other_clocks(kernel, ghz=(1.7, 1.9), timer_ns: int = 1, wander: float = 0.0):
    """(events, alignments) as GPUs would have written them: SMs at about one rate, each from its own number on, near the wrap; a timer of
    its own in each rank, which loses 20 µs a second and passes the bits that an event has of it.

    `timer_ns`: how seldom the GPUs' timers tick. `wander`: by what part the rate of an SM swings, in 20 ms, each in its own phase.
    """
    events, alignments, reader = kernel.fetch()
    assert not reader.lost
    events, alignments = events.copy(), alignments.copy()
    start = {(r, b): (1 << 32) - 40_000 + 987_654_321 * (r * 7 + b) for r in range(WORLD) for b in range(BLOCKS)}

    def clock(rank, block, ns):
        ns = np.asarray(ns, np.float64)
        swing = wander * 20e6 / (2 * np.pi) * np.sin(2 * np.pi * ns / 20e6 + rank + 1.5 * block)
        return (np.round((ns + swing) * ghz[rank]).astype(np.int64) + start[rank, block]) % (1 << 32)

    for rank in range(kernel.world):
        start_ns = (987_654_321_012_345_678, TIMER_WRAP // 3)[rank]
        change_timer(
            events, events["rank"] == rank, lambda t, by=start_ns, r=rank: (t + by - r * t // 50_000) // timer_ns * timer_ns
        )
        for block in range(BLOCKS):
            mine = (events["rank"] == rank) & (events["block"] == block)
            events["event"]["clock"][mine] = clock(rank, block, events["event"]["clock"][mine])
    for i, a in enumerate(alignments):
        rank, partner = int(a["rank"]), int(a["partner"])
        teller = (rank, partner) if partner < BLOCKS else (partner - BLOCKS, 0)
        asked, back = clock(rank, 0, a["asked"]), clock(rank, 0, a["asked"] + a["trip"])
        alignments[i]["asked"], alignments[i]["trip"] = asked, (back - asked) % (1 << 32)
        alignments[i]["answer"] = clock(*teller, a["answer"])
    return events, alignments


def again(kernel, **how):
    events, alignments = other_clocks(kernel, **how)
    return decode(events, kernel.shape, AXIS, clocks_of([(events, alignments)], kernel.shape, one_clock=False))


def off_by(trace, truth) -> np.ndarray:
    """µs [moments, spans] that the times differ by, all moved by the same."""
    assert trace.steps == truth.steps and not trace.lost
    found = np.array([trace.spans[name] - truth.spans[name] for name in MOMENTS])
    return found - np.nanmedian(found)


@pytest.mark.parametrize("lanes", (1, 32))
def test_every_block_is_asked(lanes):
    _, alignments, _ = traced(lanes).fetch()
    steps = np.unique(alignments["step"])
    assert steps[0] == 0 and len(steps) >= 6 and np.diff(steps).max() <= abi.ALIGN_EVERY
    for step in steps:
        asked = alignments[alignments["step"] == step]
        pairs = sorted(zip(asked["rank"].tolist(), asked["partner"].tolist(), strict=True))
        assert pairs == sorted([(r, b) for r in range(WORLD) for b in range(1, BLOCKS)] + [(0, BLOCKS + 1)])
        assert np.all(asked["trip"] > 0) and np.all(asked["answer"] - asked["asked"] >= 0)
        assert np.all(asked["answer"] <= asked["asked"] + asked["trip"])  # one clock here: it was read in between


@pytest.mark.parametrize("lanes", (1, 32))
def test_blocks_and_ranks_are_placed_within_the_stated_errors(lanes):
    truth = trace_of(traced(lanes))
    trace = again(traced(lanes))
    off, e = off_by(trace, truth), trace.errors
    zero = trace.spans["rank"] == 0
    scale = np.nanmax(trace.spans["end"]) * 1e-4  # of the whole axis
    assert np.nanmax(np.abs(off[:, zero] - np.nanmedian(off[:, zero]))) <= e.blocks + e.drift + scale
    assert np.nanmax(np.abs(off)) <= e.blocks * 2 + e.ranks + 2 * e.drift + scale
    assert 0 < e.blocks < 30 and 0 < e.ranks < 60


def test_a_coarse_timer_costs_less_than_its_tick():
    truth = trace_of(traced())
    fine, coarse = again(traced()), again(traced(), timer_ns=1024)
    assert coarse.errors.timer > 0.3 > fine.errors.timer
    off = off_by(coarse, truth)
    assert np.nanmax(np.abs(off)) < 1.024 and np.nanmax(np.abs(off_by(fine, truth))) < 0.1
    assert np.sqrt(np.nanmean(off**2)) < 0.35


def test_a_rate_that_wanders_is_followed():
    truth = trace_of(traced())
    trace = again(traced(), wander=0.004)
    assert (
        np.nanmax(np.abs(off_by(trace, truth))) <= 2 * trace.errors.blocks + trace.errors.ranks + 2 * trace.errors.drift + 1.0
    )


def test_wrong_clocks_show_as_contradictions():
    """Words seen before they left are counted: here a block reads another time than its GPU's."""
    kernel = traced()
    events, alignments = other_clocks(kernel)
    change_timer(events, (events["rank"] == 0) & (events["block"] == 2), lambda t: t - 118_000)
    moved = decode(events, kernel.shape, AXIS, clocks_of([(events, alignments)], kernel.shape, one_clock=False))
    assert hop_check(trace_of(kernel))["contradictions"] == 0
    assert hop_check(moved)["contradictions"] > 0 and moved.errors.blocks > 100  # and the words between the blocks tell


def test_one_late_answer_does_not_decide_how_far_blocks_are_apart():
    """A block that was held up between its clock and its answer says nothing about the clocks."""
    kernel = traced()
    events, alignments = other_clocks(kernel)
    usual = clocks_of([(events, alignments)], kernel.shape, one_clock=False).errors
    mine = np.nonzero((alignments["rank"] == 1) & (alignments["partner"] == 3))[0]
    alignments["answer"][mine[1]] -= 100_000  # about 50 µs
    late = clocks_of([(events, alignments)], kernel.shape, one_clock=False).errors
    assert len(mine) > 4 and 0 < late.blocks < usual.blocks + 1
    assert (late.ranks, late.drift, late.timer) == (usual.ranks, usual.drift, usual.timer)


def test_what_is_said_of_the_errors():
    said = Errors(0.6, 0.72, 0.1, 0.41).text
    assert said.startswith(
        "Clocks agree where steps begin: blocks within 0.60 µs, ranks within 0.72 µs (their comparisons keep to a line"
    )
    assert said.endswith("within 0.10 µs); within a step: 0.41 µs.")
    assert Errors(timer=0.5).text == "Clocks agree within a step: 0.50 µs." and Errors().text == ""
    assert "comparisons" not in Errors(0.6, 0.72, None, 0.41).text


def test_an_idle_kernel_begins_a_new_run():
    """Clocks may have wrapped meanwhile, any number of times: nothing before the gap is used after it."""
    kernel = traced()
    events, alignments = other_clocks(kernel)
    truth = again(kernel)
    half, gap = len(truth.steps) // 2 // abi.ALIGN_EVERY * abi.ALIGN_EVERY, 7_000_000_000
    moved = events["event"]["step"] > half
    events["event"]["clock"][moved] += np.uint32(123_456_789)
    change_timer(events, moved, lambda t: t + gap)
    later = alignments["step"] >= half
    for name in ("asked", "answer"):
        alignments[name][later] = (alignments[name][later] + 123_456_789) % (1 << 32)
    trace = decode(events, kernel.shape, AXIS, clocks_of([(events, alignments)], kernel.shape, one_clock=False))
    assert trace.steps == truth.steps
    for step in trace.steps:
        moved_by = trace.table(step)["end"] - truth.table(step)["end"]
        assert np.ptp(moved_by) < 1.5
        assert np.median(moved_by) == pytest.approx(gap / 1e3 if step >= half else 0, abs=2)


def test_steps_that_nothing_places_are_counted_as_lost():
    kernel = traced()
    events, alignments = other_clocks(kernel)
    trace = decode(events, kernel.shape, AXIS, clocks_of([(events, alignments[:0])], kernel.shape, one_clock=False))
    assert not trace.steps and trace.lost == tuple(trace_of(kernel).steps)
    nothing = clocks_of([(np.zeros(0, EVENT), alignments[:0])], kernel.shape, one_clock=False)
    assert len(pairs_of(events)) and not len(decode(events[:0], kernel.shape, AXIS, nothing).spans)


def test_a_second_request_is_aligned_before_its_first_step():
    """Sampled traces too: one step of five, and an alignment before every traced step that is far enough from the last."""
    _, alignments, _ = run(world=1, trace_every=5, requests=[{"prompt": [1, 2], "max_tokens": 40}]).fetch()
    steps = np.unique(alignments["step"])
    assert np.all(steps % 5 == 0) and len(steps) > 1


@pytest.mark.parametrize(
    ("lanes", "seed"),
    [
        pytest.param(lanes, seed, marks=[pytest.mark.full] * (seed >= {1: 4, 32: 1}[lanes]))
        for lanes in (1, 32)
        for seed in range(12)
    ],
)
def test_answers_lie_between_question_and_reply_in_every_schedule(seed, lanes):
    """Stores held back, blocks standing still: trips get longer, never wrong, and tracing changes no token."""
    options = {"seed": seed, "mode": ("random", "pct")[seed % 2], "delay": True, "stalls": seed % 3 == 0, "preempt": 50}
    kernel = run(lanes=lanes, trace=8192, requests=[{"prompt": [5, 9, 2], "max_tokens": 10}], device_options=options)
    assert kernel.tokens[0] == traced().tokens[0][:10]
    _, alignments, _ = kernel.fetch()
    steps = np.unique(alignments["step"])
    assert len(steps) > 2 and len(alignments) == len(steps) * (WORLD * (BLOCKS - 1) + WORLD - 1)
    assert np.all(alignments["asked"] <= alignments["answer"])
    assert np.all(alignments["answer"] <= alignments["asked"] + alignments["trip"])
