"""The litmus tests of docs/litmus.md on one GPU: all of its SMs as one rank, and as two ranks; 10⁹ words each, every one checked."""

from __future__ import annotations

import time

import pytest

from tests.sim.litmus import LITMUS, Run, make_shape, rounds_for, source, words_checked

WORDS = 1_000_000_000
CASES = [(name, world) for name, litmus in LITMUS.items() for world in litmus.ranks]


@pytest.mark.parametrize(("name", "world"), CASES)
def test_right(device, name, world, record_property):
    blocks = device.machine.num_blocks // world // 2 * 2  # partners are neighbours
    rounds = rounds_for(name, world, blocks, WORDS)
    run = Run(device, device.load(make_shape(world, blocks, rounds), source=source(name)), world, blocks)
    began = time.perf_counter()
    counts = run.once(timeout_s=100)
    text = f"{words_checked(name, world, blocks, rounds):.2e} words in {time.perf_counter() - began:.1f} s, {counts}"
    record_property(f"{name}, {world} ranks on one GPU", text)
    print(f"{name}, {world} ranks on one GPU: {text}")
    assert not counts["wrong"] and not counts["gave_up"], text
