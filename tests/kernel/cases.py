"""Random but seeded configurations: a model, a plan, and what one step of it holds. Case i is the same on every machine.

What matters most is dealt out like cards, so that any few neighbouring cases have much of it; the rest is drawn. test_cases.py says
what all of them together cover.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from imex_persist import abi, planner
from imex_persist.abi import Phase, Strategy
from imex_persist.model.config import ModelConfig
from imex_persist.planner import Machine

NUM_CASES = 48
SEED = 1
MAX_MODEL_LEN = 704  # beyond 256 positions, where a context is cut into runs
HEAD_DIMS = (64, 40, 128, 32, 100, 80, 96, 48)
GROUPS = (3, 1, 4, 8, 2, 7, 5, 20, 6)
ROWS = (4, 1, 8, 2, 16, 3, 7, 5, 6)
WORLDS = (2, 1, 4, 3, 1)
EXCHANGES = (
    Strategy.ONE_SHOT,
    Strategy.TWO_SHOT,
    Strategy.ONE_SHOT_LOCAL,
)  # SEMAPHORE, which has no words: whole models, tests/bench
SLICES = (1, 2, 4)
STARTS = ("empty", "page", "long", "few", "split", "solo")
ROPES = (
    {},
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        }
    },
)  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """Neighbouring rows of a step: `count` positions from `start` on of the sequence in `slot`; the last may be sampled."""

    slot: int
    start: int
    count: int
    samples: bool = True


@dataclass(frozen=True)
class Case:
    """A configuration and one step."""

    name: str
    seed: int
    config: ModelConfig
    num_blocks: int
    chunks: tuple[Chunk, ...]
    options: dict  # make_shape's

    @property
    def num_rows(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    @property
    def page_size(self) -> int:
        return planner.page_size_of(planner.round_up(self.config.head_dim, 32))

    def shape(self, machine: Machine | None = None, *, renew_steps: int | None = None, **more) -> np.void:
        """The abi.Shape on `machine`, with this case's blocks; epochs begin again after `renew_steps`; `more` are make_shape's options."""
        pages = self.options["num_slots"] * -(-self.options["max_model_len"] // self.page_size)
        machine = replace(machine or Machine(), num_blocks=self.num_blocks)
        # one page more than the slots can hold: whoever reads what nobody wrote finds it there (phase_run.py)
        shape = planner.make_shape(self.config, machine=machine, num_pages=pages + 1, **(self.options | more))
        shape["renew_steps"] = renew_steps or shape["renew_steps"]
        return shape

    def with_layers(self, least: int) -> Case:
        """This case with at least so many layers."""
        layers = max(least, self.config.num_hidden_layers)
        return replace(self, config=replace(self.config, num_hidden_layers=layers))


def model(**sizes) -> ModelConfig:
    """A Llama configuration of the given sizes."""
    fields = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 4096, "num_hidden_layers": 2, "vocab_size": 301, "tie_word_embeddings": False,
    }  # fmt: skip
    return ModelConfig.from_dict(fields | sizes)


def deal(salt: int, values: tuple, index: int):
    """Card number `index` of a stack of shuffled packs, each of which has every value once."""
    pack, at = divmod(index, len(values))
    return values[np.random.default_rng([SEED, salt, pack]).permutation(len(values))[at]]


def random_config(index: int, rng: np.random.Generator) -> ModelConfig:
    group = deal(0, GROUPS, index)
    kv_heads = int(rng.integers(1, 5 if group < 6 else 3))
    return model(
        hidden_size=int(rng.integers(40, 641)),
        head_dim=deal(1, HEAD_DIMS, index),
        num_attention_heads=group * kv_heads,
        num_key_value_heads=kv_heads,
        intermediate_size=2 * int(rng.integers(1, 450)) + 1,
        vocab_size=int(rng.choice([rng.integers(5, 40), rng.integers(40, 800)])),
        num_hidden_layers=int(rng.integers(1, 4)),
        tie_word_embeddings=bool(rng.integers(2)),
        rms_norm_eps=float(rng.choice([1e-6, 1e-5, 1e-3])),
        rope_theta=float(rng.choice([1e4, 5e5])),
        **deal(2, ROPES, index),
    )


def random_chunks(index: int, rows: int, num_slots: int, page_size: int, rng: np.random.Generator) -> tuple[Chunk, ...]:
    """`rows` rows dealt to some of the slots, in any order, at starts of every kind."""
    counts = []
    while rows:
        last = len(counts) == num_slots - 1
        counts.append(rows if last else int(rng.integers(1, rows + 1)))
        rows -= counts[-1]
    chunks = []
    for i, (slot, count) in enumerate(zip(rng.permutation(num_slots), counts, strict=False)):
        start = {
            "empty": 0,
            "few": int(rng.integers(1, 31)),
            "page": page_size * int(rng.integers(1, 3)) - int(rng.integers(0, count + 1)),  # at, or across, a page's border
            "split": 256 - int(rng.integers(0, count + 2)),  # around the first context that is cut
            "long": int(rng.integers(257, MAX_MODEL_LEN - count)),
            "solo": int(rng.integers(32, 250)),
        }[deal(3, STARTS, index + 5 * i)]
        chunks.append(Chunk(int(slot), start, count, bool(rng.integers(4))))
    return tuple(chunks)


def random_case(index: int) -> Case:
    rng = np.random.default_rng([SEED, index])
    config = random_config(index, rng)
    slices = deal(4, SLICES, index)
    rows = deal(5, ROWS, index)
    max_rows = rows + int(rng.integers(2)) if rows < 8 else rows
    num_slots = min(int(rng.integers(1, 5)), rows)
    exchange = deal(6, EXCHANGES, index)
    page_size = planner.page_size_of(planner.round_up(config.head_dim, 32))
    options = {
        "world_size": deal(7, WORLDS, index),
        "max_rows": max_rows,
        "num_slots": num_slots,
        "max_model_len": MAX_MODEL_LEN,
        "strategy": Strategy.ONE_SHOT_LOCAL if exchange == Strategy.ONE_SHOT else exchange,
        "one_shot_rows": int(rng.integers(rows, max_rows + 1)) if exchange == Strategy.ONE_SHOT else int(rng.integers(0, rows)),
        "down_slices": slices,
    }
    num_blocks = int(rng.integers(slices, 9))
    chunks = random_chunks(index, rows, num_slots, page_size, rng)
    return Case(f"case{index}", index, config, num_blocks, chunks, options)


CASES = [random_case(index) for index in range(NUM_CASES)]


def only(case: Case, phase: Phase) -> tuple[Case, dict]:
    """The case and make_shape's options that run `phase` alone, in the last layer.

    QKV needs a layer before, whose down_proj it takes in: in layer 0 it starts from the embedding, which another phase makes.
    """
    case = case.with_layers(2) if phase == Phase.QKV else case
    tap = phase in (Phase.EMBED, Phase.LM_HEAD)  # the residual is nowhere else; nor are all logits
    return case, {"only_phase": phase, "only_layer": case.config.num_hidden_layers - 1, "tap": tap}


def uses(kernels: Callable[..., list[tuple[Case, dict]]]):
    """Marks a test with the kernels it loads: `kernels(**its parameters)` gives cases and make_shape's options. Where every shape is
    a build of its own, they are built beforehand, many at a time (tests/gpu/test_kernel.py).
    """

    def mark(test):
        test.kernels = kernels
        return test

    return mark


def exchange_of(case: Case) -> abi.Strategy:
    """How the case's step crosses ranks."""
    return Strategy.ONE_SHOT if case.num_rows <= case.options["one_shot_rows"] else case.options["strategy"]
