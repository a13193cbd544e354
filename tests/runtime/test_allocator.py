"""Slots and pages: all or nothing, and nothing lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imex_persist.runtime.allocator import FreeList, pages_needed


def test_all_or_nothing():
    free = FreeList(4, "page")
    assert free.take(3) == [0, 1, 2]
    assert free.take(2) is None and len(free) == 1
    free.give([1])
    assert sorted(free.take(2)) == [1, 3]
    assert free.take(0) == []


def test_giving_twice_is_our_bug():
    free = FreeList(2, "slot")
    taken = free.take(1)
    free.give(taken)
    with pytest.raises(AssertionError, match="slot 0"):
        free.give(taken)


@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60))
def test_nothing_is_lost_or_shared(count, actions):
    free, held = FreeList(count, "page"), []
    for take, number in actions:
        if take:
            got = free.take(number)
            if got is None:
                assert number > len(free)
            else:
                held.append(got)
        elif held:
            free.give(held.pop(number % len(held)))
        out = [page for pages in held for page in pages]
        assert len(set(out)) == len(out) and len(out) + len(free) == count


@pytest.mark.parametrize(("prompt", "new", "pages"), [(1, 1, 1), (31, 1, 1), (32, 1, 2), (1, 63, 2), (1, 64, 3)])
def test_pages_needed(prompt, new, pages):
    assert pages_needed(prompt, new, 32) == pages
