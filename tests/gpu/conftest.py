"""Tests that need a GPU skip, saying why, where there is none that is capable. Deciding that loads no CUDA library."""

from __future__ import annotations

from pathlib import Path

import pytest

from .bench import Bench, capable_gpus


def pytest_collection_modifyitems(items):
    here = [item for item in items if item.path.parent == Path(__file__).parent]
    if not here:
        return
    _, why = capable_gpus()
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if why:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def device():
    from imex_persist.device.cuda import CudaDevice

    device = CudaDevice(capable_gpus()[0][0])
    yield device
    device.close()


@pytest.fixture(scope="session")
def bench(device):
    return Bench(device)
