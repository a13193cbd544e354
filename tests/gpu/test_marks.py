"""Write and verify on one GPU; between two, every start of an engine does it."""

from __future__ import annotations

import pytest

from tests.runtime.marks import check_a_silent_rank, check_all_pairs, check_something_else


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_all_pairs(device, world):
    check_all_pairs(device, world)


def test_a_silent_rank_is_named(device):
    check_a_silent_rank(device)


def test_a_store_that_arrives_as_something_else_is_found(device):
    check_something_else(device)
