"""What a step, a prompt, a whole generation must read, and so how long it takes at least: bytes ÷ read ceiling.

Bytes are those of the rank's buffers as the shape lays them out: all weights that a step streams, the KV of every position a row
attends to, the embedding rows. With several ranks the slowest one's bound counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from imex_persist import planner
from imex_persist.bench.floor import Ceiling
from imex_persist.front.plan import STREAMED
from imex_persist.model import packing


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one rank."""

    weights: int  # of a step without logits
    logits: int  # what one with logits reads beside that: the LM head, and the last layer after its o_proj
    kv_per_position: int  # of one row
    per_row: int  # its embedding

    @classmethod
    def of(cls, config, shape: np.void) -> StepBytes:
        sizes = packing.rank_bytes(config, shape)
        kv = planner.kv_bytes(shape) // (int(shape["num_pages"]) * int(shape["page_size"]))
        logits = sizes["lm_head"] + (sizes["gate_up"] + sizes["down_proj"]) // int(shape["num_layers"])
        weights = sum(sizes[name] for name in STREAMED) - logits
        return cls(weights, logits, kv, 2 * int(shape["hidden_size"]))

    def decode(self, contexts: list[float]) -> float:
        """A step with a row for each of `contexts`: how many positions it attends to beside its own."""
        return self.weights + self.logits + sum(contexts) * self.kv_per_position + len(contexts) * self.per_row

    def prompt(self, length: int, rows: int) -> tuple[float, int]:
        """(bytes, steps) from a prompt to its first token, `rows` positions a step; the last step alone has logits.

        The rows of a step are of one sequence: its pages are read once, as far as its last row attends to what earlier steps left.
        """
        steps = -(-length // rows)
        kv = sum(step * rows for step in range(steps)) * self.kv_per_position
        return steps * self.weights + self.logits + kv + length * self.per_row, steps


def kv_cache_bytes(config, world_size: int, max_model_len: int, num_seqs: int) -> int:
    """Of a rank: what so many sequences use at their longest, in whole pages."""
    _, kv_heads = planner.heads_per_rank(config, world_size)
    head_dim = planner.round_up(config.head_dim, 32)
    positions = planner.round_up(max_model_len, planner.page_size_of(head_dim))
    return config.num_hidden_layers * kv_heads * positions * num_seqs * head_dim * 4


def least_us(nbytes: float, ceiling: Ceiling) -> float:
    return nbytes / ceiling.least * 1e6
