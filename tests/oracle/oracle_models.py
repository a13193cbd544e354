"""Small random Llama models of transformers, and the same weights as a source of this package.

Weights are rounded to bfloat16 in the torch model itself, so both sides hold the same numbers and only the arithmetic is
compared.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from imex_persist.model.bf16 import to_float32
from imex_persist.model.config import ModelConfig
from imex_persist.model.weights import DictWeights, WeightSource, tensor_shapes

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# name: fields of a LlamaConfig beside the defaults in `random_model`
CONFIGS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "gqa_3_of_9": {"hidden_size": 96, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 32},
    "tied": {"tie_word_embeddings": True},
    "hidden_40": {"hidden_size": 40, "head_dim": 32},
    "hidden_96": {"hidden_size": 96, "head_dim": 48, "num_key_value_heads": 2},
    "head_dim_128": {"head_dim": 128, "num_key_value_heads": 2, "num_hidden_layers": 1},
    "head_dim_50": {"head_dim": 50, "intermediate_size": 77, "vocab_size": 203},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "tie_word_embeddings": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}, "num_key_value_heads": 2},
    "eps": {"rms_norm_eps": 1e-3, "intermediate_size": 50, "vocab_size": 65, "num_hidden_layers": 3},
}


def random_model(name: str, seed: int = 0) -> LlamaForCausalLM:
    """An fp32 model of CONFIGS with bfloat16-valued random weights, large enough that attention and FFN matter."""
    fields = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 32,
        "intermediate_size": 96,
        "vocab_size": 128,
        "max_position_embeddings": 256,
    } | CONFIGS[name]
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    # transformers asks that heads divide the hidden size even where head_dim is given; its modules do not need it
    config = LlamaConfig(**(fields | {"hidden_size": heads * 8}))
    config.hidden_size = hidden
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float().eval()
    randomize(model)
    return model


def randomize(model: LlamaForCausalLM) -> None:
    """Random weights that are bfloat16 values, with torch's seed: matrices of variance 1 / inputs, norms about 1."""
    with torch.no_grad():
        for tensor in model.parameters():
            random = (
                1 + 0.2 * torch.randn_like(tensor) if tensor.ndim == 1 else torch.randn_like(tensor) * tensor.shape[1] ** -0.5
            )
            tensor.copy_(random.bfloat16().float())


def hf_model(config: ModelConfig, source: WeightSource, rope: dict) -> LlamaForCausalLM:
    """The transformers model of a configuration and source of this package; `rope` is its rope_parameters."""
    names = (
        "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size"
    ).split()
    names += ["rms_norm_eps", "tie_word_embeddings", "max_position_embeddings"]
    model = LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in names}, rope_parameters=dict(rope)))
    model = model.float().eval()
    state = {name: torch.from_numpy(to_float32(source.read(name))) for name in tensor_shapes(config)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return model


def as_source(model: LlamaForCausalLM) -> tuple[ModelConfig, DictWeights]:
    """The configuration (through config.json's dictionary) and the weights of a transformers model."""
    config = ModelConfig.from_dict(model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    tensors = {key: value.numpy().astype(np.float32) for key, value in model.state_dict().items()}
    return config, DictWeights(tensors, config)


def torch_logits(model: LlamaForCausalLM, tokens: list[int]) -> np.ndarray:
    """[tokens, vocab_size] float32."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()
