"""Writes tests/model/goldens/*.json from transformers: `python tests/oracle/make_goldens.py`. They are committed.

Weights are DummyWeights, so a golden is a configuration, a seed, tokens in, and logits and rope values out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from imex_persist.model.config import ModelConfig
from imex_persist.model.dummy import DummyWeights
from imex_persist.model.locate import locate
from tests.oracle.oracle_models import LLAMA3, hf_model, torch_logits

FOLDER = Path(__file__).parents[1] / "model" / "goldens"
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 80,
    "vocab_size": 96,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
MODELS = {
    "tied_gqa": BASE | {"tie_word_embeddings": True, "rope_parameters": DEFAULT},
    "odd_llama3": BASE
    | {
        "hidden_size": 96,
        "num_attention_heads": 6,
        "head_dim": 48,
        "intermediate_size": 77,
        "vocab_size": 101,
        "rope_parameters": LLAMA3 | {"rope_theta": 500000.0},
    },
    "mha_linear": BASE
    | {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
}
ROPES = {
    "default_64": (64, DEFAULT),
    "theta_1e5_48": (48, {"rope_type": "default", "rope_theta": 100000.0}),
    "linear_32": (32, {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}),
    "llama3_1_128": (
        128,
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 500000.0,
        },
    ),
}
TEXTS = [
    "What is the capital of France?",
    "Hello, world! 1234567890 it's 3.14",
    "  two  spaces\n\n\tand tabs \r\n",
    "héllo 😀 日本語 Ünïcödé — “quotes”",
    "def f(x):\n    return x**2  # squared\n",
    "<|im_start|>user\nhi<|im_end|>\n",
]


def logits() -> dict:
    out = {}
    for name, fields in MODELS.items():
        config = ModelConfig.from_dict(fields)
        model = hf_model(config, DummyWeights(config, seed=7), fields["rope_parameters"])
        prompt = np.random.default_rng(3).integers(0, config.vocab_size, 12).tolist()
        tokens = list(prompt)
        for _ in range(8):
            tokens.append(int(torch_logits(model, tokens)[-1].argmax()))
        last = torch_logits(model, tokens)[-1]
        out[name] = {
            "config": fields,
            "seed": 7,
            "prompt": prompt,
            "greedy": tokens[len(prompt) :],
            "last_logits": [round(float(x), 5) for x in last],
        }
    return out


def ropes() -> dict:
    out = {}
    for name, (head_dim, rope) in ROPES.items():
        config = transformers.LlamaConfig(hidden_size=head_dim, num_attention_heads=1, rope_parameters=dict(rope))
        module = LlamaRotaryEmbedding(config)
        positions = [0, 1, 17, 4095, 100000]
        cos, sin = module(torch.zeros(1, 1), torch.tensor([positions]))
        half = head_dim // 2
        out[name] = {
            "config": BASE | {"head_dim": head_dim, "rope_parameters": rope},
            "inv_freq": [float(x) for x in module.inv_freq],
            "positions": positions,
            "cos": [[float(x) for x in row[:half]] for row in cos[0]],
            "sin": [[float(x) for x in row[:half]] for row in sin[0]],
        }
    return out


def smollm2() -> dict:
    path = locate("smollm2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    messages = [{"role": "user", "content": TEXTS[0]}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return {
        "encode": {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS},
        "messages": messages,
        "chat": tokenizer(prompt, add_special_tokens=False)["input_ids"],
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for stem, make in {"logits": logits, "rope": ropes, "smollm2_tokens": smollm2}.items():
        text = json.dumps({"made_with": f"transformers {transformers.__version__}"} | make(), ensure_ascii=False, indent=None)
        (FOLDER / f"{stem}.json").write_text(text.replace('}, "', '},\n"') + "\n", encoding="utf-8")
        print(f"{FOLDER / stem}.json: {len(text)} bytes")
