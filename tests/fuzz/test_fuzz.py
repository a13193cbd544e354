"""Files and requests from strangers: whatever is in them is taken, or refused by one short sentence. A small part every day."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from .run import run
from .targets import TARGETS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
DAILY = 0.01


@pytest.mark.parametrize("name", TARGETS)
def test_a_part(name):
    tried, found = run(name, DAILY)
    assert not found, found
    assert tried >= DAILY * TARGETS[name].inputs


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TARGETS)
def test_the_whole(name):
    tried, found = run(name, 1.0, number=1)
    assert not found, found
    assert tried >= TARGETS[name].inputs


def test_it_would_be_found(monkeypatch):
    """The whole is more than 10⁵ inputs, and what is no sentence is a find."""
    from . import run as module

    assert sum(target.inputs for target in TARGETS.values()) > 100_000
    with pytest.raises(AssertionError):
        module.one_sentence(ValueError("two\nlines"))
    monkeypatch.setitem(TARGETS, "broken", replace(TARGETS["config_any"], act=_broken))
    with pytest.raises(KeyError):
        module.fuzz("broken", 50, 0)


def _broken(_value) -> None:
    raise KeyError("not a ValueError")
