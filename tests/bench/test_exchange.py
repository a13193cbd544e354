"""Every exchange at world sizes 2 to 8 under hostile schedules, bit for bit; and the bugs that these schedules must find."""

from __future__ import annotations

import numpy as np
import pytest

from imex_persist import abi, planner
from imex_persist.bench import sums
from imex_persist.bench.exchange import VARIANTS, check_sizes
from imex_persist.device import sources
from imex_persist.device.sim import SimDevice
from imex_persist.errors import DeviceError
from tests.schedules.mutations import Mutation

from .exchanges import REDUCING, Exchanges, shape_of

WORLDS = (2, 3, 4, 8)
SEEDS = 12


@pytest.fixture(autouse=True)
def short_steps(monkeypatch):
    """So that sets of bare words come up again in a run of few exchanges."""
    monkeypatch.setattr(planner, "EXCHANGES_A_STEP", 3)


def make(variant, world, lanes=1, *, blocks=3, hidden=96, rows=3, slices=1, source="", **config) -> Exchanges:
    device = SimDevice(lanes, blocks * world, **config)
    shape = shape_of(variant, world, hidden=hidden, rows=rows, machine=device_of_one_rank(device, world), slices=slices)
    return Exchanges(device, shape, variant, source)


def device_of_one_rank(device, world):
    return type(device.machine)(device.machine.num_blocks // world, device.machine.shared_memory_bytes)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
@pytest.mark.parametrize("world", WORLDS)
def test_every_block_of_every_rank_has_the_sum(variant, world):
    """Rows from one to all; LANES=1; schedules at random, with late and split stores, and blocks that stand still."""
    slices = 2 if world < 4 else 1
    run = make(variant, world, hidden=32 * (1 + world), slices=slices, mode="random", delay=True, stalls=True)
    for seed in range(SEEDS):
        run.probe.device.config.seed = seed
        assert run.run(1 + seed % 3, 5) == []


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
@pytest.mark.parametrize("world", WORLDS)
def test_with_a_fiber_for_every_thread(variant, world):
    run = make(variant, world, 32, blocks=2, rows=2, mode="random", delay=True)
    for seed in range(2):
        run.probe.device.config.seed = seed
        assert run.run(2, 3) == []


@pytest.mark.parametrize("world", [5, 6, 7])
def test_an_all_gather_of_few_values(world):
    """Every block of every rank sends something, also where ranks do not divide it: else a set is cleared before all have read it."""
    run = make(next(v for v in VARIANTS if v.gather), world, hidden=64, rows=1, mode="random", delay=True, stalls=True)
    for seed in range(SEEDS):
        run.probe.device.config.seed = seed
        assert run.run(1, 12) == []


@pytest.mark.parametrize("variant", REDUCING, ids=lambda v: v.name)
def test_what_rounding_costs(variant):
    """fp32 sums of W terms are off by some ulps of a term; terms of 24 bits are below 1 and each off by 2^-17 at most."""
    world = 4
    error = make(variant, world, blocks=2).error(3)
    assert error < (world * 2.0**-17 if variant.float24 else 1e-6)
    assert not variant.float24 or error > 2.0**-18


def test_the_check_sees_one_wrong_bit():
    shape = make(VARIANTS[0], 2).shape
    job = sums.job(3, warmup=1, iterations=4)
    assert sums.checks(shape, job, 5) != sums.checks(shape, job, 6)
    assert np.abs(sum(sums.parts(source, 3, 96, 4) for source in range(2))).max() > 8
    assert len({sums.checks(shape, job | {"rows": r}, 5) for r in (1, 2, 3)}) == 3


BUGS = [
    Mutation(
        "signal_without_fence",
        "a signal overtakes the values that it announces",
        (("semaphore.cuh", "  fence_sys();\n  const u32 at", "  const u32 at"),),
        by="SEMAPHORE",
    ),
    Mutation(
        "read_without_fence",
        "values that were read before are read again",
        (("semaphore.cuh", "  fence_sys();\n  return all_well(b);", "  return all_well(b);"),),
        by="SEMAPHORE",
    ),
    Mutation(
        "one_buffer",
        "partial sums are overwritten before a late block has read them",
        (("bench/exchange.cu", "reduce(b, down_exchange(), time)", "reduce(b, o_exchange(), time)"),),
        by="ONE_SHOT",
    ),
    Mutation(
        "set_cleared_early",
        "parts are cleared before a late block has read them",
        (("bench/exchange.cu", "  return take_all_pairs(b) &&", "  clear_set(b);\n  return take_all_pairs(b) &&"),),
        by="all-gather",
    ),
    Mutation(
        "wide_slices_of_odd_pairs",
        "a pair of wide words has two owners, and one of them never gets the other's half",
        (("exchange.cuh", "return wide() ? 2 * divide_up(pairs / 2, num_owners()) : ", "return "),),
        by="TWO_SHOT float24",
    ),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bugs_are_found(bug, monkeypatch, tmp_path):
    """Without the patch no seed finds anything (above); with it one does: a wrong sum, or a wait that nothing ends."""
    variant = next(v for v in VARIANTS if v.name == bug.by)
    folder = bug.apply(tmp_path).parent
    for name in ("sim", "cuda", "primitives.cuh", "abi.cuh"):
        (folder / name).symlink_to(sources.cuda_src() / name)
    monkeypatch.setattr(sources, "cuda_src", lambda: folder)
    run = make(variant, 2, blocks=5, hidden=96, rows=2, mode="random", delay=True, stalls=True)
    for seed in range(200):
        run.probe.device.config.seed = seed
        try:
            if run.run(2, 8):
                return
        except DeviceError:
            return
    pytest.fail(f"{bug.breaks}: 200 schedules did not show it")


def test_sizes_are_whole_rows():
    check_sizes([512, 4096, 8192, 32768], 4096)
    for bad in (500, 4128, 4096 * 17):
        with pytest.raises(ValueError, match="are no exchange"):
            check_sizes([bad], 4096)


def test_semaphore_never_shares_memory_with_words():
    for rows in (1, 4):
        run = make(VARIANTS[abi.Strategy.SEMAPHORE], 2, rows=rows)
        assert run.variant.strategy == abi.Strategy.SEMAPHORE and run.shape["one_shot_rows"] == 0
