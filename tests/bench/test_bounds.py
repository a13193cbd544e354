"""The bounds: bytes counted from the shape against bytes counted by hand, and the read ceiling they are divided by."""

from __future__ import annotations

import json

import pytest

from imex_persist.bench.floor import Ceiling
from imex_persist.bench.steps import StepBytes, least_us
from imex_persist.model.config import ModelConfig
from imex_persist.model.locate import locate, shape_names
from imex_persist.planner import make_shape

PARAMETERS = {"llama-3.2-1b": 1_235_814_400, "llama-3.1-8b": 8_030_261_248, "llama-3.3-70b": 70_553_706_496}  # as published


def config_of(name: str) -> ModelConfig:
    return ModelConfig.from_folder(locate(name))


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_a_shape_has_the_parameters_of_its_model(name):
    c = config_of(name)
    hidden, kv = c.hidden_size, c.num_key_value_heads * c.head_dim
    layer = hidden * (2 * c.num_attention_heads * c.head_dim + 2 * kv) + 3 * hidden * c.intermediate_size + 2 * hidden
    embeddings = c.vocab_size * hidden * (1 if c.tie_word_embeddings else 2)
    assert c.num_hidden_layers * layer + embeddings + hidden == PARAMETERS[name]
    assert name in shape_names()


def test_a_step_of_one_row_reads_every_parameter_once():
    """Llama-3.2-1B on one rank: no padding, tied embeddings, so a step's bytes are its parameters and the row's embedding."""
    config = config_of("llama-3.2-1b")
    sizes = StepBytes.of(config, make_shape(config, max_model_len=4096))
    assert sizes.decode([0]) == 2 * PARAMETERS["llama-3.2-1b"] + 2 * config.hidden_size
    assert sizes.kv_per_position == config.num_hidden_layers * 2 * 8 * 64 * 2
    assert sizes.decode([100, 28]) - sizes.decode([0, 0]) == 128 * sizes.kv_per_position


def test_a_prompt_reads_weights_once_a_step_and_logits_once():
    config = config_of("llama-3.1-8b")
    sizes = StepBytes.of(config, make_shape(config, max_rows=4, max_model_len=4096))
    nbytes, steps = sizes.prompt(10, 4)
    assert steps == 3
    assert nbytes == 3 * sizes.weights + sizes.logits + (0 + 4 + 8) * sizes.kv_per_position + 10 * sizes.per_row


def test_two_ranks_share_the_bytes_and_the_slower_one_counts():
    config = config_of("llama-3.1-8b")
    one, two = (StepBytes.of(config, make_shape(config, world_size=w, max_model_len=4096)) for w in (1, 2))
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size * 2
    assert two.weights - norms == (one.weights - norms) / 2 and two.logits == one.logits / 2
    assert least_us(3e6, Ceiling({0: 4e12, 1: 3e12}, {})) == pytest.approx(1.0)


def test_shapes_are_plain_config_json():
    for name in shape_names():
        data = json.loads((locate(name) / "config.json").read_text())
        assert data["architectures"] == ["LlamaForCausalLM"] and data["max_position_embeddings"] == 131072
