"""SamplingParams: vLLM's names and defaults, and one sentence for each mistake."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest

from imex_persist import SamplingParams


def test_defaults_are_vllms():
    p = SamplingParams()
    assert (p.n, p.temperature, p.top_p, p.top_k, p.min_p, p.seed) == (1, 1.0, 1.0, 0, 0.0, None)
    assert (p.stop, p.stop_token_ids, p.ignore_eos, p.max_tokens, p.min_tokens) == ([], [], False, 16, 0)
    assert (p.logprobs, p.skip_special_tokens, p.include_stop_str_in_output) == (None, True, False)
    assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 1.5),
        ("n", 0),
        ("max_tokens", 0),
        ("max_tokens", 1.0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("logprobs", 21),
        ("logprobs", -1),
        ("seed", "x"),
        ("stop", [""]),
        ("stop", 3),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", 3),
        ("stop_token_ids", list(range(17))),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("ignore_eos", 1),
        ("skip_special_tokens", "yes"),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value)


def test_params_are_named():
    with pytest.raises(TypeError):
        SamplingParams(2)


def test_params_do_not_change():
    with pytest.raises(FrozenInstanceError):
        SamplingParams().temperature = 0


def test_stop_is_a_list():
    assert SamplingParams(stop="x").stop == ["x"]
    assert SamplingParams(stop=("a", "b")).stop == ["a", "b"]


def test_several_greedy_completions_would_be_the_same():
    with pytest.raises(ValueError, match="n is 2 but temperature 0"):
        SamplingParams(temperature=0, n=2)
    assert SamplingParams(n=2).n == 2


@pytest.mark.parametrize(
    "name", ["best_of", "logit_bias", "prompt_logprobs", "bad_words", "allowed_token_ids", "logits_processors"]
)
def test_what_is_not_supported_is_refused_by_name(name):
    with pytest.raises(TypeError, match=name):
        SamplingParams(**{name: 1})
