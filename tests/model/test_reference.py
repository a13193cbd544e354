"""The reference against transformers' goldens, against itself on several ranks, and its phases against plain formulas."""

import numpy as np
import pytest

from imex_persist import abi
from imex_persist.model import phases
from imex_persist.model.bf16 import round_bf16
from imex_persist.model.config import ModelConfig
from imex_persist.model.dummy import DummyWeights
from imex_persist.model.phases import EXACT, KERNEL, Precision
from imex_persist.model.reference import Reference, generate, logits
from imex_persist.model.shard import model_shape
from imex_persist.model.weights import DictWeights
from tests.model.helpers import golden, random_tensors, tiny

GOLDENS = {name: case for name, case in golden("logits").items() if name != "made_with"}
FP32 = Precision(np.float32, rounding=False)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", sorted(GOLDENS))
def test_matches_transformers(name, world):
    case = GOLDENS[name]
    config = ModelConfig.from_dict(case["config"])
    source = DummyWeights(config, case["seed"])
    tokens = case["prompt"] + case["greedy"]
    got = logits(config, source, tokens, precision=EXACT, world_size=world)
    np.testing.assert_allclose(got[-1], case["last_logits"], atol=3e-5)  # goldens: fp32, five decimals
    assert generate(config, source, case["prompt"], 8, precision=EXACT, world_size=world) == case["greedy"]
    kernel = logits(config, source, tokens, world_size=world)
    assert abs(kernel[-1] - case["last_logits"]).max() < 0.08


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("world", [2, 3, 4, 5])
def test_ranks_add_up(world, tied):
    config = tiny(tie_word_embeddings=tied)
    source = DictWeights(random_tensors(config), config)
    tokens = [3, 1, 4, 1, 5, 92, 65]
    one = logits(config, source, tokens, precision=EXACT)
    shape = model_shape(config, world, down_slices=2)
    np.testing.assert_allclose(logits(config, source, tokens, precision=EXACT, shape=shape), one, atol=1e-12)


def test_one_pass_equals_step_by_step():
    config = tiny()
    reference = Reference(config, DummyWeights(config), precision=EXACT)
    tokens = [7, 8, 9, 10, 11]
    whole = reference.forward(reference.sequence(), tokens)
    sequence = reference.sequence()
    steps = [reference.forward(sequence, part) for part in ([7], [8, 9], [10], [11])]
    np.testing.assert_allclose(np.concatenate(steps), whole, atol=1e-12)
    assert sequence.length == 5 and whole.shape == (5, config.vocab_size)


def test_precisions_are_ordered():
    config = tiny(num_hidden_layers=3)
    source = DictWeights(random_tensors(config), config)
    tokens = list(range(20))
    exact = logits(config, source, tokens, precision=EXACT)
    fp32 = logits(config, source, tokens, precision=FP32)
    kernel = logits(config, source, tokens)
    assert exact.dtype == np.float64 and kernel.dtype == np.float32 == fp32.dtype
    assert abs(fp32 - exact).max() < 3e-5 < abs(kernel - exact).max() < 0.1


def test_token_ids_are_checked():
    config = tiny()
    reference = Reference(config, DummyWeights(config))
    for bad in ([], [101], [-1], [[1]]):
        with pytest.raises(ValueError, match="from 0 to 100"):
            reference.forward(reference.sequence(), bad)


# ------------------------------------------------------------------------------------------------ phases
RNG = np.random.default_rng(0)


def test_every_phase_has_its_function():
    assert all(callable(getattr(phases, phase.name.lower())) for phase in abi.Phase)


def test_rms_norm_divides_by_the_real_size_and_rounds_twice():
    residual, weight = RNG.standard_normal((3, 64)), RNG.standard_normal(64)
    residual[:, 40:] = weight[40:] = 0
    expected = residual / np.sqrt((residual**2).mean(axis=1, keepdims=True) * 64 / 40 + 1e-5) * weight
    np.testing.assert_allclose(phases.rms_norm(residual, weight, 1e-5, 40, EXACT), expected, atol=1e-12)
    rounded = phases.rms_norm(residual.astype(np.float32), weight.astype(np.float32), 1e-5, 40, KERNEL)
    twice = round_bf16(round_bf16(residual.astype(np.float32)) * weight.astype(np.float32))
    root = np.sqrt((round_bf16(residual.astype(np.float32)) ** 2).sum(axis=1, keepdims=True) / 40 + 1e-5)
    np.testing.assert_allclose(rounded, twice / root, rtol=1e-6)


def test_rotation_is_complex_multiplication_of_pairs():
    weight, x = RNG.standard_normal((3 * 8, 16)), RNG.standard_normal((2, 16))
    angle = RNG.standard_normal((2, 4))
    rope = np.stack([np.cos(angle), np.sin(angle)], axis=2)
    out = phases.qkv(x, weight, rope, 2, EXACT)
    plain = (x @ weight.T).reshape(2, 3, 8)
    turned = (plain[..., 0::2] + 1j * plain[..., 1::2]) * np.exp(1j * angle)[:, None]
    np.testing.assert_allclose(out[:, :2, 0::2] + 1j * out[:, :2, 1::2], turned[:, :2], atol=1e-12)
    np.testing.assert_allclose(out[:, 2], plain[:, 2], atol=1e-12)


def test_attention_reads_its_group():
    q, keys, values = RNG.standard_normal((6, 8)), RNG.standard_normal((5, 2, 8)), RNG.standard_normal((5, 2, 8))
    out = phases.attention(q, keys, values, 0.3, EXACT)
    for head in range(6):
        scores = np.exp(keys[:, head // 3] @ q[head] * 0.3)
        np.testing.assert_allclose(out[head], scores / scores.sum() @ values[:, head // 3], atol=1e-12)


def test_silu_survives_large_gates():
    out = phases.gate_up(np.ones((1, 2), np.float32), np.array([[-100, -100], [1, 1], [100, 100], [1, 1]], np.float32), FP32)
    np.testing.assert_array_equal(out, [[0, 400]])


def test_sample_takes_the_lowest_id_among_equals_and_no_padding():
    assert phases.sample(np.array([[1.0, 3.0, 3.0, 9.0], [0.0, -1.0, -2.0, 5.0]]), 3).tolist() == [1, 0]


def test_exchange_adds_in_rank_order():
    parts = [np.array([[1e8]], np.float32), np.array([[1.0]], np.float32), np.array([[-1e8]], np.float32)]
    assert phases.exchange(np.zeros((1, 1), np.float32), parts)[0, 0] == 0.0
