"""The whole kernel under seeded schedules: whatever they do, every run gives the bits of the round-robin run of its configuration.

This is CI's budget; `make simulate SEEDS=20000` is the long form. A seed that fails names the command that runs it again.
"""

from __future__ import annotations

import pytest

from imex_persist.abi import Draw, Strategy

from . import drills
from .campaign import describe, replay_command, run_seeds
from .configuration import SCHEDULES, configuration, schedule

CHUNK = 4 * SCHEDULES
CHUNKS = 10
LANES_32 = 8


def check(seeds: range, lanes: int | None) -> None:
    wrong = [result for result in run_seeds(seeds, lanes) if result.wrong]
    said = (f"{replay_command(r.seed, lanes)}\n{describe(r.seed, lanes)}\n{r.wrong[:2000]}" for r in wrong[:3])
    assert not wrong, f"{len(wrong)} of {len(seeds)} seeds:\n" + "\n\n".join(said)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_warp_a_fiber(chunk):
    check(range(chunk * CHUNK, (chunk + 1) * CHUNK), 1)


@pytest.mark.parametrize("number", range(2))
def test_a_thread_a_fiber(number):
    check(range(number * SCHEDULES, number * SCHEDULES + LANES_32 // 2), 32)


def test_a_seed_is_a_run():
    """Same seed, same dispatches: else no failure could be run again."""
    from .campaign import Kernel

    kernel, counts = Kernel(configuration(1, 1)), []
    for seed in (SCHEDULES + 1, SCHEDULES + 2, SCHEDULES + 1):
        kernel.run(schedule(seed))
        counts.append(kernel.stats)
    kernel.close()
    assert counts[0] == counts[2] != counts[1]


def test_what_is_drawn():
    """All that the campaign is for is in its first configurations."""
    drawn = [configuration(number) for number in range(200)]
    cases = [c.case for c in drawn]
    assert {c.options["world_size"] for c in cases} == {1, 2, 3, 4}
    assert {c.options["down_slices"] for c in cases} == {1, 2}
    assert {c.options["max_rows"] for c in cases} >= {1, 2, 3, 4, 16}
    assert {c.options["strategy"] for c in cases} == set(Strategy)
    one_shot, local, two_shot = Strategy.ONE_SHOT, Strategy.ONE_SHOT_LOCAL, Strategy.TWO_SHOT
    planned = {(c.options["strategy"], min(int(c.shape()["one_shot_rows"]), 2)) for c in cases}  # rows that go in one shot
    assert planned >= {(one_shot, 1), (one_shot, 2), (local, 0), (two_shot, 0), (two_shot, 1)}
    assert {c.max_stages for c in drawn} == set(range(4, 13))
    assert {c.case.num_blocks for c in drawn} >= {*range(2, 9), 132}
    assert {len(c.requests) for c in drawn} == {1, 2, 3}
    assert {c.lanes for c in drawn} == {1, 32}
    assert sum(any(r.cancel_after is not None for r in c.requests) for c in drawn) > 20
    drawn_by = [r.sampling.draw for c in drawn for r in c.requests if r.sampling]
    assert min(drawn_by.count(draw) for draw in (Draw.MASKED, Draw.SAMPLED, Draw.ALL)) > 3
    assert any(len(r.prompt) > 256 for c in drawn for r in c.requests)
    schedules = [schedule(seed).options for seed in range(200)]
    for name in ("delay_stores", "delay_copies", "split_words", "stalls"):
        assert {s[name] for s in schedules} == {False, True}
    assert {s["mode"] for s in schedules} == {"random", "pct"}
    assert 10 < sum("abort_step" in s for s in schedules) < 100


@pytest.mark.parametrize("drill", drills.DRILLS, ids=lambda drill: drill.__name__)
def test_drill(drill):
    drill()
