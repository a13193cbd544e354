"""Pages of earlier requests stand for the beginning of a prompt: not a bit may differ from computing it again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from imex_persist.abi import Phase
from imex_persist.model.dummy import DummyWeights
from imex_persist.planner import make_shape
from imex_persist.tap import tap_view

from .cases import model
from .serving import Served, tokens_of
from .whole import WEAK

CONFIG = model(
    hidden_size=96, head_dim=128, num_attention_heads=6, num_key_value_heads=3, intermediate_size=160, vocab_size=201,
    num_hidden_layers=2,
)  # fmt: skip
PAGE = 32
LONGEST = 512


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng([salt, length]).integers(0, 201, length)]


def served(
    make_device, world_size: int, *, rows: int = 4, slots: int = 3, pages: int = 40, device_options=None, **options
) -> Served:
    device = make_device(4, **(device_options or {}))
    shape = make_shape(
        CONFIG, world_size=world_size, max_rows=rows, num_slots=slots, num_pages=pages, max_model_len=LONGEST,
        machine=device.machine, tap=True,
    )  # fmt: skip
    return Served(device, CONFIG, DummyWeights(CONFIG, 3), shape, max_model_len=LONGEST, **options)


@dataclass
class Seen:
    """What one request leaves behind that its company must not change."""

    tokens: list[int]
    logits: list[np.ndarray]  # of each rank's part of the vocabulary, in its last step
    keys: list[np.ndarray]
    cached: int


def observe(run: Served, prompt: list[int], max_tokens: int) -> Seen:
    """The last request of a run: alone in its last step, and nobody writes to its pages afterwards."""
    request = run.submit(prompt, max_tokens)
    tokens = tokens_of(request)
    run.check_all_is_back()
    run.close()
    logits = [tap_view(run.tap(r), run.shape, Phase.LM_HEAD, 0)[0].copy() for r in range(run.world)]
    keys = run.keys_and_values(request, len(prompt) + max_tokens - 1)
    return Seen(tokens, logits, keys, request.num_cached_tokens)


def same(a: Seen, b: Seen) -> None:
    assert a.tokens == b.tokens
    for one, other in zip(a.logits, b.logits, strict=True):
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32), "logits of the last step")
    for rank, (one, other) in enumerate(zip(a.keys, b.keys, strict=True)):
        np.testing.assert_array_equal(one, other, f"keys and values of rank {rank}")


def two_turns(make_device, world_size: int, first: int, **options) -> None:
    """A conversation's second turn, with what its first left behind and without."""
    schedule = options.pop("device_options", None)
    with served(make_device, world_size, **options) as run:
        prompt = prompt_of(first)
        turn = [*prompt, *run.answer(prompt, 40), *prompt_of(9, 1)]
        shared = observe(run, turn, 6)
    assert shared.cached == (first + 39) // PAGE * PAGE
    with served(make_device, world_size, share_pages=False, **options) as run:
        alone = observe(run, turn, 6)
    assert alone.cached == 0
    same(alone, shared)
    if schedule:
        for seed in range(2):
            with served(make_device, world_size, device_options=schedule | {"seed": seed}, **options) as run:
                assert [*prompt, *run.answer(prompt, 40), *prompt_of(9, 1)] == turn
                again = observe(run, turn, 6)
            assert again.cached == shared.cached
            same(alone, again)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_second_turn(make_device, world_size):
    two_turns(make_device, world_size, 50, device_options=WEAK)


def test_a_context_that_is_cut_into_runs(make_device):
    two_turns(make_device, 2, 300, rows=8)


@pytest.mark.parametrize("world_size", [1, 3])
def test_many_share_at_once(make_device, world_size):
    """All at the same time, each going its own way after the shared beginning, with too few pages to keep everything."""
    system = prompt_of(70)
    prompts = [[*system, *prompt_of(5 + 9 * i, i)] for i in range(6)]
    with served(make_device, world_size, share_pages=False) as run:
        alone = [run.answer(prompt, 10) for prompt in prompts]
    with served(make_device, world_size, pages=17, device_options=WEAK) as run:
        run.answer(system, 2)
        for _ in range(2):
            requests = [run.submit(prompt, 10) for prompt in prompts]
            assert [tokens_of(request) for request in requests] == alone
            assert all(request.num_cached_tokens >= 64 for request in requests)
            assert len({request.reservation.pages[0] for request in requests}) == 1
        run.check_all_is_back()


def test_what_a_ghost_wrote_is_not_used(make_device):
    """A request that ends by a stop token has one more row, which would fill a page here. Nobody has told the host that it ran."""
    with served(make_device, 1, share_pages=False) as run:
        for count in range(3, 20):  # tokens, of which the last is to stop
            prompt = prompt_of(PAGE)[: PAGE - count]
            tokens = run.answer(prompt, count)
            if tokens[-1] not in tokens[:-1]:
                break
    with served(make_device, 1) as run:
        assert run.answer(prompt, 30, stop_token_ids=(tokens[-1],)) == tokens
        run.check_all_is_back()
        assert run.engine.kept_pages == 0
        turn = run.submit([*prompt, *tokens, 5], 4)
        tokens_of(turn)
        assert turn.num_cached_tokens == 0
        run.check_all_is_back()
        assert run.engine.kept_pages == 1


def test_the_page_table_of_a_new_request_is_whole(make_device):
    """In every rank's memory: all that is reserved, more pages than lanes fetch at once, and beside it the other slot's."""
    device = make_device(2)
    shape = make_shape(
        CONFIG, world_size=2, max_rows=2, num_slots=2, num_pages=300, max_model_len=8192, machine=device.machine
    )  # fmt: skip
    with Served(device, CONFIG, DummyWeights(CONFIG, 3), shape, max_model_len=8192) as run:
        requests = [run.submit([7, 8, 9], count) for count in (5000, 4000)]
        for request in requests:
            request.events.get(timeout=60)
    reserved = [request.reservation.pages for request in requests]
    assert [len(pages) for pages in reserved] == [157, 126]
    for rank in run.ranks:
        table = device.download(rank.symmetric, int(shape["off_page_table"]) * 8, 2 * 256 * 4).view(np.uint32).reshape(2, 256)
        for request, pages in zip(requests, reserved, strict=True):
            assert table[request.slot, : len(pages)].tolist() == pages and not table[request.slot, len(pages) :].any()


def test_a_cancel_frees_within_three_steps_of_the_call(make_device):
    """From `Engine.cancel` to the moment when its slot and pages are free; a busy machine may delay the host, not every time."""
    took = []
    with served(make_device, 1, rows=8) as run:
        for i in range(6):
            request = run.submit([i, 1, 2], 300)
            while len(request.generated) < 5:
                pass
            steps = run.mailbox.steps
            run.engine.cancel(request)
            run.check_all_is_back()
            took.append(run.mailbox.steps - steps)
    assert min(took) <= 3, took


def test_what_a_cancelled_prompt_left_is_not_used(make_device):
    with served(make_device, 2, rows=1) as run:
        request = run.submit(prompt_of(400), 4)
        while run.mailbox.steps < 80:
            pass
        run.engine.cancel(request)
        run.check_all_is_back()
        assert run.mailbox.steps < 400 and run.engine.kept_pages == 0
