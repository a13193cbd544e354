"""What a configuration says about rotary embeddings, in the three spellings that exist: `rope_theta` + `rope_scaling` (with
`type` or `rope_type`), and transformers 5's `rope_parameters`. The numbers made from it are in rope.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from imex_persist.model.messages import short

_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class RopeScaling:
    """How the inverse frequencies are changed: `default` (not at all), `linear`, `llama3`, or `factors` (divided one by
    one, GGUF).
    """

    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()


def parse_rope(data: dict[str, Any], max_position_embeddings: int) -> tuple[float, RopeScaling]:
    """(rope_theta, scaling) of a parsed config.json. Raises ValueError for types and fields that are not computed."""
    rope: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        given = data.get(name)
        if given is None:
            continue
        if not isinstance(given, dict):
            raise ValueError(f"{name} is {short(given)}, and must be an object or null")
        if any(isinstance(value, dict) for value in given.values()):
            raise ValueError(f"{name} differs by layer type, which is not supported; all layers must share one")
        for key, value in given.items():
            key = "rope_type" if key == "type" else key
            if rope.setdefault(key, value) != value:
                raise ValueError(f"{key} is both {short(rope[key])} and {short(value)} in {name}; keep one of them")
    theta = rope.get("rope_theta", data.get("rope_theta"))
    if "rope_theta" in rope and data.get("rope_theta") not in (None, theta):
        raise ValueError(f"rope_theta is both {short(data['rope_theta'])} and {short(theta)}; keep one of them")
    partial = rope.get("partial_rotary_factor")
    if partial not in (None, 1):
        raise ValueError(
            f"partial_rotary_factor is {short(partial)}, which changes the math and is not supported; it must be 1"
        )
    kind = rope.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ValueError(f"rope_type {short(kind)} is not supported; it must be {', '.join(_KEYS)}")
    numbers = {key: _number(key, rope.get(key)) for key in _KEYS[kind]}
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings", max_position_embeddings)
        if isinstance(original, bool) or not isinstance(original, int) or not 1 <= original < 1 << 31:
            raise ValueError(f"original_max_position_embeddings is {short(original)}, and must be a positive integer")
        if numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
            raise ValueError(
                f"low_freq_factor {numbers['low_freq_factor']:g} must be below high_freq_factor {numbers['high_freq_factor']:g}"
            )
        numbers["original_max_position_embeddings"] = original
    return 10000.0 if theta is None else theta, RopeScaling(rope_type=kind, **numbers)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e6:
        raise ValueError(f"{name} of the rope scaling is {short(value)}, and must be a positive number up to 1e6")
    return float(value)
