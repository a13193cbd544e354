"""Which rows and columns of which tensors a rank's matrices are made of, in the order the kernel computes them, padding
included.

A rank has whole groups of query heads and their key-value head, an equal run of FFN columns, and a run of the vocabulary.
Where they do not divide, the rest is zero: zero rows give zero activations, zero columns ignore theirs, so the sum over
ranks is exact. The packed form of these matrices is packing.py's; the reference multiplies with them as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from imex_persist import abi, planner
from imex_persist.model.config import ModelConfig
from imex_persist.model.weights import EMBED, FINAL_NORM, LM_HEAD, WeightSource, layer_names


def model_shape(config: ModelConfig, world_size: int = 1, down_slices: int = 1) -> np.void:
    """The model's part of an abi.Shape, for sharding and the reference; planner.make_shape adds a machine's."""
    s = np.zeros((), abi.Shape)
    s["num_heads"], s["num_kv_heads"] = planner.heads_per_rank(config, world_size)
    s["hidden_size"], s["norm_size"] = planner.round_up(config.hidden_size, 32), config.hidden_size
    s["head_dim"], s["num_layers"] = planner.round_up(config.head_dim, 32), config.num_hidden_layers
    s["intermediate_size"] = planner.round_up(-(-config.intermediate_size // world_size), 32 * down_slices)
    s["vocab_rows"] = planner.round_up(-(-config.vocab_size // world_size), abi.UNIT_ROWS)
    s["vocab_size"], s["rms_eps"], s["attn_scale"] = config.vocab_size, config.rms_norm_eps, config.attention_scale
    s["world_size"], s["down_slices"] = world_size, down_slices
    return s


@dataclass(frozen=True)
class RankMatrix:
    """One padded matrix of one rank; `read(start, stop)` gives rows [start, stop): uint16 [stop - start, shape[1]]."""

    shape: tuple[int, int]
    read: Callable[[int, int], np.ndarray]
    splittable: bool = True  # False: read it whole


def padded(block, rows: int, columns: int, xp=np):
    """`block` with zero rows and columns after it: [rows, columns]."""
    if block.shape == (rows, columns):
        return block
    out = xp.zeros((rows, columns), xp.uint16)
    out[: block.shape[0], : block.shape[1]] = block
    return out


def rope_order(head_dim: int) -> np.ndarray:
    """Hugging Face row of a head for each row of the kernel's order: 0, d/2, 1, d/2 + 1, …"""
    return np.arange(head_dim).reshape(2, head_dim // 2).T.ravel()


class RankShard:
    """The matrices of rank `rank` of a model, read from `source` on demand. `xp` is the array module they are assembled in."""

    def __init__(self, source: WeightSource, config: ModelConfig, shape: np.void, rank: int, xp=np):
        self.source, self.config, self.rank, self.xp = source, config, rank, xp
        self.hidden, self.head_dim, self.ffn = (int(shape[k]) for k in ("hidden_size", "head_dim", "intermediate_size"))
        self.heads, self.kv_heads, self.slices = (int(shape[k]) for k in ("num_heads", "num_kv_heads", "down_slices"))
        self.vocab_rows, self.world = int(shape["vocab_rows"]), int(shape["world_size"])
        per_rank = -(-config.intermediate_size // self.world)
        self.ffn_start = min(rank * per_rank, config.intermediate_size)
        self.ffn_real = min(per_rank, config.intermediate_size - self.ffn_start)

    def matrices(self, field: str, layer: int = 0) -> list[RankMatrix]:
        """The matrices of a weight field of abi.RankParams, in buffer order: one, or `down_slices` of them for down_proj."""
        if field == "down_proj":
            return [self._down_proj(layer, j) for j in range(self.slices)]
        return [getattr(self, "_" + field)(layer)]

    def norms(self) -> np.ndarray:
        """uint16 [2 * num_layers + 1, hidden_pad]: input and post-attention norm of each layer, then the final one."""
        names = []
        for layer in range(self.config.num_hidden_layers):
            full = layer_names(layer)
            names += [full["input_layernorm"], full["post_attention_layernorm"]]
        rows = [self.xp.asarray(self.source.read(name))[None] for name in [*names, FINAL_NORM]]
        return padded(self.xp.concatenate(rows), len(rows), self.hidden, self.xp)

    def _tensor(self, name: str, rows=None, columns=None):
        return self.xp.asarray(self.source.read(name, rows, columns))

    def _heads(self, name: str, num_heads: int, rotary: bool, of_model: int):
        """Rows of this rank's heads of one projection, each head padded: [num_heads * head_dim_pad, hidden_pad]."""
        d, xp = self.config.head_dim, self.xp
        first = min(self.rank * num_heads, of_model)
        real = min(num_heads, of_model - first)
        out = xp.zeros((num_heads, self.head_dim, self.hidden), xp.uint16)
        if real == 0:
            return out.reshape(-1, self.hidden)
        rows = self._tensor(name, (first * d, (first + real) * d)).reshape(real, d, -1)
        if rotary and not self.source.rope_adjacent:
            rows = rows[:, xp.asarray(rope_order(d))]
        out[:real, :d, : self.config.hidden_size] = rows
        return out.reshape(-1, self.hidden)

    def _qkv(self, layer: int) -> RankMatrix:
        names, config = layer_names(layer), self.config

        def read(start: int, stop: int):
            parts = [
                self._heads(names["q_proj"], self.heads, True, config.num_attention_heads),
                self._heads(names["k_proj"], self.kv_heads, True, config.num_key_value_heads),
                self._heads(names["v_proj"], self.kv_heads, False, config.num_key_value_heads),
            ]
            return self.xp.concatenate(parts)[start:stop]

        return RankMatrix(((self.heads + 2 * self.kv_heads) * self.head_dim, self.hidden), read, splittable=False)

    def _o_proj(self, layer: int) -> RankMatrix:
        name, d, xp = layer_names(layer)["o_proj"], self.config.head_dim, self.xp
        first = min(self.rank * self.heads, self.config.num_attention_heads)
        real = min(self.heads, self.config.num_attention_heads - first)

        def read(start: int, stop: int):
            last = min(stop, self.config.hidden_size)
            out = xp.zeros((stop - start, self.heads, self.head_dim), xp.uint16)
            if last > start and real:
                part = self._tensor(name, (start, last), (first * d, (first + real) * d))
                out[: last - start, :real, :d] = part.reshape(last - start, real, d)
            return out.reshape(stop - start, -1)

        return RankMatrix((self.hidden, self.heads * self.head_dim), read)

    def _gate_up(self, layer: int) -> RankMatrix:
        names, xp = layer_names(layer), self.xp

        def read(start: int, stop: int):  # both even: units are 8 rows
            first, last = min(start // 2, self.ffn_real), min(stop // 2, self.ffn_real)
            out = xp.zeros((stop - start, self.hidden), xp.uint16)
            if last > first:
                rows = (self.ffn_start + first, self.ffn_start + last)
                for odd, name in enumerate(("gate_proj", "up_proj")):
                    out[odd : 2 * (last - first) : 2, : self.config.hidden_size] = self._tensor(names[name], rows)
            return out

        return RankMatrix((2 * self.ffn, self.hidden), read)

    def _down_proj(self, layer: int, slice_idx: int) -> RankMatrix:
        name, width = layer_names(layer)["down_proj"], self.ffn // self.slices
        first, last = (min(k * width, self.ffn_real) for k in (slice_idx, slice_idx + 1))

        def read(start: int, stop: int):
            end = max(start, min(stop, self.config.hidden_size))
            columns = (self.ffn_start + first, self.ffn_start + last)
            if end == start or first == last:
                return self.xp.zeros((stop - start, width), self.xp.uint16)
            return padded(self._tensor(name, (start, end), columns), stop - start, width, self.xp)

        return RankMatrix((self.hidden, width), read)

    def _vocabulary(self, name: str, first: int, rows: int) -> RankMatrix:
        def read(start: int, stop: int):
            left, right = (min(first + row, self.config.vocab_size) for row in (start, stop))
            if left == right:
                return self.xp.zeros((stop - start, self.hidden), self.xp.uint16)
            return padded(self._tensor(name, (left, right)), stop - start, self.hidden, self.xp)

        return RankMatrix((rows, self.hidden), read)

    def _lm_head(self, _layer: int) -> RankMatrix:
        name = EMBED if self.config.tie_word_embeddings else LM_HEAD
        return self._vocabulary(name, self.rank * self.vocab_rows, self.vocab_rows)

    def _embed(self, _layer: int) -> RankMatrix:
        return self._vocabulary(EMBED, 0, planner.round_up(self.config.vocab_size, abi.UNIT_ROWS))
