"""The reference against transformers' LlamaForCausalLM in fp32, on random configurations and on SmolLM2."""

import json

import numpy as np
import pytest
import torch
import transformers

from imex_persist.model.load import load_model
from imex_persist.model.locate import locate
from imex_persist.model.reference import EXACT, Precision, generate, logits
from imex_persist.model.rope import inv_freq
from tests.oracle.oracle_models import CONFIGS, LLAMA3, as_source, hf_model, random_model, torch_logits

pytestmark = pytest.mark.oracle
FP32_LOGIT_ERROR = 3e-5  # fp32 against float64 over two or three layers, logits of deviation 1: measured 5e-6
NUM_TOKENS = 40


def tokens_for(config, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, NUM_TOKENS).tolist()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_logits(name):
    model = random_model(name)
    config, source = as_source(model)
    tokens = tokens_for(config)
    theirs = torch_logits(model, tokens)
    np.testing.assert_array_equal(inv_freq(config) > 0, True)
    np.testing.assert_allclose(inv_freq(config), model.model.rotary_emb.inv_freq.numpy(), rtol=3e-7)
    for world in (1, 2, 3):
        exact = logits(config, source, tokens, precision=EXACT, world_size=world)
        assert abs(exact - theirs).max() < FP32_LOGIT_ERROR
    fp32 = logits(config, source, tokens, precision=Precision(np.float32, rounding=False))
    assert abs(fp32 - theirs).max() < FP32_LOGIT_ERROR


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_kernels_rounding_is_no_worse_than_bf16_transformers(name):
    """The bound that the kernel itself is judged by: twice the error of bf16 transformers on the same weights."""
    model = random_model(name)
    config, source = as_source(model)
    tokens = tokens_for(config, seed=1)
    theirs = torch_logits(model, tokens)
    bf16 = torch_logits(random_model(name).bfloat16(), tokens)
    assert abs(logits(config, source, tokens) - theirs).max() <= 2 * abs(bf16 - theirs).max()


@pytest.mark.parametrize("seed", range(12))
def test_random_sizes(seed):
    """Sizes drawn at random: hidden sizes, head counts, head sizes and FFN widths that divide nothing."""
    rng = np.random.default_rng(seed)
    kv = int(rng.integers(1, 5))
    head_dim, heads = 2 * int(rng.integers(16, 65)), kv * int(rng.integers(1, 4))
    fields = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "hidden_size": int(rng.integers(33, 200)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "intermediate_size": int(rng.integers(1, 200)),
        "vocab_size": int(rng.integers(2, 300)),
        "tie_word_embeddings": bool(rng.integers(0, 2)),
        "rope_parameters": [
            {"rope_type": "default", "rope_theta": float(10 ** rng.uniform(3, 6))},
            {"rope_type": "linear", "factor": float(rng.uniform(1, 8)), "rope_theta": 1e4},
            LLAMA3 | {"rope_theta": 5e5},
        ][int(rng.integers(0, 3))],
    }
    CONFIGS["drawn"] = fields
    try:
        model = random_model("drawn", seed)
    finally:
        del CONFIGS["drawn"]
    config, source = as_source(model)
    tokens = tokens_for(config, seed)
    exact = logits(config, source, tokens, precision=EXACT, world_size=int(rng.integers(1, 5)))
    assert abs(exact - torch_logits(model, tokens)).max() < FP32_LOGIT_ERROR


@pytest.mark.parametrize("shards", ["10GB", "40KB"])
def test_folders_that_transformers_writes(tmp_path, shards):
    """save_pretrained's config.json and safetensors, one file and several, read back to the same logits."""
    model = random_model("gqa")
    model.config.architectures = ["LlamaForCausalLM"]
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors").exists() == (shards == "10GB")
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text()) or transformers.__version__ < "5"
    loaded = load_model(tmp_path)
    tokens = tokens_for(loaded.config)
    ours = logits(loaded.config, loaded.weights, tokens, precision=EXACT, world_size=2)
    assert abs(ours - torch_logits(model, tokens)).max() < FP32_LOGIT_ERROR


def test_smollm2_answers_paris_and_matches_transformers():
    try:
        locate("smollm2")
    except ValueError as error:
        pytest.skip(str(error))
    model = load_model("smollm2")
    text = model.require_tokenizer()
    prompt = text.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    out = generate(model.config, model.weights, prompt, 16, model.eos_token_ids)
    assert text.decode(out) == "The capital of France is Paris."
    tokens = prompt + out
    ours = logits(model.config, model.weights, tokens, precision=Precision(np.float32, rounding=False))
    with torch.no_grad():
        theirs = torch_logits(_smollm2_in_transformers(model), tokens)
    assert abs(ours - theirs).max() < 5e-3  # fp32 over 30 layers, logits up to 30


def _smollm2_in_transformers(model):
    """GGUF rows of q and k are RoPE-adjacent; transformers wants them half a head apart."""
    from imex_persist.model.shard import rope_order
    from imex_persist.model.weights import DictWeights, tensor_shapes

    order = np.argsort(rope_order(model.config.head_dim))
    tensors = {}
    for name in tensor_shapes(model.config):
        bits = model.weights.read(name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            bits = bits.reshape(-1, model.config.head_dim, bits.shape[1])[:, order].reshape(bits.shape)
        tensors[name] = bits
    rope = {"rope_type": "default", "rope_theta": model.config.rope_theta}
    return hf_model(model.config, DictWeights(tensors), rope)
