"""Rotary embedding tables, computed in float32 as transformers does (modeling_rope_utils.py: default, linear and llama3)."""

from __future__ import annotations

import math

import numpy as np

from imex_persist.model.config import ModelConfig


def inv_freq(config: ModelConfig) -> np.ndarray:
    """Inverse frequencies, radians a position: float32 [head_dim / 2], with the configuration's scaling applied.

    llama3 (Llama 3.1): long waves are slowed by `factor`, short ones kept, those between interpolated.
    """
    f32 = np.float32
    exponent = np.arange(0, config.head_dim, 2, dtype=f32) / f32(config.head_dim)
    # the power in float64, rounded once: NumPy's float32 power is an ulp off in places where torch's is not
    freq = f32(1.0) / np.power(np.float64(config.rope_theta), exponent.astype(np.float64)).astype(f32)
    rope = config.rope_scaling
    if rope.rope_type == "default":
        return freq
    if rope.rope_type == "linear":
        return freq / f32(rope.factor)
    if rope.rope_type == "factors":
        return freq / np.asarray(rope.factors, f32)
    length, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    wavelength = f32(2 * math.pi) / freq
    smooth = (f32(length) / wavelength - f32(low)) / f32(high - low)
    slowed = freq / f32(rope.factor)
    between = (f32(1) - smooth) * slowed + smooth * freq
    return np.where(wavelength > f32(length / low), slowed, np.where(wavelength < f32(length / high), freq, between)).astype(
        f32
    )


def rope_table(config: ModelConfig, positions: int, start: int = 0) -> np.ndarray:
    """(cos, sin) of positions `start` … `start + positions - 1`: float32 [positions, head_dim_pad / 2, 2].

    head_dim_pad is head_dim rounded up to 32; the pairs beyond head_dim are (1, 0), which rotates nothing.
    The angle is a float32 product, as in transformers; its cosine is taken in float64 and rounded once.
    """
    pairs = -(-config.head_dim // 32) * 16
    table = np.zeros((positions, pairs, 2), np.float32)
    table[:, :, 0] = 1
    angle = np.arange(start, start + positions, dtype=np.float32)[:, None] * inv_freq(config)
    table[:, : config.head_dim // 2, 0] = np.cos(angle.astype(np.float64))
    table[:, : config.head_dim // 2, 1] = np.sin(angle.astype(np.float64))
    return table
