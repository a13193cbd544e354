"""Drawing over whole generations of a model whose logits are known (drawing.py): exact distributions, and token for token the reference.

Chi-square at 10^-4, on seeds that do not change. With N draws it finds, 99 times in 100, an error that moves a share e of all
probability from one quarter to another where 8 N e^2 > 65: 2 % with the 20,000 draws of every day, 0.9 % with 100,000.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from imex_persist.model import sampling as reference

from .cases import uses
from .drawing import FlatModel, check_token, flat_case, random_params, sampling_record

LOGITS = np.random.default_rng(3).normal(0, 1, 24)
SAMPLERS = {
    "temperature 1": {},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 3": {"temperature": 3},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.05},
    "all": {"temperature": 1.7, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
}
EACH = 150  # tokens of a request; sixteen of them stay below what the record ring holds
WORLDS = pytest.mark.parametrize("world_size", [1, 2, 3, 4])


def slow(make_device) -> bool:
    """A thread a fiber."""
    return getattr(make_device, "lanes", 1) == 32


def flat(vocab_size: int):
    """Marks a test with the kernels of a flat model."""
    default = vocab_size
    return uses(lambda world_size=1, vocab_size=default, **_: [(flat_case(vocab_size, world_size), {"tap": True})])


def check_chi_square(counts: np.ndarray, p: np.ndarray) -> None:
    """Pearson's, tokens of less than five expected draws together."""
    assert not counts[p == 0].any(), f"drawn though impossible: {np.flatnonzero((p == 0) & (counts > 0))}"
    expected = counts.sum() * p
    rare = expected < 5
    groups = [(counts[i], expected[i]) for i in np.flatnonzero(~rare)]
    if expected[rare].sum() > 0:
        groups.append((counts[rare].sum(), expected[rare].sum()))
    statistic, free = sum((o - e) ** 2 / e for o, e in groups), len(groups) - 1
    assert free >= 2, "a distribution that no test can see"
    z = 3.719  # 1 - 10^-4 of the normal distribution, which Wilson and Hilferty take to chi-square's
    limit = free * (1 - 2 / (9 * free) + z * math.sqrt(2 / (9 * free))) ** 3
    assert statistic < limit, f"chi-square {statistic:.1f} of {free} degrees of freedom, at most {limit:.1f}"


