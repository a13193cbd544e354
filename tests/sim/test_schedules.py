"""Schedules: what is right stays right under all of them, and what is wrong is found."""

from __future__ import annotations

import pytest

from tests.sim import ring

SCHEDULES = {
    "rr": {},
    "random": {"mode": "random"},
    "pct": {"mode": "pct", "pct_steps": 1000},
    "weak": {"mode": "random", "delay": True},
    "weak-stalls": {"mode": "random", "delay": True, "stalls": True},
    "weak-pct": {"mode": "pct", "pct_steps": 1000, "delay": True},
}
SEEDS = {1: 20, 32: 3}


@pytest.mark.parametrize("lanes", [1, 32])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_ring_is_right(lanes, schedule, rows):
    r = ring.make(lanes, rows=rows, **SCHEDULES[schedule])
    assert [seed for seed in range(SEEDS[lanes]) if not r.run(seed).right()] == []


def test_ring_of_eight_ranks_and_many_blocks():
    assert ring.make(1, world=8, blocks=6, mode="random", delay=True, stalls=True).run().right()


def test_same_seed_same_schedule():
    r = ring.make(1, mode="random", delay=True, stalls=True)
    stats = [r.run(seed).launch.stats for seed in (3, 4, 3)]
    assert stats[0] == stats[2] != stats[1]


def found(run, seeds: int) -> int | None:
    """The first seed at which `run` is wrong."""
    return next((seed for seed in range(seeds) if not run(seed)), None)


@pytest.mark.parametrize(
    ("lanes", "bug"), [(1, "PART_WAIT"), (1, "CONDITION_C"), (32, "PART_WAIT"), (32, "CONDITION_C"), (32, "WARP_SYNC")]
)
def test_planted_bug_of_the_ring_is_found(lanes, bug):
    r = ring.make(lanes, defines=(f"BUG_NO_{bug}",), mode="random", delay=True, stalls=True, steps=12, deadline_us=100_000)

    def right(seed):
        try:
            return r.run(seed).right()
        except Exception:  # a deadlock is as good a find
            return False

    assert found(right, 100) is not None
