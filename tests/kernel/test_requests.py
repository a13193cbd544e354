"""Many random requests at once: each must be, bit for bit, what it is alone, and in the end everything must be back.

`make test` runs a part of them; all, more than 2,000, are `full`.
"""

from __future__ import annotations

import numpy as np
import pytest

from imex_persist.device.sim import SimDevice
from imex_persist.model.dummy import DummyWeights
from imex_persist.model.reference import Reference
from imex_persist.planner import make_shape
from imex_persist.runtime import inputs
from imex_persist.sampling_params import SamplingParams

from .cases import model
from .serving import Served
from .traffic import Client, Sizes, Wanted, check_ends, traffic
from .whole import WEAK, logit_limit

CONFIG = model(
    hidden_size=64, head_dim=128, num_attention_heads=3, num_key_value_heads=3, intermediate_size=96, vocab_size=211,
    num_hidden_layers=2,
)  # fmt: skip
LONGEST = 300
SIZES = Sizes(vocab_size=211, max_model_len=LONGEST, systems=(40, 70, 97, 200), tail=24, max_tokens=20, crowd=14)
EOS = (0,)
MACHINES = {  # world size -> (rows, slots, pages, schedule): few pages, so that requests wait for them and kept ones are given up
    1: (8, 8, 40, {}),
    2: (3, 5, 30, WEAK),
    3: (4, 4, 24, {"mode": "random"}),
}


def serve(world_size: int, rows: int, slots: int, pages: int, schedule: dict, **options) -> Served:
    device = SimDevice(lanes=1, num_blocks=3, **schedule)
    shape = make_shape(
        CONFIG, world_size=world_size, max_rows=rows, num_slots=slots, num_pages=pages, max_model_len=LONGEST,
        machine=device.machine,
    )  # fmt: skip
    return Served(device, CONFIG, DummyWeights(CONFIG, 5), shape, max_model_len=LONGEST, **options)


def client_of(run: Served) -> Client:
    def submit(prompt, params, sink):
        return run.engine.submit(inputs.submission(prompt, params, EOS, LONGEST, SIZES.vocab_size), sink)

    return Client(submit, run.engine.cancel, SIZES)


def alone(one: Wanted) -> Wanted:
    """The same request for an engine that has nothing else to do; cancelled ones run to their end."""
    return Wanted(one.prompt, one.params, 1)


def check_margins(world_size: int, wanted: list[Wanted]) -> None:
    """Greedy tokens have the reference's largest logit, or one that its tolerance cannot tell from it."""
    reference = Reference(CONFIG, DummyWeights(CONFIG, 5), world_size=world_size)
    plain = [one for one in wanted if one.tokens and takes_the_largest_logit(one.params)]
    for one in plain:
        logits = reference.forward(reference.sequence(), [*one.prompt, *one.tokens[:-1]])[len(one.prompt) - 1 :]
        margins = logits.max(axis=1) - logits[np.arange(len(one.tokens)), one.tokens]
        assert np.all(margins <= 2 * logit_limit(logits)), f"{one.tokens} after {one.prompt} are not greedy: {margins}"
    assert plain


def takes_the_largest_logit(params: SamplingParams) -> bool:
    """Without penalties, nor stop tokens that are masked for a while."""
    changed = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty or params.min_tokens
    return params.greedy and not changed


def check_requests(world_size: int, count: int, margins: int) -> None:
    wanted = traffic(world_size, count, SIZES)
    with serve(world_size, *MACHINES[world_size]) as run:
        client_of(run).run(wanted)
        run.check_all_is_back()
        engine = run.engine
        assert engine.num_cached_tokens > engine.num_prompt_tokens // 10, "hardly anything was shared"
    ends = check_ends(wanted)
    assert ends.keys() >= {"length", "stop", "abort"}
    rows, slots, pages, _ = MACHINES[world_size]
    again = [alone(one) for one in wanted]
    with serve(world_size, rows, slots, pages, {}, share_pages=False) as run:
        client_of(run).run(again)
        run.check_all_is_back()
        assert run.engine.num_cached_tokens == run.engine.kept_pages == 0
    for i, (one, other) in enumerate(zip(wanted, again, strict=True)):
        told, whole = one.told(), other.told()
        if one.finish_reason == "abort":
            whole = whole[: len(told)]
        assert told == whole, f"request {i} (prompt of {len(one.prompt)}, {one.request.num_cached_tokens} cached, {one.params})"
    check_margins(world_size, wanted[:: max(1, count // margins)])


@pytest.mark.parametrize("world_size", MACHINES)
def test_a_seeded_part(world_size):
    check_requests(world_size, 50, 10)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world_size", MACHINES)
def test_all(world_size):
    """2,100 requests in all."""
    check_requests(world_size, 700, 200)
