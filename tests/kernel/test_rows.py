"""Who has a row in which step: counted in steps, on a round-robin schedule, where records of one step carry one time."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import groupby, pairwise

import pytest

from imex_persist import abi, planner
from imex_persist.device.sim import SimDevice
from imex_persist.model.dummy import DummyWeights
from imex_persist.runtime.sampling import sampling_of
from imex_persist.sampling_params import SamplingParams
from tests.kernel.cases import model
from tests.kernel.harness import KernelRun
from tests.kernel.serving import Served

CONFIG = model(
    hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64, vocab_size=40,
    num_hidden_layers=1,
)  # fmt: skip


def kernel(rows: int, slots: int, longest: int) -> KernelRun:
    device = SimDevice(lanes=1, num_blocks=2)
    shape = planner.make_shape(CONFIG, max_rows=rows, num_slots=slots, max_model_len=longest, machine=device.machine)
    return KernelRun(device, CONFIG, DummyWeights(CONFIG, seed=1), shape)


def steps_of(rows: int, slots: int, requests: list[tuple[int, int]]) -> tuple[list[set[int]], int]:
    """For (prompt length, max_tokens) of each request: who got a token in each step in which anybody did, and how many steps ran."""
    run = kernel(rows, slots, max(prompt + tokens for prompt, tokens in requests))
    tokens = run.decode(
        [{"prompt": [1 + (i + j) % 39 for j in range(n)], "max_tokens": count} for i, (n, count) in enumerate(requests)]
    )
    assert [len(t) for t in tokens] == [count for _, count in requests]
    records = [r for r in run.records if r["kind"] == abi.Record.TOKEN]
    steps = [{int(r["request"]) for r in step} for _, step in groupby(records, key=lambda r: int(r["time_ns"]))]
    total = int(run.host[: abi.Mailbox.itemsize].view(abi.Mailbox)[0]["header"]["steps"])
    run.device.close()
    return steps, total


def numbers(steps: list[set[int]], request: int) -> list[int]:
    """In which steps a request got its tokens."""
    return [i for i, step in enumerate(steps) if request in step]


def longest_gap(steps: list[set[int]], request: int) -> int:
    return max(b - a for a, b in pairwise(numbers(steps, request)))


@pytest.mark.parametrize(("rows", "prompt"), [(8, 2000), (4, 300), (2, 40)])
def test_a_prompt_costs_the_one_that_decodes_no_step(rows, prompt):
    """It has a row in every step; all others are the prompt's."""
    length = -(-prompt // (rows - 1)) + 10
    steps, total = steps_of(rows, 2, [(1, length), (prompt, 2)])
    assert numbers(steps, 0) == list(range(length)) and total == len(steps)
    assert numbers(steps, 1)[0] <= -(-prompt // (rows - 1)) + 2, "the plan of a step or two had left when it came"


def test_with_a_row_for_each_slot_everybody_has_one_in_every_step():
    steps, _ = steps_of(4, 4, [(1, 60), (1, 60), (1, 60), (40, 3)])
    assert [longest_gap(steps, i) for i in range(4)] == [1, 1, 1, 1]
    assert 40 <= numbers(steps, 3)[0] <= 44


@pytest.mark.parametrize(("rows", "slots"), [(2, 5), (1, 3), (3, 8), (8, 16), (1, 2)])
def test_a_prompt_is_not_starved_by_sequences_that_fill_every_step(rows, slots):
    """All slots but one decode all the time. Nobody waits for more than a turn of everybody, the prompt included."""
    prompt, turn = 12, -(-slots // rows)
    steps, total = steps_of(rows, slots, [(1, 50)] * (slots - 1) + [(prompt, 5)])
    for i in range(slots):
        assert longest_gap(steps, i) <= turn
    arrived = slots + 2  # descriptors are taken one at a time
    assert numbers(steps, slots - 1)[0] <= arrived + prompt * turn
    idle = rows * total - sum(prompt + count - 1 for prompt, count in [(1, 50)] * (slots - 1) + [(prompt, 5)])
    assert idle <= rows * (arrived + 50), "while somebody waits every row is used: what is idle is at the begin and the end"


@pytest.mark.parametrize(("rows", "decoding"), [(8, 1), (2, 4)])
def test_prompts_are_answered_in_order(rows, decoding):
    """They share a turn: none overtakes an older one, and the first has all rows that are left."""
    prompts = [50, 7, 30, 7]
    steps, _ = steps_of(rows, decoding + len(prompts), [(1, 200)] * decoding + [(n, 2) for n in prompts])
    firsts = [numbers(steps, decoding + i)[0] for i in range(len(prompts))]
    assert firsts == sorted(firsts)
    if decoding < rows:
        assert firsts[0] <= -(-prompts[0] // (rows - decoding)) + 3


@pytest.mark.parametrize("prompt", [1, 500], ids=["while it decodes", "in its prompt"])
@pytest.mark.parametrize("looks", [0, 1, 5, 20, 40])  # of the mailbox at its ring, before it finds the cancel
def test_a_cancel_frees_within_three_steps(prompt, looks):
    """Counted in tokens of another sequence, which has one in every step."""
    run = kernel(4, 2, 600)
    noops = [(abi.Command.NOOP, {})] * looks
    run.decode(
        [{"prompt": [3], "max_tokens": 90}, {"prompt": [5] * prompt, "max_tokens": 90}],
        [*noops, (abi.Command.CANCEL, {"request": 1})],
    )
    kinds = [(int(r["kind"]), int(r["request"])) for r in run.records]
    taken = next(i for i, r in enumerate(run.records) if r["kind"] == abi.Record.ACK and r["token"] == looks + 3)
    released = kinds.index((abi.Record.RELEASE, 1))
    assert run.records[released]["finish"] == abi.Finish.CANCELLED
    between = kinds[min(taken, released) : max(taken, released)]
    assert between.count((abi.Record.TOKEN, 0)) <= 3 and (abi.Record.TOKEN, 1) not in between
    run.device.close()


def test_a_cancel_is_taken_though_every_step_keeps_the_mailbox_busy():
    """Twenty log-probabilities a token, in 16 rows: the next step has ended by the time the mailbox has written one's records."""
    config = replace(CONFIG, intermediate_size=32, vocab_size=64)
    device = SimDevice(lanes=1, num_blocks=4, mode="rr", preempt=1)
    shape = planner.make_shape(config, max_rows=16, num_slots=16, max_model_len=1024, machine=device.machine)
    wanted = sampling_of(SamplingParams(temperature=0, logprobs=abi.MAX_LOGPROBS), 1, 0, (), config.vocab_size)
    with Served(device, config, DummyWeights(config, seed=3), shape, max_model_len=1024) as run:
        posted, taken, seen = {}, [], []
        cancel, poll = run.mailbox.cancel, run.mailbox.poll

        def cancelled(*words):
            sequence = cancel(*words)
            posted[sequence] = run.mailbox.steps
            return sequence

        def polled(*limit):
            for record in (records := poll(*limit)):
                if record.kind == abi.Record.TOKEN:
                    seen.append(record.index)
                elif record.kind == abi.Record.ACK and record.token in posted:
                    taken.append(max(seen) + 1 - posted[record.token])  # a token a step
            return records

        run.mailbox.cancel, run.mailbox.poll = cancelled, polled
        requests = [run.submit([1 + i], 900, sampling=wanted) for i in range(16)]
        while run.mailbox.steps < 30:
            time.sleep(0.002)
        for request in requests[:3]:
            run.engine.cancel(request)
        limit = time.monotonic() + 60
        while len(taken) < 3 and time.monotonic() < limit:
            time.sleep(0.002)
        for request in requests[3:]:
            run.engine.cancel(request)
    assert len(taken) >= 3 and max(taken) < 30, f"steps until each was taken: {taken}"
    device.close()
