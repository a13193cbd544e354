"""The rings' reader, fed by a writer as the kernel is one: it never waits, and comes round."""

from __future__ import annotations

import numpy as np
import pytest

from imex_persist import abi, planner
from imex_persist.abi import Mark, Phase, Strategy
from imex_persist.observe.ring import EVENTS_PER_LAYER, RingReader

from .traced import CONFIG, run

SIZE = 256


class Writer:
    """Writes steps of `events` marks of each block's consumers and half of it of its adders, numbered in `value`."""

    def __init__(self, every: int = 1, size: int = SIZE):
        self.shape = planner.make_shape(
            CONFIG, world_size=2, machine=planner.Machine(num_blocks=3), trace=size, trace_every=every
        )
        self.memory = np.zeros(2 * planner.trace_bytes(self.shape), np.uint8)
        each = planner.trace_bytes(self.shape) // abi.TraceEvent.itemsize
        rings = self.memory.view(abi.TraceEvent).reshape(2, each)[:, : 3 * abi.TRACE_WRITERS * size]
        self.rings, self.count, self.every, self.size = rings.reshape(2, 3, abi.TRACE_WRITERS, size), {}, every, size

    def put(self, rank, block, writer, what, step) -> None:
        at = self.count.get((rank, block, writer), 0)
        self.rings[rank, block, writer, at % self.size] = (at, what, at, step + 1)
        self.count[rank, block, writer] = at + 1

    def step(self, step: int, events: int = 20) -> None:
        if step % self.every:
            return
        for rank in range(2):
            for block in range(3):
                self.put(rank, block, 0, Mark.CLOCK, step)
                for _ in range(events - 2):
                    self.put(rank, block, 0, Mark.BEGIN | Phase.QKV << 8, step)
                self.put(rank, block, 0, Mark.END | Phase.SAMPLE << 8, step)
                for adder in (1, 2):
                    for _ in range(events // 2):
                        self.put(rank, block, adder, Mark.SENT | Phase.QKV << 8, step)


def check(events, steps, events_a_step) -> None:
    assert sorted(set(events["event"]["step"] - 1)) == list(steps)
    each = events_a_step + 2 * (events_a_step // 2)
    assert len(events) == 6 * each * len(steps)
    for rank in range(2):
        for block in range(3):
            for writer in range(abi.TRACE_WRITERS):
                mine = events[(events["rank"] == rank) & (events["block"] == block) & (events["writer"] == writer)]
                assert np.all(np.diff(mine["event"]["value"].astype(int)) == 1)


@pytest.mark.parametrize("events", (20, 90))
@pytest.mark.parametrize("fetch_every", (1, 2))
def test_every_event_comes_once(events, fetch_every):
    writer = Writer()
    reader = RingReader(memoryview(writer.memory), writer.shape)
    found = []
    for step in range(60):
        writer.step(step, events)
        if step % fetch_every == fetch_every - 1:
            found.append(reader.fetch(step + 1)[0])
    check(np.concatenate(found), range(60), events)
    assert not reader.lost


def test_what_comes_round_is_lost_and_counted():
    writer = Writer()
    reader = RingReader(memoryview(writer.memory), writer.shape)
    found = []
    for step in range(100):
        writer.step(step)
        if step in (3, 5, 50, 52, 99):  # of 256 events of 20 a step, 12 steps remain
            found.append(reader.fetch(step)[0])
    steps = sorted({int(s) - 1 for s in np.concatenate(found)["event"]["step"]})
    assert reader.lost.isdisjoint(steps) and sorted(reader.lost | set(steps)) == list(range(99))
    assert {0, 1, 2, 3, 4, 45, 49, 50, 51, 90, 98} <= set(steps)
    check(np.concatenate(found[-1:]), [s for s in steps if s > 52], 20)


def test_sampled_steps_and_steps_that_are_not_over():
    writer = Writer(every=4)
    reader = RingReader(memoryview(writer.memory), writer.shape)
    found = []
    for step in range(40):
        writer.step(step)
        found.append(reader.fetch(step - 2)[0])
    check(np.concatenate(found), range(0, 37, 4), 20)


def test_a_mark_that_comes_late_is_skipped():
    writer = Writer()
    reader = RingReader(memoryview(writer.memory), writer.shape)
    writer.step(0)
    assert len(reader.fetch(1)[0])
    writer.put(0, 0, 1, Mark.SENT | Phase.DOWN_PROJ << 8, 0)
    writer.step(1)
    check(reader.fetch(2)[0], [1], 20)


def test_from_a_later_step_on():
    writer = Writer()
    for step in range(10):
        writer.step(step)
    reader = RingReader(memoryview(writer.memory), writer.shape, first_step=8)
    check(reader.fetch(10)[0], [8, 9], 20)
    assert not reader.lost


def test_a_ring_has_room_for_the_steps_that_are_planned():
    """Of blocks that attend to one run of one row, with an exchange that has owners: as many marks as there are."""
    one = {"max_rows": 1, "strategy": Strategy.ONE_SHOT_LOCAL, "one_shot_rows": 0}
    events, _, _ = run(world=1, blocks=8, trace=8192, requests=[{"prompt": [1, 2], "max_tokens": 6}], **one).fetch()
    mine = events[events["writer"] == 0]
    counts = np.unique(mine["event"]["step"].astype(np.int64) << 16 | mine["block"], return_counts=True)[1]
    most = EVENTS_PER_LAYER * (CONFIG.num_hidden_layers + 1)
    assert 0.7 * most < counts.max() <= most
