"""The simulator as the machine of these tests, in both forms; and which of them are for `make test-full` only."""

from __future__ import annotations

from pathlib import Path

import pytest

from imex_persist.device.sim import SimDevice

# (file, LANES) -> the values of `index` that `make test` runs; a thread a fiber is exact, and thirty times slower
EVERY_DAY = {
    ("test_draw", 1): range(24),
    ("test_draw", 32): range(10),
    ("test_phases", 1): range(24),
    ("test_phases", 32): range(10),
    ("test_tap", 1): range(12),
    ("test_tap", 32): (3,),
    ("test_whole", 1): range(12),
    ("test_whole", 32): (2, 3),
}


@pytest.fixture(params=(1, 32), ids=lambda lanes: f"lanes{lanes}")
def make_device(request):
    """make_device(num_blocks, **SimDevice options): tests/gpu/test_kernel.py has one of the same name that makes a GPU."""
    made = []

    def make(num_blocks: int, **options) -> SimDevice:
        made.append(SimDevice(request.param, num_blocks, **options))
        return made[-1]

    make.lanes = request.param
    yield make
    for device in made:
        device.close()


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem == "test_prefix" and item.callspec.params["make_device"] == 32 and "page_table" not in item.name:
            item.add_marker(pytest.mark.full)
        if item.path.parent != Path(__file__).parent or not hasattr(item, "callspec"):
            continue
        params = item.callspec.params
        if "index" in params and params["index"] not in EVERY_DAY[item.path.stem, params["make_device"]]:
            item.add_marker(pytest.mark.full)
