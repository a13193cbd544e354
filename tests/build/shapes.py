"""What the compile checks build: models of several sizes on several GPUs, each with the ring its shared memory allows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from imex_persist.model.config import ModelConfig
from imex_persist.planner import Machine, make_shape

# Multiprocessors and opt-in shared memory of a block: H100 and H200, B200, B300, RTX PRO 6000.
MACHINES = {
    "sm_90a": Machine(132, 232_448, exact_header=True),
    "sm_100a": Machine(148, 232_448, exact_header=True),
    "sm_103a": Machine(148, 232_448, exact_header=True),
    "sm_120a": Machine(188, 101_376, exact_header=True),
}

SMOLLM2_135M = ModelConfig(
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
    vocab_size=49152,
    tie_word_embeddings=True,
)
LLAMA_3_2_1B = ModelConfig(
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    intermediate_size=8192,
    vocab_size=128256,
    tie_word_embeddings=True,
)
LLAMA_3_1_8B = ModelConfig(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
)


@dataclass(frozen=True)
class Case:
    name: str
    config: ModelConfig
    world_size: int
    max_rows: int

    def shape(self, arch: str) -> tuple[np.void, int]:
        """(shape, rows): as many of the rows as that GPU's shared memory holds beside a ring."""
        for rows in range(self.max_rows, 0, -1):
            try:
                sizes = {"world_size": self.world_size, "max_rows": rows, "float24_partials": True}
                return make_shape(self.config, **sizes, machine=MACHINES[arch]), rows
            except ValueError:
                if rows == 1:
                    raise
        raise AssertionError("unreachable")


CASES = [
    Case("smollm2-tp2", SMOLLM2_135M, 2, 1),
    Case("1b-rows1", LLAMA_3_2_1B, 1, 1),
    Case("1b-rows8", LLAMA_3_2_1B, 1, 8),
    Case("8b-tp2", LLAMA_3_1_8B, 2, 1),
]
