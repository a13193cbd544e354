"""Weights and configuration from a GGUF file of a Llama model. Quantized blocks are expanded by the `gguf` package.

llama.cpp stores q and k rows with RoPE partners adjacent, the kernel's own order, and writes the llama3 scaling as one
divisor per frequency in a tensor of its own (`rope_freqs.weight`).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from imex_persist.model.bf16 import to_bits
from imex_persist.model.config import ModelConfig
from imex_persist.model.gguf_file import GgufHeader, GgufTensor, read_header
from imex_persist.model.messages import short
from imex_persist.model.rope_scaling import RopeScaling
from imex_persist.model.weights import EMBED, FINAL_NORM, LM_HEAD, Range, check_tensors, layer_names, window

ROPE_FREQS = "rope_freqs.weight"
_LAYER = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_WHOLE = {"token_embd.weight": EMBED, "output_norm.weight": FINAL_NORM, "output.weight": LM_HEAD}
_NO_EFFECT = {  # metadata that would change the math with another value
    "llama.expert_count": (0,),
    "llama.attention.causal": (True,),
    "llama.attention.sliding_window": (0,),
    "llama.attention.clamp_kqv": (0.0,),
    "llama.logit_scale": (1.0,),
    "llama.attention.scale": (),
}


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; unknown names come back unchanged, for check_tensors to refuse."""
    if name in _WHOLE:
        return _WHOLE[name]
    match = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)\.weight", name)
    return layer_names(int(match[1]))[_LAYER[match[2]]] if match and match[2] in _LAYER else name


class GgufWeights:
    """A WeightSource over a GGUF file; `config` is what its metadata says.

    Raises ValueError for a file that is broken or not supported.
    """

    rope_adjacent = True

    def __init__(self, path: str | Path):
        _require_gguf()
        self.path = Path(path)
        header = read_header(self.path)
        self.metadata = header.metadata
        self._data = np.memmap(self.path, mode="r")
        self._tensors = {hf_name(name): tensor for name, tensor in header.tensors.items() if name != ROPE_FREQS}
        for name, tensor in header.tensors.items():
            _check_extent(self.path, name, tensor, header.nbytes)
        factors = header.tensors.get(ROPE_FREQS)
        divisors = () if factors is None else tuple(self._floats(factors, None, None).ravel().tolist())
        self.config = config_of(header, str(self.path), divisors)
        check_tensors(self.config, {name: tensor.shape for name, tensor in self._tensors.items()}, str(self.path))

    def read(self, name: str, rows: Range = None, columns: Range = None) -> np.ndarray:
        tensor = self._tensors[name]
        return to_bits(self._floats(tensor, rows, columns))

    def _floats(self, tensor: GgufTensor, rows: Range, columns: Range) -> np.ndarray:
        from gguf.quants import dequantize

        kind, block, block_bytes = _type_of(tensor)
        width = tensor.shape[-1]
        row_bytes = width // block * block_bytes
        num_rows = math.prod(tensor.shape[:-1])
        data = self._data[tensor.offset : tensor.offset + num_rows * row_bytes].reshape(num_rows, row_bytes)
        if len(tensor.shape) == 1:
            return window(dequantize(data, kind)[0], rows, None)
        first, last = columns or (0, width)
        left, right = first // block, -(-last // block)  # the whole blocks that hold the columns
        part = window(data, rows, (left * block_bytes, right * block_bytes))
        return dequantize(np.ascontiguousarray(part), kind)[:, first - left * block : last - left * block]


def config_of(header: GgufHeader, where: str, rope_divisors: tuple[float, ...] = ()) -> ModelConfig:
    """The configuration in a GGUF header; `rope_divisors` are the values of rope_freqs.weight.

    Raises ValueError, naming `where`, for what is missing or not supported.
    """
    meta = header.metadata
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{where}: architecture {short(architecture)} is not supported; choose a GGUF file of architecture llama"
        )
    for key, allowed in _NO_EFFECT.items():
        if key in meta and meta[key] not in allowed:
            raise ValueError(
                f"{where}: {key} is {short(meta[key])}, which changes the math and is not supported; choose another model"
            )

    def need(key: str) -> Any:
        if f"llama.{key}" not in meta:
            raise ValueError(f"{where} has no llama.{key} in its metadata; convert the model again")
        return meta[f"llama.{key}"]

    heads = need("attention.head_count")
    embedding = header.tensors.get("token_embd.weight")
    values = {
        "hidden_size": need("embedding_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "intermediate_size": need("feed_forward_length"),
        "vocab_size": embedding.shape[0] if embedding else meta.get("llama.vocab_size"),
        "head_dim": meta.get("llama.attention.key_length"),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.get("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "max_position_embeddings": need("context_length"),
    }
    try:
        config = ModelConfig(
            **values,
            rope_scaling=_scaling(meta, rope_divisors),
            bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=_stop_ids(meta),
        )
        for key in ("attention.value_length", "rope.dimension_count"):
            if meta.get(f"llama.{key}", config.head_dim) != config.head_dim:
                raise ValueError(f"llama.{key} is {short(meta[f'llama.{key}'])}, and must be the head_dim, {config.head_dim}")
        if rope_divisors and len(rope_divisors) != config.head_dim // 2:
            raise ValueError(
                f"{ROPE_FREQS} has {len(rope_divisors)} values, and must have head_dim / 2 = {config.head_dim // 2}"
            )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return config


def _scaling(meta: dict[str, Any], divisors: tuple[float, ...]) -> RopeScaling:
    kind, factor = meta.get("llama.rope.scaling.type", "none"), meta.get("llama.rope.scaling.factor", 1.0)
    if "llama.rope.scale_linear" in meta and kind == "none":  # the key of older files
        kind, factor = "linear", meta["llama.rope.scale_linear"]
    if kind not in ("none", "linear") or (kind == "linear" and divisors):
        raise ValueError(f"rope scaling type {short(kind)} is not supported; it must be none, linear, or given by {ROPE_FREQS}")
    if not isinstance(factor, float) or not 0 < factor <= 1e6:
        raise ValueError(f"the rope scaling factor is {short(factor)}, and must be a positive number up to 1e6")
    if divisors:
        if not all(0 < value < 1e6 for value in divisors):
            raise ValueError(f"{ROPE_FREQS} has a value outside 0 … 1e6; download the file again")
        return RopeScaling(rope_type="factors", factors=divisors)
    return RopeScaling(rope_type="linear", factor=factor) if kind == "linear" else RopeScaling()


def _stop_ids(meta: dict[str, Any]) -> tuple[int, ...]:
    ids = (meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))


def _type_of(tensor: GgufTensor):
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType(tensor.ggml_type)
    return kind, *GGML_QUANT_SIZES[kind]


def _check_extent(path: Path, name: str, tensor: GgufTensor, file_bytes: int) -> None:
    from gguf.quants import dequantize

    try:
        kind, block, block_bytes = _type_of(tensor)
        dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        raise ValueError(
            f"{path}: {name[:100]} has ggml type {tensor.ggml_type}, which cannot be expanded; choose Q8_0, Q4_K, Q4_1 or F16"
        ) from None
    if tensor.shape[-1] % block:
        raise ValueError(
            f"{path}: {name[:100]} has rows of {tensor.shape[-1]} values in blocks of {block}; download the file again"
        )
    end = tensor.offset + math.prod(tensor.shape) // block * block_bytes
    if end > file_bytes:
        raise ValueError(
            f"{path} is truncated: {name[:100]} ends at byte {end} and the file at {file_bytes}; download it again"
        )


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError("reading a GGUF file needs the gguf package; run: pip install gguf") from None