@pytest.mark.parametrize("draws", [20_000, pytest.param(100_000, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", SAMPLERS)
@flat(24)
def test_distribution(make_device, name, draws):
    if slow(make_device):
        pytest.skip(
            "a thread a fiber is too slow for as many draws: test_tokens_are_the_references compares those of both forms"
        )
    m = FlatModel(make_device, LOGITS)
    counts, seed = np.zeros(24, np.int64), 0
    while counts.sum() < draws:
        requests = [m.request([1], seed=seed + i, max_tokens=EACH, **SAMPLERS[name]) for i in range(16)]
        counts += np.bincount(np.concatenate(m.decode(requests)), minlength=24)
        seed += 16
    check_chi_square(counts, reference.distribution(m.logits, sampling_record(requests[0]["sampling"])))


@flat(24)
def test_distribution_with_penalties(make_device):
    """Probabilities change with every token: how often each came, less what was expected, against its standard deviation."""
    if slow(make_device):
        pytest.skip("as test_distribution")
    m = FlatModel(make_device, LOGITS)
    excess, variance = np.zeros(24), np.zeros(24)
    params = {"presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.2, "max_tokens": 40}
    for seed in range(0, 320, 16):
        requests = [m.request([1, 7], seed=seed + i, **params) for i in range(16)]
        for r, tokens in zip(requests, m.decode(requests), strict=True):
            for i, token in enumerate(tokens):
                p = reference.distribution(m.logits, sampling_record(r["sampling"]), r["prompt"], tokens[:i])
                excess -= p
                excess[token] += 1
                variance += p * (1 - p)
    z = excess / np.sqrt(variance)
    assert np.abs(z).max() < 4.5, f"standard deviations {z}"  # 24 tokens: more by chance once in 6,000 tests


# ------------------------------------------------------------------------------------------------ token for token
def check_request(m: FlatModel, request: dict, tokens: list[int]) -> None:
    sampling, stop = request["sampling"], request["stop"]
    s = sampling_record(sampling) if sampling else sampling_record(m.request([1], logprobs=0, temperature=0)["sampling"])
    for i, token in enumerate(tokens):
        check_token(f"token {i}", token, m.logits, s, request["prompt"], tokens[:i])
        assert token not in stop or (i >= request["min_tokens"] and i == len(tokens) - 1)
    assert len(tokens) == request["max_tokens"] or tokens[-1] in stop


@WORLDS
@pytest.mark.parametrize("vocab_size", [50, 131])
@flat(131)
def test_tokens_are_the_references(make_device, world_size, vocab_size):
    """Penalties over whole generations, prompts of several steps, requests that come and go; some logits are equal."""
    if slow(make_device) and (vocab_size == 50 or world_size > 2):
        pytest.skip("a thread a fiber: one vocabulary on one and two ranks")
    rng = np.random.default_rng([world_size, vocab_size])
    m = FlatModel(make_device, np.round(rng.normal(0, 2, 131)[:vocab_size], 1), world_size)
    for _ in range(1 if slow(make_device) else 3):
        requests = [
            m.request(rng.integers(0, vocab_size, int(rng.integers(1, 9))).tolist(), **random_params(rng, vocab_size))
            for _ in range(5 if slow(make_device) else 12)
        ]
        for request, tokens in zip(requests, m.decode(requests), strict=True):
            check_request(m, request, tokens)


@uses(lambda: [(flat_case(24, world_size), {"tap": True}) for world_size in (1, 2, 3, 4)])
def test_a_seed_is_a_sequence(make_device):
    """Whatever the company, the slot, the number of ranks: these logits have the same bits on any number of ranks."""
    kinds = [SAMPLERS[name] for name in ("temperature 1", "all", "top_p")]
    prompt, known = [3, 4], {}
    for world_size in (1, 2) if slow(make_device) else (1, 2, 3, 4):
        m = FlatModel(make_device, LOGITS, world_size)
        for company in (1, 4):
            requests = [m.request([1] * (i + 1), max_tokens=5 + i, seed=i) for i in range(company - 1)]
            requests += [m.request(prompt, seed=77, max_tokens=12, **kind) for kind in kinds]
            for kind, tokens in enumerate(m.decode(requests)[company - 1 :]):
                assert known.setdefault(kind, tokens) == tokens
    other = FlatModel(make_device, LOGITS).decode([m.request(prompt, seed=78, max_tokens=12)])[0]
    assert other != known[0]


@pytest.mark.parametrize("world_size", [1, 3])
@flat(24)
def test_epochs_begin_again_in_the_middle_of_draws(make_device, world_size):
    """Searches count their rounds anew after a renewal, and log-probabilities find no words of before."""
    if not hasattr(make_device, "lanes"):
        pytest.skip(
            "of the simulator: on a GPU each number of steps is a build of its own, and renewals are not what is asked here"
        )
    known = None
    for renew_steps in (None, 4, 1):
        m = FlatModel(make_device, LOGITS, world_size, renew_steps=renew_steps)
        tokens = m.decode([m.request([1, 2], seed=i, logprobs=2, max_tokens=9, **SAMPLERS[n]) for i, n in enumerate(SAMPLERS)])
        seen = tokens, [m.logprobs(i) for i in range(len(tokens))]
        known = known or seen
        assert seen == known, f"epochs of {renew_steps} steps"


@pytest.mark.parametrize(
    ("params", "possible"),
    [
        ({"top_k": 2}, {0, 1, 2, 3}),  # the second equals the third and the fourth
        ({"top_k": 4}, {0, 1, 2, 3}),
        ({"top_k": 1}, {0}),
        ({"top_p": 0.5}, {0, 1, 2, 3}),  # the first has 0.4 of the mass, and one of the next three would do
        ({"top_p": 0.3}, {0}),
        ({"min_p": math.exp(-1.001)}, {0, 1, 2, 3}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 5, "top_p": 0.99}, {0, 1, 2, 3, *range(4, 9)}),
    ],
)
@flat(24)
def test_equal_logits(make_device, params, possible):
    """What equals the last token that top_k or top_p leaves, is left too."""
    m = FlatModel(make_device, [2.0, 1.0, 1.0, 1.0, *[-2.0] * 5, *[-6.0] * 15])
    count, temperature = 2 if slow(make_device) else 16, 3 if "top_k" in params else 1
    requests = [m.request([1], seed=i, temperature=temperature, max_tokens=40, **params) for i in range(count)]
    drawn = set(np.concatenate(m.decode(requests)).tolist())
    assert drawn <= possible and (drawn == possible or slow(make_device))


@WORLDS
@flat(50)
def test_logprobs(make_device, world_size):
    """Of raw logits, whatever penalties and temperature do; the token's own first, then the most probable ones in order."""
    if slow(make_device) and world_size > 2:
        pytest.skip("a thread a fiber: on one and two ranks")
    rng = np.random.default_rng(world_size)
    m = FlatModel(make_device, rng.normal(0, 2, 50), world_size)
    wanted = [0, 20] if slow(make_device) else [0, 1, 5, 20]
    requests = [
        m.request([1, 2], logprobs=n, seed=n, temperature=t, presence_penalty=1, max_tokens=6) for n in wanted for t in (0, 2)
    ]
    requests.append(m.request([1, 2], temperature=0, max_tokens=6))
    tokens, exact = m.decode(requests), reference.log_softmax(m.logits)
    order = np.argsort(-m.logits, kind="stable")
    for i in range(len(requests)):
        found = m.logprobs(i)
        if i == len(requests) - 1:
            assert found == [[]] * 6
            continue
        for token, (own, *best) in zip(tokens[i], found, strict=True):
            assert own[0] == token and own[2] == int(np.count_nonzero(m.logits >= m.logits[token]))
            assert [b[0] for b in best] == order[: wanted[i // 2]].tolist()
            assert [b[2] for b in best] == list(range(1, len(best) + 1))
            for id, logprob, _ in (own, *best):
                assert abs(logprob - exact[id]) < 1e-5 * max(1, abs(exact[id]))
