"""Every litmus test of docs/litmus.md under weak memory: right as it is under every schedule, and wrong without what its rule needs."""

from __future__ import annotations

import pytest

from imex_persist.device.sim import SimDevice
from imex_persist.errors import DeviceError

from .litmus import LITMUS, Run, make_shape, source

CASES = [(name, world) for name, litmus in LITMUS.items() for world in litmus.ranks]
ROUNDS, BLOCKS = 8, 2


def make(name: str, world: int, lanes: int = 1, defines: tuple[str, ...] = ()) -> Run:
    device = SimDevice(lanes, BLOCKS, source=source(name), defines=defines, mode="random", delay=True, stalls=True)
    return Run(device, device.load(make_shape(world, BLOCKS, ROUNDS)), world, BLOCKS)


def under(run: Run, seed: int) -> dict[str, int]:
    run.device.config.seed = seed
    return run.once()


@pytest.mark.parametrize(("name", "world"), CASES)
@pytest.mark.parametrize(("lanes", "seeds"), [(1, 60), (32, 3)])
def test_right(name, world, lanes, seeds):
    run, torn = make(name, world, lanes), 0
    for seed in range(seeds):
        counts = under(run, seed)
        assert not counts["wrong"] and not counts["gave_up"], f"seed {seed}: {counts}"
        torn += counts["torn"]
    assert (torn > 0) == (name == "message"), "pairs do tear here, else nothing was tested"


@pytest.mark.parametrize(("name", "bug"), [(name, bug) for name, litmus in LITMUS.items() for bug in litmus.bugs])
def test_everything_in_the_rule_is_needed(name, bug):
    run = make(name, LITMUS[name].ranks[-1], defines=(f"BUG_{bug}",))
    for seed in range(400):
        try:
            counts = under(run, seed)
        except DeviceError:  # a deadlock is as good a find
            return
        if counts["wrong"] or counts["gave_up"]:
            return
    raise AssertionError(f"400 schedules of {name} did not mind {bug}")
