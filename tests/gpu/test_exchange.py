"""Every exchange with 2, 3, 4 and 8 ranks on one GPU, in one launch, bit for bit; and what their rounding costs."""

from __future__ import annotations

import pytest

from imex_persist.bench.exchange import VARIANTS
from imex_persist.planner import Machine
from tests.bench.exchanges import REDUCING, Exchanges, shape_of

TURNS = 300
SIZES = ((2048, 3), (544, 2))  # a row of Llama-3.2-1B; one whose last part of anything is short


def make(device, variant, world: int, hidden: int, rows: int, slices: int = 1) -> Exchanges:
    machine = Machine(device.machine.num_blocks // world, device.machine.shared_memory_bytes)
    return Exchanges(device, shape_of(variant, world, hidden=hidden, rows=rows, machine=machine, slices=slices), variant)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_every_block_of_every_rank_has_the_sum(device, variant, world):
    for hidden, most in SIZES:
        run = make(device, variant, world, hidden, most, 2 if world < 4 else 1)
        for rows in range(1, most + 1):
            assert run.run(rows, TURNS) == [], f"{rows} rows of {hidden}"


@pytest.mark.parametrize("variant", REDUCING, ids=lambda v: v.name)
def test_what_rounding_costs(device, variant, record_property):
    world = 4
    error = make(device, variant, world, 2048, 2).error(2)
    record_property(f"largest error of {variant.name}, in standard deviations of the sums", f"{error:.1e}")
    assert error < (world * 2.0**-17 if variant.float24 else 1e-6)
