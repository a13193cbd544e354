"""config.json: every spelling that is understood, and a refusal by name for everything that changes the math."""

import json

import pytest

from imex_persist.model.config import LIMITS, NEUTRAL, ModelConfig
from imex_persist.model.rope_scaling import RopeScaling
from tests.model.helpers import TINY, tiny


def parse(**changes) -> ModelConfig:
    return ModelConfig.from_dict({k: v for k, v in (TINY | changes).items() if v != "absent"})


def refused(match: str, **changes) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        parse(**changes)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_names_and_defaults_are_those_of_transformers():
    config = parse(num_key_value_heads="absent", head_dim="absent", hidden_size=192, rms_norm_eps="absent", rope_theta="absent")
    assert (config.num_key_value_heads, config.head_dim, config.rms_norm_eps, config.rope_theta) == (6, 32, 1e-6, 10000.0)
    assert config.eos_token_id == (2,) and config.bos_token_id is None and not config.tie_word_embeddings


def test_end_tokens_may_be_a_list():
    assert parse(eos_token_id=[128001, 128009]).eos_token_id == (128001, 128009)
    assert parse(eos_token_id=None).eos_token_id == ()
    for bad in ("x", [1.5], -1, True, [[1]]):
        refused("eos_token_id", eos_token_id=bad)


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_what_changes_the_math_is_refused_by_name(name):
    refused(name, **{name: {"x": 1} if name in ("quantization_config", "compression_config") else 7})
    for neutral in NEUTRAL[name]:
        parse(**{name: neutral})


def test_refusals_that_models_really_have():
    refused("attention_bias is true", attention_bias=True)
    refused("mlp_bias is true", mlp_bias=True)
    refused('hidden_act is "gelu"', hidden_act="gelu")
    refused("pretraining_tp is 2", pretraining_tp=2)
    refused("partial_rotary_factor is 0.5", partial_rotary_factor=0.5)
    refused("quantization_config", quantization_config={"quant_method": "awq", "bits": 4})
    refused("layer_types", layer_types=["full_attention", "sliding_attention"])
    refused("head_dim is 256, and must be an integer from 32 to 128", head_dim=256)
    refused("head_dim is 16", head_dim=16)
    refused("head_dim 33 is odd", head_dim=33)
    refused("6 is not a multiple of num_key_value_heads 4", num_key_value_heads=4)
    refused("there is no head_dim", head_dim="absent")
    refused("tie_word_embeddings", tie_word_embeddings=1)
    parse(layer_types=["full_attention"] * 2)


@pytest.mark.parametrize("name", sorted(LIMITS))
@pytest.mark.parametrize("value", [0, -1, 1.0, 64.5, "64", True, [64], 1 << 40, 10**400, float("nan")])
def test_sizes_are_integers_in_range(name, value):
    refused(name, **{name: value})


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [-1.0, 0, "1", True, float("nan"), float("inf"), 10**400, [1]])
def test_constants_are_finite_positive_numbers(name, value):
    refused(name, **{name: value})


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"])
def test_what_is_missing_is_named(name):
    refused(f"{name} is missing", **{name: "absent"})


def test_architectures():
    refused("Qwen2ForCausalLM is not supported", architectures=["Qwen2ForCausalLM"])
    refused("is not supported", architectures="LlamaForCausalLM")
    refused("is not supported", architectures=[])
    refused("is not supported", architectures=[3])
    refused("model_type", architectures="absent", model_type="gpt2")
    assert parse(architectures="absent").architecture == "LlamaForCausalLM"


def test_mistral_is_llama_without_its_window():
    assert parse(architectures=["MistralForCausalLM"], sliding_window=None).architecture == "MistralForCausalLM"
    refused("sliding_window is 4096", architectures=["MistralForCausalLM"])  # transformers' default where it is absent
    refused("sliding_window is 1024", architectures=["MistralForCausalLM"], sliding_window=1024)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({}, 10000.0, RopeScaling()),
        ({"rope_scaling": None, "rope_theta": 5e5}, 5e5, RopeScaling()),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 10000.0, RopeScaling("linear", 2.0)),
        ({"rope_scaling": {"rope_type": "llama3"} | LLAMA3}, 10000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 64)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": "absent"}, 5e5, RopeScaling()),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 1e4, RopeScaling("linear", 4.0)),
        ({"rope_parameters": {"rope_type": "llama3"} | LLAMA3}, 10000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 64)),
    ],
)
def test_rope_in_every_spelling(fields, theta, scaling):
    config = parse(**fields)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("match", "fields"),
    [
        ('rope_type "yarn" is not supported', {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        ('rope_type "dynamic"', {"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
        ("rope_type", {"rope_scaling": {"rope_type": ["linear"], "factor": 4.0}}),
        ("factor of the rope scaling is null", {"rope_scaling": {"rope_type": "linear"}}),
        ("factor of the rope scaling is 0", {"rope_scaling": {"rope_type": "linear", "factor": 0}}),
        ("low_freq_factor of the rope", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
        ("must be below", {"rope_scaling": {"rope_type": "llama3"} | LLAMA3 | {"low_freq_factor": 4.0}}),
        (
            "original_max_position",
            {"rope_scaling": {"rope_type": "llama3"} | LLAMA3 | {"original_max_position_embeddings": 0.5}},
        ),
        ("differs by layer type", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
        ("partial_rotary_factor", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("rope_theta is both", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}),
        ("must be an object or null", {"rope_scaling": "linear"}),
    ],
)
def test_rope_refusals(match, fields):
    refused(match, **fields)


def test_from_folder(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        ModelConfig.from_folder(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    assert ModelConfig.from_folder(tmp_path) == tiny()
    for text in ("{", "[1]", "3", '"x"', "", "[" * 100000, "\udcff"):
        path.write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError, match=r"config\.json") as caught:
            ModelConfig.from_folder(tmp_path)
        assert "\n" not in str(caught.value)
