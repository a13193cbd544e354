"""How far the kernel may be from exact math on the same inputs: one table, and the arithmetic that carries it through a phase.

Every comparison is against float64. What the kernel rounds on purpose (docs/architecture.md: the norm's input and output, q, k, v,
attention and FFN activations) is rounded there too; what is left is bounded element by element from the magnitudes that went into
it. So a bound is as tight for a small output as for a large one, and needs no tuning by size.

| constant | dtype    | value  | what it bounds                                     |
|----------|----------|--------|----------------------------------------------------|
| SUM      | float32  | 2^-19  | sums of products of bf16, relative to sum of |a b| |
| BF16     | bfloat16 | 2^-8   | a value that is stored as bf16, relative           |
| NORM     | float32  | 2^-18  | 1 / rms(x), relative                               |
| EXP      | float32  | 2^-18  | e^x, relative, |x| up to 88                        |
| WEIGHT   | bfloat16 | 3*2^-8 | softmax weights w, relative to root sum (w v)^2    |
| LOGITS   | bfloat16 | 2^-4   | a whole model's logits, relative to the row's rms  |

SUM: products are exact, and no sum has more than a few dozen float32 additions in a row; on a CPU each costs 2^-24, in a tensor
core, which cuts where it aligns, up to 2^-22. BF16: half a unit in the last of 8 bits. NORM: a sum of squares, an approximate
1 / sqrt (2^-22), a product. EXP: the polynomial's, or ex2.approx's,
few units of 2^-24, and the rounding of x * log2(e). WEIGHT: the tensor core takes softmax weights as bf16; their errors, 2^-8 each at
most, are independent: 3 is certain up to 9 positions, 5 deviations beyond. LOGITS: not derived but seen, up to 0.03, as much as bf16
itself costs (reference in bf16 against float64: up to 0.04): weights round, then activations round the other way, layer after layer;
a reference that also rounds softmax weights, chunk by chunk, agrees with the simulator to the last bit on most of the test models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from imex_persist.model import phases
from imex_persist.model.phases import Precision

SUM = 2.0**-19
BF16 = 2.0**-8
NORM = 2.0**-18
EXP = 2.0**-18
WEIGHT = 3 * BF16
LOGITS = 2.0**-4


@dataclass(frozen=True)
class Bounded:
    """float64 values, and how far the kernel's may be from each."""

    value: np.ndarray
    slack: np.ndarray

    @classmethod
    def exact(cls, value: np.ndarray) -> Bounded:
        value = np.asarray(value, np.float64)
        return cls(value, np.zeros_like(value))

    def __getitem__(self, index) -> Bounded:
        return Bounded(self.value[index], self.slack[index])

    def limits(self, stored: str = "float32") -> np.ndarray:
        """The allowed distance of a value that was stored as `stored`."""
        rounding = {"float32": 2.0**-24, "bfloat16": BF16}[stored]
        return self.slack + rounding * (np.abs(self.value) + self.slack) + 1e-37  # what float32 flushes to zero


def check(what: str, got: np.ndarray, expected: Bounded, stored: str = "float32") -> float:
    """Fails with the worst element if one is too far away (or no number); returns the largest part of a limit that was used."""
    assert got.shape == expected.value.shape, f"{what}: shape {got.shape}, expected {expected.value.shape}"
    if not got.size:
        return 0.0
    used = np.abs(got.astype(np.float64) - expected.value) / expected.limits(stored)
    used = np.where(np.isfinite(got), used, np.inf)
    worst = np.unravel_index(np.argmax(used), used.shape)
    assert used[worst] <= 1, (
        f"{what}: {np.count_nonzero(~(used <= 1))} of {used.size} elements are too far off; worst at {tuple(map(int, worst))}: "
        f"{got[worst]!r}, expected {expected.value[worst]!r} within {expected.limits(stored)[worst]:.3g}"
    )
    return float(used[worst])


# ------------------------------------------------------------------------------------------------ the phases' math, bounded
def normed(residual: np.ndarray, weight: np.ndarray, eps: float, size: int) -> Bounded:
    """RMSNorm of a float32 residual; that and its product with the weights, which float32 holds exactly, are rounded to bf16."""
    y = phases.rms_norm(residual, weight.astype(np.float64), eps, size, Precision(np.float64))
    return Bounded(y, NORM * np.abs(y))


def product(x: Bounded, weight: np.ndarray) -> Bounded:
    """x [rows, inputs] times weight [outputs, inputs], transposed; summed in float32."""
    weight = weight.astype(np.float64)
    return Bounded(x.value @ weight.T, (x.slack + SUM * np.abs(x.value)) @ np.abs(weight).T)


def rotated(y: Bounded, rope: np.ndarray, num_rotary: int) -> Bounded:
    """RoPE of heads [rows, heads * head_dim]: the first `num_rotary` heads, pairs being adjacent. rope [rows, head_dim / 2, 2]."""
    rows, pairs = rope.shape[:2]
    value, slack = (a.reshape(rows, -1, pairs, 2).copy() for a in (y.value, y.slack))
    cos, sin = rope[:, None, :, 0].astype(np.float64), rope[:, None, :, 1].astype(np.float64)
    even, odd = value[:, :num_rotary, :, 0].copy(), value[:, :num_rotary, :, 1].copy()
    value[:, :num_rotary, :, 0], value[:, :num_rotary, :, 1] = even * cos - odd * sin, odd * cos + even * sin
    s0, s1 = (slack[:, :num_rotary, :, i] + 2.0**-22 * np.abs(v) for i, v in ((0, even), (1, odd)))
    turned = np.stack([s0 * np.abs(cos) + s1 * np.abs(sin), s1 * np.abs(cos) + s0 * np.abs(sin)], axis=-1)
    slack[:, :num_rotary] = turned
    return Bounded(value.reshape(rows, -1), slack.reshape(rows, -1))


def attended(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> Bounded:
    """One row's head outputs [heads, head_dim]; q [heads, head_dim], keys and values [positions, kv_heads, head_dim]."""
    q, keys, values = (np.asarray(a, np.float64) for a in (q, keys, values))
    group = len(q) // keys.shape[1]
    k, v = (np.repeat(a.transpose(1, 0, 2), group, axis=0) for a in (keys, values))  # [heads, positions, head_dim]
    scores = np.einsum("hd,htd->ht", q, k) * scale
    error = SUM * scale * np.einsum("hd,htd->ht", np.abs(q), np.abs(k))
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    value = np.einsum("ht,htd->hd", weights, v)
    drift = 2 * error.max(axis=1, keepdims=True) + 2 * EXP + SUM  # of a weight relative to all others, and of the sums
    slack = drift * np.einsum("ht,htd->hd", weights, np.abs(v)) + WEIGHT * np.sqrt(np.einsum("ht,htd->hd", weights**2, v**2))
    return Bounded(value, slack)


def activated(y: Bounded) -> Bounded:
    """silu(gate) * up of rows whose outputs alternate: gate0, up0, gate1, up1, …"""
    gate, up = y.value[:, 0::2], y.value[:, 1::2]
    gate_slack, up_slack = y.slack[:, 0::2], y.slack[:, 1::2]
    with np.errstate(over="ignore"):
        silu = gate / (1 + np.exp(-gate))
    value = silu * up
    slope = 1.1  # the steepest that silu is
    slack = slope * gate_slack * (np.abs(up) + up_slack) + np.abs(silu) * up_slack + EXP * np.abs(value)
    return Bounded(value, slack)
