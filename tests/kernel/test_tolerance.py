"""The bounded math says what model/phases.py says, and lets through neither a wrong element nor one that is no number."""

from __future__ import annotations

import numpy as np
import pytest

from imex_persist.model import phases
from imex_persist.model.bf16 import round_bf16
from imex_persist.model.phases import EXACT
from imex_persist.model.rope import rope_table

from . import tolerance
from .cases import CASES
from .pages import key_places, value_places
from .tolerance import Bounded, check


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_the_math_is_the_reference_s(rng):
    rows, hidden, heads, kv_heads, dim = 3, 48, 6, 2, 64
    x = round_bf16(rng.standard_normal((rows, hidden)))
    weight = rng.standard_normal(((heads + 2 * kv_heads) * dim, hidden))
    rope = rope_table(CASES[0].config, rows, 7)[:, : dim // 2]
    y = tolerance.rotated(tolerance.product(Bounded.exact(x), weight), rope, heads + kv_heads)
    expected = phases.qkv(x, weight, rope, heads + kv_heads, EXACT)
    np.testing.assert_allclose(y.value.reshape(expected.shape), expected, rtol=1e-12, atol=1e-12)
    q, kv = expected[0, :heads], expected[:, heads:].reshape(rows, 2, kv_heads, dim)
    out = tolerance.attended(q, kv[:, 0], kv[:, 1], 0.125)
    np.testing.assert_allclose(out.value, phases.attention(q, kv[:, 0], kv[:, 1], 0.125, EXACT), rtol=1e-12, atol=1e-12)
    gate = tolerance.activated(tolerance.product(Bounded.exact(x), weight))
    np.testing.assert_allclose(gate.value, phases.gate_up(x, weight, EXACT), rtol=1e-12, atol=1e-12)
    norm = rng.uniform(0.8, 1.2, hidden)
    got = tolerance.normed(x.astype(np.float32), norm, 1e-5, 40)
    np.testing.assert_allclose(got.value, phases.rms_norm(x, norm, 1e-5, 40, EXACT), rtol=tolerance.BF16)


def test_a_wrong_element_is_found(rng):
    x, weight = round_bf16(rng.standard_normal((4, 512))), round_bf16(rng.standard_normal((40, 512)))
    expected = tolerance.product(Bounded.exact(x), weight)
    right = (x.astype(np.float32) @ weight.astype(np.float32).T).astype(np.float32)
    assert check("product", right, expected) < 0.25
    check("product", round_bf16(right), expected, "bfloat16")
    with pytest.raises(AssertionError, match="too far off"):
        check("product", round_bf16(right), expected)  # rounded where it must not be
    for wrong in (np.nan, np.inf, 0, right[1, 7] * 1.01):
        spoiled = right.copy()
        spoiled[1, 7] = wrong
        with pytest.raises(AssertionError, match=r"1 of 160 .* worst at \(1, 7\)"):
            check("product", spoiled, expected)


@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_pages_have_a_place_for_everything(dim):
    """Each key and value of a page has a place of its own, and there is no place left."""
    positions = np.arange(CASES[0].page_size)
    places = np.concatenate([key_places(dim, positions).ravel(), value_places(dim, positions).ravel()])
    np.testing.assert_array_equal(np.sort(places), np.arange(2 * len(positions) * dim))
