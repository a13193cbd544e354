"""Small models for the tests of imex_persist.model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from imex_persist.model.bf16 import to_bits
from imex_persist.model.config import ModelConfig
from imex_persist.model.weights import tensor_shapes

GOLDENS = Path(__file__).parent / "goldens"

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 34,
    "intermediate_size": 70,
    "vocab_size": 101,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}


def tiny(**changes) -> ModelConfig:
    """A configuration whose sizes are no multiple of anything."""
    return ModelConfig.from_dict(TINY | changes)


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 arrays of every tensor, with values that bfloat16 holds exactly."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in tensor_shapes(config).items():
        values = 1 + 0.1 * rng.standard_normal(shape) if len(shape) == 1 else rng.standard_normal(shape) * shape[1] ** -0.5
        out[name] = (to_bits(values.astype(np.float32)).astype(np.uint32) << 16).view(np.float32)
    return out


def golden(name: str) -> dict:
    return json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))
