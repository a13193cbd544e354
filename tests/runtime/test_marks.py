"""Write and verify in the simulator, under hostile schedules; tests/gpu has the same on a GPU."""

from __future__ import annotations

import pytest

from imex_persist.device.sim import SimDevice

from .marks import check_a_silent_rank, check_all_pairs, check_something_else


def simulator(lanes: int, world: int) -> SimDevice:
    return SimDevice(lanes, 2 * world, mode="random", delay=True, on_deadlock="expire", seed=world)


@pytest.mark.parametrize("lanes", [1, 32])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_all_pairs(lanes, world):
    check_all_pairs(simulator(lanes, world), world)


def test_a_silent_rank_is_named():
    check_a_silent_rank(simulator(1, 3))


def test_a_store_that_arrives_as_something_else_is_found():
    check_something_else(simulator(1, 2))
