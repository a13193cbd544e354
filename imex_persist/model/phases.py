"""The phases of a decode step in NumPy, one function per abi.Phase, with the kernel's inputs, outputs and rounding points.

Matrices are a rank's padded ones in the kernel's row order (shard.py), as float arrays [outputs, inputs]; the first axis of
every activation is the row of the step. Padding columns are zero throughout, so the same functions serve the whole model
and a rank's part.

Rounding points (docs/architecture.md): the residual is float32 and never rounded; the norm's input, its product with the norm's
weights, q, k, v, the attention output and the FFN activation are rounded to bfloat16; partial sums and logits are not (of a partial
sum the kernel exchanges 16 significant bits, unless exchange_dtype is float32).
`Precision(rounding=False, dtype=np.float64)` is the same math without any rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from imex_persist.model.bf16 import round_bf16


@dataclass(frozen=True)
class Precision:
    """What the reference computes in, and whether it rounds where the kernel does."""

    dtype: type = np.float32
    rounding: bool = True

    def round(self, values: np.ndarray) -> np.ndarray:
        """`values` in `dtype`, rounded to bfloat16 if this precision rounds."""
        values = np.asarray(values, self.dtype)
        return round_bf16(values) if self.rounding else values


KERNEL = Precision()
EXACT = Precision(np.float64, rounding=False)


def embed(weight: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Residual at the start of a step: rows `tokens` of the embedding. [rows, hidden]"""
    return weight[np.asarray(tokens)]


def rms_norm(residual: np.ndarray, weight: np.ndarray, eps: float, norm_size: int, precision: Precision = KERNEL) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight with x = the rounded residual [rows, hidden]; the mean divides by `norm_size`.

    x * weight is what is rounded: the kernel divides by the root after the product that follows (cuda_src/norm.cuh).
    """
    x = precision.round(residual)
    mean = (x * x).sum(axis=1, keepdims=True) / precision.dtype(norm_size)
    return precision.round(x * weight) / np.sqrt(mean + precision.dtype(eps))


def qkv(x: np.ndarray, weight: np.ndarray, rope: np.ndarray, num_rotary: int, precision: Precision = KERNEL) -> np.ndarray:
    """q, k and v heads of normed rows x [rows, hidden], rotated: [rows, heads + 2 * kv_heads, head_dim].

    weight [(heads + 2 * kv_heads) * head_dim, hidden]; rope [rows, head_dim / 2, 2] is (cos, sin) of each row's position;
    the first `num_rotary` heads (q and k) are rotated, pairs being adjacent.
    """
    y = x @ weight.T
    y = y.reshape(len(x), -1, 2 * rope.shape[1])
    even, odd = y[:, :num_rotary, 0::2].copy(), y[:, :num_rotary, 1::2].copy()
    cos, sin = rope[:, None, :, 0].astype(precision.dtype), rope[:, None, :, 1].astype(precision.dtype)
    y[:, :num_rotary, 0::2] = even * cos - odd * sin
    y[:, :num_rotary, 1::2] = odd * cos + even * sin
    return precision.round(y)


def attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float, precision: Precision = KERNEL) -> np.ndarray:
    """Head outputs of one row: softmax(q k^T * scale) v, [heads, head_dim].

    q [heads, head_dim]; keys, values [positions, kv_heads, head_dim], the row's own position included; query head h reads
    key-value head h // (heads / kv_heads).
    """
    heads, head_dim = q.shape
    grouped = q.reshape(keys.shape[1], -1, head_dim)
    scores = np.einsum("ngd,tnd->ngt", grouped, keys, optimize=True) * precision.dtype(scale)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    out = np.einsum("ngt,tnd->ngd", weights, values, optimize=True) / weights.sum(axis=2)[:, :, None]
    return precision.round(out.reshape(heads, head_dim))


def o_proj(attn: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A rank's partial sums of the attention block: attn [rows, heads * head_dim], weight [hidden, heads * head_dim]."""
    return attn @ weight.T


def gate_up(x: np.ndarray, weight: np.ndarray, precision: Precision = KERNEL) -> np.ndarray:
    """silu(gate) * up of normed rows: [rows, intermediate]. weight [2 * intermediate, hidden], rows gate0, up0, gate1, up1,
    …
    """
    y = x @ weight.T
    gate, up = y[:, 0::2], y[:, 1::2]
    with np.errstate(over="ignore"):  # exp(-gate) may overflow to infinity: silu is then -0, as on the device
        return precision.round(gate / (1 + np.exp(-gate)) * up)


def down_proj(gate: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A rank's partial sums of the FFN, or one K slice's: gate [rows, columns], weight [hidden, columns]."""
    return gate @ weight.T


def exchange(residual: np.ndarray, partials: list[np.ndarray]) -> np.ndarray:
    """The residual after o_proj or down_proj: plus every source's partial sums, added in order of rank, then slice."""
    total = partials[0]
    for part in partials[1:]:
        total = total + part
    return residual + total


def lm_head(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A rank's logits of normed rows: [rows, vocab_rows]."""
    return x @ weight.T


def sample(logits: np.ndarray, vocab_size: int) -> np.ndarray:
    """Greedy tokens of logits [rows, vocabulary]: the largest, ties to the lowest id; ids from `vocab_size` on never."""
    return logits[:, :vocab_size].argmax(axis=1)
