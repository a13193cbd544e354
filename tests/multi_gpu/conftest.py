"""Tests that need two GPUs skip, saying why, where there are not two that are capable. Deciding that loads no CUDA library."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.bench import capable_gpus
from tests.gpu.test_llm import SIMULATED


def why_not() -> str:
    """Why there are no two GPUs; "" if there are."""
    gpus, why = capable_gpus()
    return why or ("" if len(gpus) >= 2 else f"{len(gpus)} capable GPU, two are needed")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    here = [item for item in items if item.path.parent == Path(__file__).parent]
    why = why_not() if here and not SIMULATED else ""
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if why:
            item.add_marker(pytest.mark.skip(reason=why))
