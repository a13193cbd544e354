"""`config.json` of a Llama model: what the kernel computes with, and a refusal for whatever else changes the math.

Names and defaults are those of transformers' LlamaConfig. A field that this package does not know and that is no part of
the Llama architecture is ignored, as transformers does; a field known to change the result is refused unless it has its
neutral value.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from imex_persist.model.messages import one_line, short
from imex_persist.model.rope_scaling import RopeScaling, parse_rope

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
MISTRAL_SLIDING_WINDOW = 4096  # transformers' default where config.json has none
MAX_CONFIG_BYTES = 16 << 20

# Largest values taken: far above any model, low enough that no size computed from them overflows 64 bits.
LIMITS = {
    "hidden_size": (1, 1 << 16),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "head_dim": (32, 128),
    "intermediate_size": (1, 1 << 20),
    "vocab_size": (1, 1 << 24),
    "max_position_embeddings": (1, (1 << 31) - 1),
}

# Fields that change the math, and the values with which they do not.
NEUTRAL: dict[str, tuple] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "qkv_bias": (False, None),
    "use_qk_norm": (False, None),
    "qk_norm": (False, None),
    "sliding_window": (None,),
    "attention_chunk_size": (None,),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "compression_config": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "attention_multiplier": (None,),
    "logits_scaling": (1, None),
    "logit_scale": (1, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "no_rope_layers": (None, []),
    "alibi": (False, None),
    "use_parallel_residual": (False, None),
    "parallel_attn": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}


@dataclass(frozen=True)
class ModelConfig:
    """A Llama model's sizes and constants under their Hugging Face names; nothing is padded here.

    Raises ValueError when a size is no integer or out of range, or the head counts do not divide.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    architecture: str = "LlamaForCausalLM"

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name in ("hidden_size", "num_attention_heads"):
            _check_integer(name, getattr(self, name))
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads} and "
                    "there is no head_dim; add head_dim to the configuration"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        for name in LIMITS:
            _check_integer(name, getattr(self, name))
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, and rotary embeddings need pairs: give an even head_dim")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}; every key-value head must serve the same number of query heads"
            )
        _check_number("rms_norm_eps", self.rms_norm_eps, 1e-12, 1.0)
        _check_number("rope_theta", self.rope_theta, 1.0, 1e15)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """The configuration in a parsed `config.json`. Raises ValueError, naming `where`, if it cannot be computed with."""
        try:
            return _from_dict(cls, data)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """The configuration of a Hugging Face folder. Raises ValueError if there is no readable `config.json`."""
        path = Path(folder) / "config.json"
        return cls.from_dict(read_json(path), str(path))

    @property
    def attention_scale(self) -> float:
        """Factor of the query-key dot products."""
        return self.head_dim**-0.5


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ValueError in one sentence if it is absent, too large, broken, or no object."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, more than the {MAX_CONFIG_BYTES} allowed; is it the right file?"
            )
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; download it again") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give a folder that has it") from None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({one_line(error)}); download it again") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__} where a JSON object belongs; download it again")
    return data


def _check_integer(name: str, value: Any) -> None:
    low, high = LIMITS[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {short(value)}, and must be an integer from {low} to {high}")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} is {short(value)}, and must be a number from {low:g} to {high:g}")


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 1 << 31 for i in ids):
        raise ValueError(f"{name} is {short(value)}, and must be a token id or a list of token ids")
    return tuple(dict.fromkeys(ids))


def _from_dict(cls, data: dict[str, Any]) -> ModelConfig:
    if not isinstance(data, dict):
        raise ValueError(f"the configuration is a {type(data).__name__}, and must be a JSON object")
    architecture = _architecture(data)
    _refuse_unsupported(data, architecture)
    values: dict[str, Any] = {"architecture": architecture}
    required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    for name in required:
        if data.get(name) is None:
            raise ValueError(f"{name} is missing; a Llama configuration needs {', '.join(required)}")
    plain = {f.name for f in fields(cls)} - {"rope_theta", "rope_scaling", "bos_token_id", "eos_token_id", "architecture"}
    values |= {name: data[name] for name in plain if data.get(name) is not None}
    if not isinstance(values.get("tie_word_embeddings", False), bool):
        raise ValueError(f"tie_word_embeddings is {short(data['tie_word_embeddings'])}, and must be true or false")
    positions = values.get("max_position_embeddings", cls.max_position_embeddings)
    _check_integer("max_position_embeddings", positions)
    values["rope_theta"], values["rope_scaling"] = parse_rope(data, positions)
    values["eos_token_id"] = token_ids("eos_token_id", data.get("eos_token_id"))
    values["bos_token_id"] = next(iter(token_ids("bos_token_id", data.get("bos_token_id"))), None)
    return cls(**values)


def _architecture(data: dict[str, Any]) -> str:
    given = data.get("architectures")
    if given is None:  # older files have only the type
        given = [name for name, model_type in ARCHITECTURES.items() if data.get("model_type") == model_type]
        given = given or [f"model_type {short(data.get('model_type'))}"]
    one = given[0] if isinstance(given, list) and len(given) == 1 and isinstance(given[0], str) else None
    if one not in ARCHITECTURES:
        text = short(given) if one is None else one
        raise ValueError(f"architecture {text[:80]} is not supported; choose a model of {' or '.join(ARCHITECTURES)}")
    return one


def _refuse_unsupported(data: dict[str, Any], architecture: str) -> None:
    if architecture == "MistralForCausalLM":
        data = {"sliding_window": MISTRAL_SLIDING_WINDOW, **data}
    for name, neutral in NEUTRAL.items():
        if name in data and data[name] not in neutral:
            allowed = " or ".join(short(value) for value in neutral)
            raise ValueError(
                f"{name} is {short(data[name])}, which changes the math and is not supported; it must be {allowed}"
            )
    types = data.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(t != "full_attention" for t in types)):
        raise ValueError(f"layer_types is {short(types)}, which is not supported; every layer must be 'full_attention'")
