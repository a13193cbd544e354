"""Where a model's matrices come from: one protocol, Hugging Face names and shapes, bfloat16 bits out.

A source reads on demand and only what it is asked for, so that each rank touches its own shard of the files and nothing is
held twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from imex_persist.model.bf16 import to_bits
from imex_persist.model.config import ModelConfig

EMBED, FINAL_NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)  # buffers that old checkpoints carry; recomputed here
Range = tuple[int, int] | None  # [start, stop), None for all


def layer_names(layer: int) -> dict[str, str]:
    """The full names of one layer's tensors by their short ones: q_proj … down_proj and the two norms."""
    prefix = f"model.layers.{layer}."
    names = {name: f"{prefix}self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    names |= {name: f"{prefix}mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
    return names | {name: f"{prefix}{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")}


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model and its shape: matrices [outputs, inputs], norms [hidden_size]. No lm_head where it is tied."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    layer_shapes = {
        "q_proj": (q, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, q),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes = {EMBED: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes |= {full: layer_shapes[name] for name, full in layer_names(layer).items()}
    shapes[FINAL_NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


class WeightSource(Protocol):
    """Tensors of one model by Hugging Face name."""

    rope_adjacent: bool  # q and k rows have RoPE partners next to each other (GGUF), not half a head apart (Hugging Face)

    def read(self, name: str, rows: Range = None, columns: Range = None) -> np.ndarray:
        """Rows and columns [start, stop) of a tensor as bfloat16 bits: uint16 [rows, columns], or [rows] for a norm.

        The array may live on another device (DummyWeights). Raises ValueError if the file cannot give them.
        """
        ...


def check_tensors(config: ModelConfig, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compares the tensors that `where` has with those that `config` needs.

    Raises ValueError for one that is missing, has another shape, or has no place in a Llama model (a bias, a q_norm, an
    expert): ignoring it would change the result.
    """
    expected = tensor_shapes(config)
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(
                f"{where} has no tensor {name}, which the configuration needs; download the model again or fix config.json"
            )
        if tuple(found[name]) != shape:
            raise ValueError(
                f"{where}: {name} has shape {list(found[name])}, and the configuration needs {list(shape)}; "
                "config.json and the weights are not of the same model"
            )
    extra = _first_unknown(found, expected)
    if extra:
        raise ValueError(f"{where} has a tensor {extra[:100]}, which no supported Llama model has; choose a model without it")


def _first_unknown(found: Iterable[str], expected: Mapping) -> str | None:
    tied = {LM_HEAD}  # written by some tools although tied; transformers ignores it too
    return next((n for n in found if n not in expected and n not in tied and not n.endswith(IGNORED_SUFFIXES)), None)


def window(array, rows: Range, columns: Range):
    """`array[rows, columns]` with None for all; a vector takes rows only."""
    array = array if rows is None else array[rows[0] : rows[1]]
    return array if columns is None else array[:, columns[0] : columns[1]]


class DictWeights:
    """A source over arrays in memory (float or bfloat16, or uint16 bits), for tests."""

    def __init__(self, tensors: Mapping[str, np.ndarray], config: ModelConfig | None = None, rope_adjacent: bool = False):
        self.rope_adjacent = rope_adjacent
        self._bits = {name: to_bits(np.asarray(array)) for name, array in tensors.items()}
        if config is not None:
            check_tensors(config, {name: array.shape for name, array in self._bits.items()}, "the dictionary")

    def read(self, name: str, rows: Range = None, columns: Range = None) -> np.ndarray:
        return window(self._bits[name], rows, columns)
