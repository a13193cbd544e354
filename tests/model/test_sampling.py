"""The NumPy reference of drawing, against published numbers and small cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from imex_persist import SamplingParams, abi
from imex_persist.abi import Draw
from imex_persist.model import sampling
from imex_persist.runtime.sampling import sampling_of


def of(params: SamplingParams, vocab_size: int = 8, **more):
    return sampling_of(params, more.pop("prompt_len", 1), params.min_tokens, more.pop("eos", ()), vocab_size)


def record(vocab_size: int = 8, **params) -> np.void:
    found = of(SamplingParams(**{"seed": 1, "logprobs": 0, **params}), vocab_size)
    return np.array(found.words, np.uint32).view(abi.Sampling)[0]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's known answers, philox4x32 with ten rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox(counter, key, words):
    assert sampling.philox(np.array([counter], np.uint32), key).tolist() == [list(words)]


def test_gumbel_is_gumbels():
    """At quantiles of the bits, and at their ends."""
    u = np.array([0.01, 0.2, 0.5, 0.9, 0.999])
    got = sampling.gumbel((u * 2**32).astype(np.uint32))
    np.testing.assert_allclose(got, -np.log(-np.log1p(-u)), rtol=1e-5, atol=1e-6)
    ends = sampling.gumbel(np.array([0, 2**32 - 1], np.uint32))
    np.testing.assert_allclose(ends, [math.log(2) * 33, -math.log(math.log(2) * 24)], rtol=1e-5)


def test_penalties_in_vllms_order():
    x = sampling.scale(
        np.array([2.0, -2.0, 2.0, -2.0, 1.0], np.float32),
        record(5, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, temperature=0.5),
        prompt=[0, 1],
        generated=[2, 2, 3],
    )
    assert x.tolist() == [2 * 1.0, 2 * -4.0, 2 * (1 - 0.5 - 0.5), 2 * (-4 - 0.25 - 0.5), 2 * 1.0]


def test_what_is_left():
    p = np.array([0.4, 0.3, 0.2, 0.06, 0.04])
    x = np.log(p).astype(np.float32)

    def left(**params):
        return np.flatnonzero(sampling.allowed(x, record(5, **params))).tolist()

    assert left() == [0, 1, 2, 3, 4]
    assert left(top_k=2) == [0, 1]
    assert left(top_k=5) == left(top_k=-1) == left(top_k=99) == [0, 1, 2, 3, 4]
    assert left(top_p=0.65) == [0, 1]
    assert left(top_p=0.75) == [0, 1, 2]
    assert left(top_p=1e-9) == [0]
    assert left(min_p=0.4) == [0, 1, 2]
    assert left(min_p=1.0) == [0]
    assert left(top_k=3, top_p=0.75) == [0, 1], "0.75 of what top_k leaves, 0.9"
    assert left(min_p=0.4, top_k=4) == [0, 1, 2]
    assert left(temperature=0, top_k=1, logprobs=0) == [0, 1, 2, 3, 4]


def test_min_tokens_masks():
    s = record(4, min_tokens=2, stop_token_ids=[3], max_tokens=5)
    x = np.array([0, 0, 0, 9], np.float32)
    assert [sampling.draw(x, s, (), [0] * i) == 3 for i in range(3)] == [False, False, True]


def test_what_is_plainly_greedy():
    assert of(SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.1, seed=4, min_tokens=4)) is None
    for params, draw, whole in (
        ({"temperature": 1}, Draw.SAMPLED, False),
        ({"temperature": 0, "logprobs": 0}, Draw.SAMPLED, False),
        ({"temperature": 0, "presence_penalty": 1}, Draw.SAMPLED, False),
        ({"temperature": 0, "repetition_penalty": 1.1}, Draw.ALL, True),
        ({"temperature": 0, "min_tokens": 2, "stop_token_ids": [1]}, Draw.MASKED, False),
    ):
        found = of(SamplingParams(**params))
        assert (found.draw, found.needs_whole_prompt) == (draw, whole)
        assert len(found.words) == abi.SAMPLING_WORDS
    assert of(SamplingParams(temperature=0, min_tokens=2), eos=(7,)).draw == Draw.MASKED
    assert of(SamplingParams(temperature=0, logprobs=20), vocab_size=6).num_logprobs == 7


def test_seeds():
    assert [record(seed=seed)["seed"].tolist() for seed in (5, -1, 2**64 - 1)] == [[5, 0], [2**32 - 1] * 2, [2**32 - 1] * 2]
    assert of(SamplingParams()).words != of(SamplingParams()).words, "without a seed one is drawn"


def test_something_must_be_left():
    with pytest.raises(ValueError, match="nothing is left to generate"):
        of(SamplingParams(min_tokens=1, stop_token_ids=[0, 1, 2]), vocab_size=4, eos=(3,))
