"""The whole model in NumPy, phase by phase (phases.py), on any number of ranks: what the kernel is compared with.

Slow and readable. The kernel's own order, padding and rounding are the default; `EXACT` is the same in float64 without
rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from imex_persist.model import phases
from imex_persist.model.bf16 import to_float32
from imex_persist.model.config import ModelConfig
from imex_persist.model.phases import EXACT, KERNEL, Precision
from imex_persist.model.rope import rope_table
from imex_persist.model.shard import RankShard, model_shape
from imex_persist.model.weights import WeightSource

__all__ = ["EXACT", "KERNEL", "Precision", "RankModel", "Reference", "Sequence", "generate", "logits"]


class RankModel:
    """One rank's weights as float matrices in the kernel's row order. `keep` holds each after its first use."""

    def __init__(
        self,
        source: WeightSource,
        config: ModelConfig,
        shape: np.void,
        rank: int = 0,
        precision: Precision = KERNEL,
        keep: bool = True,
    ):
        self.shape, self.precision = shape, precision
        self._shard = RankShard(source, config, shape, rank)
        self.norms = to_float32(np.asarray(self._shard.norms())).astype(precision.dtype)  # [2 * num_layers + 1, hidden]
        if keep:
            self.matrices = lru_cache(maxsize=None)(self.matrices)

    def matrices(self, name: str, layer: int = 0) -> list[np.ndarray]:
        """The matrices of a field of abi.RankParams, padded, [outputs, inputs]: one, or down_proj's K slices."""
        whole = (matrix.read(0, matrix.shape[0]) for matrix in self._shard.matrices(name, layer))
        return [to_float32(np.asarray(bits)).astype(self.precision.dtype, copy=False) for bits in whole]

    def norm(self, index: int, residual: np.ndarray) -> np.ndarray:
        """Norm `index` (2 * layer, 2 * layer + 1, or 2 * num_layers) of the residual [rows, hidden]."""
        eps, size = float(self.shape["rms_eps"]), int(self.shape["norm_size"])
        return phases.rms_norm(residual, self.norms[index], eps, size, self.precision)


@dataclass
class Sequence:
    """One sequence's keys and values: [rank][layer] -> float [positions, 2, kv_heads, head_dim]."""

    cache: list[list[np.ndarray]] = field(default_factory=list)
    length: int = 0


class Reference:
    """A model on `world_size` ranks, whose partial sums are added as the kernel adds them.

    `shape` is an abi.Shape (a planner's, to get its down_slices) or None. With `keep=False` weights are read again at each
    use, so that a large model needs only one layer's memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        *,
        world_size: int = 1,
        shape: np.void | None = None,
        precision: Precision = KERNEL,
        keep: bool = True,
    ):
        self.config, self.precision = config, precision
        self.shape = model_shape(config, world_size) if shape is None else shape
        self.world_size = int(self.shape["world_size"])
        self.ranks = [RankModel(source, config, self.shape, r, precision, keep) for r in range(self.world_size)]

    def sequence(self) -> Sequence:
        """An empty sequence."""
        s = self.shape
        empty = np.zeros((0, 2, int(s["num_kv_heads"]), int(s["head_dim"])), self.precision.dtype)
        return Sequence([[empty] * int(s["num_layers"]) for _ in self.ranks])

    def forward(self, sequence: Sequence, tokens: list[int] | np.ndarray) -> np.ndarray:
        """Appends `tokens` to `sequence` and returns the logits after each of them: [tokens, vocab_size]."""
        tokens = np.asarray(tokens, np.int64)
        if tokens.ndim != 1 or not len(tokens) or tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(f"token ids must be a non-empty list of integers from 0 to {self.config.vocab_size - 1}")
        rope = rope_table(self.config, len(tokens), sequence.length)
        residual = phases.embed(self.ranks[0].matrices("embed")[0], tokens)
        for layer in range(int(self.shape["num_layers"])):
            partials = [self._attention_block(rank, layer, residual, rope, sequence) for rank in range(self.world_size)]
            residual = phases.exchange(residual, partials)
            partials = [part for rank in self.ranks for part in self._ffn_block(rank, layer, residual)]
            residual = phases.exchange(residual, partials)
        sequence.length += len(tokens)
        last = 2 * int(self.shape["num_layers"])
        parts = [phases.lm_head(rank.norm(last, residual), rank.matrices("lm_head")[0]) for rank in self.ranks]
        return np.concatenate(parts, axis=1)[:, : self.config.vocab_size]

    def _attention_block(self, rank: int, layer: int, residual, rope, sequence: Sequence) -> np.ndarray:
        model, heads, kv = self.ranks[rank], int(self.shape["num_heads"]), int(self.shape["num_kv_heads"])
        x = model.norm(2 * layer, residual)
        qkv = phases.qkv(x, model.matrices("qkv", layer)[0], rope, heads + kv, self.precision)
        new = qkv[:, heads:].reshape(len(x), 2, kv, -1)
        cache = sequence.cache[rank][layer] = np.concatenate([sequence.cache[rank][layer], new])
        attn = []
        for row in range(len(x)):
            seen = cache[: sequence.length + row + 1]
            attn.append(
                phases.attention(qkv[row, :heads], seen[:, 0], seen[:, 1], float(self.shape["attn_scale"]), self.precision)
            )
        return phases.o_proj(np.stack(attn).reshape(len(x), -1), model.matrices("o_proj", layer)[0])

    def _ffn_block(self, model: RankModel, layer: int, residual) -> list[np.ndarray]:
        x = model.norm(2 * layer + 1, residual)
        gate = phases.gate_up(x, model.matrices("gate_up", layer)[0], self.precision)
        weights = model.matrices("down_proj", layer)
        parts = np.split(gate, len(weights), axis=1)
        return [phases.down_proj(part, weight) for part, weight in zip(parts, weights, strict=True)]


def logits(config: ModelConfig, source: WeightSource, token_ids: list[int], **options) -> np.ndarray:
    """Logits after every token of a list, teacher-forced: [tokens, vocab_size]. `options` are Reference's."""
    reference = Reference(config, source, **({"keep": False} | options))
    return reference.forward(reference.sequence(), token_ids)


def generate(
    config: ModelConfig, source: WeightSource, prompt: list[int], max_tokens: int, stop: tuple[int, ...] = (), **options
) -> list[int]:
    """Greedy continuation of `prompt`: at most `max_tokens` ids, the last of them one of `stop` if it came to that."""
    reference = Reference(config, source, **options)
    sequence, out, fresh = reference.sequence(), [], list(prompt)
    while len(out) < max_tokens:
        token = int(phases.sample(reference.forward(sequence, fresh)[-1:], config.vocab_size)[0])
        out.append(token)
        if token in stop:
            break
        fresh = [token]
    return out
