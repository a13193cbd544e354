"""The simulator as the machine of these tests, in both forms; and which of them are for `make test-full` only."""

from __future__ import annotations

from pathlib import Path

import pytest

from imex_persist.device.sim import SimDevice

EVERY_DAY = {1: 8, 32: 4}  # LANES -> how many of the random cases `make test` runs


@pytest.fixture(params=(1, 32), ids=lambda lanes: f"lanes{lanes}")
def make_device(request):
    """make_device(num_blocks, **SimDevice options): tests/gpu/test_kernel.py has one of the same name that makes a GPU."""
    made = []

    def make(num_blocks: int, **options) -> SimDevice:
        made.append(SimDevice(request.param, num_blocks, **options))
        return made[-1]

    yield make
    for device in made:
        device.close()


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent != Path(__file__).parent or not hasattr(item, "callspec"):
            continue
        index, lanes = item.callspec.params.get("index"), item.callspec.params.get("make_device")
        if index is not None and index >= EVERY_DAY[lanes]:
            item.add_marker(pytest.mark.full)
