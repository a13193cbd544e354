"""What a seed runs: a small model on a few blocks and ranks, requests for it, and a schedule. The same on every machine.

A configuration is shared by SCHEDULES neighbouring seeds, which run it under different schedules: its memory, weights and the
round-robin run that the others are compared with are made once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from imex_persist import SamplingParams, planner
from imex_persist.abi import Strategy
from imex_persist.runtime.sampling import Sampling, sampling_of
from tests.kernel.cases import Case, model
from tests.kernel.drawing import random_params

SALT = 6
SCHEDULES = 12
LONG_ROWS = 16  # rows of configurations whose prompt is long enough to be cut into runs
EXCHANGES = (
    (Strategy.ONE_SHOT, None), (Strategy.ONE_SHOT_LOCAL, 0), (Strategy.TWO_SHOT, 0), (Strategy.TWO_SHOT, 1), (Strategy.SEMAPHORE, 0),
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    max_tokens: int
    stop: tuple[int, ...] = ()
    min_tokens: int = 0
    sampling: Sampling | None = None
    cancel_after: int | None = None  # looks of the mailbox at its ring between the last submit and the cancel

    @property
    def positions(self) -> int:
        return len(self.prompt) + self.max_tokens


@dataclass(frozen=True)
class Configuration:
    """A model, a grid, requests. `max_stages` and `window` size the ring."""

    number: int
    lanes: int
    case: Case
    max_stages: int
    window: int
    requests: tuple[Request, ...]
    renew_steps: int = 4  # after so many steps epochs begin again

    def __str__(self) -> str:
        c, o = self.case.config, self.case.options
        exchange = "ONE_SHOT" if o["one_shot_rows"] is None else f"{o['strategy'].name} above {o['one_shot_rows']} rows"
        exchange += " of float24" if o["float24_partials"] else ""
        return (
            f"LANES={self.lanes}, {o['world_size']} ranks x {self.case.num_blocks} blocks, {exchange}, {o['max_rows']} rows, "
            f"{o['down_slices']} down slices, ring {self.max_stages}/{self.window}, epochs of {self.renew_steps} steps, "
            f"hidden {c.hidden_size}, {c.num_hidden_layers} layers, "
            f"requests {[(len(r.prompt), r.max_tokens, r.sampling and r.sampling.draw.name, r.cancel_after) for r in self.requests]}"
        )


@dataclass(frozen=True)
class Schedule:
    """SimDevice's options."""

    seed: int
    options: dict = field(default_factory=dict)


def _requests(rng: np.random.Generator, vocab: int, rows: int, page: int, count: int, lanes: int) -> list[Request]:
    requests = []
    for _ in range(count):
        kind = rng.integers(8)
        if kind == 0 and page <= 64 and lanes == 1:  # across the border of a page that an earlier step has written
            length = page + int(rng.integers(0, 3))
        else:
            length = 257 + int(rng.integers(8)) if rows == LONG_ROWS else int(rng.integers(1, 2 * rows + 3))
        requests.append(
            Request(
                tuple(int(t) for t in rng.integers(0, vocab, length)),
                int(rng.integers(1, 3 if length > 30 or lanes == 32 else 7)),
                tuple(int(t) for t in rng.choice(vocab, 6, replace=False)) if rng.integers(3) == 0 else (),
                int(rng.integers(0, 3)),
            )
        )
    return requests


def _drawn(number: int, requests: list[Request], vocab_size: int) -> list[Request]:
    """Some requests are not plainly greedy; of them one in three wants log-probabilities."""
    rng, out = np.random.default_rng([SALT, 2, number]), []
    for r in requests:
        fields = (
            random_params(rng, vocab_size) if rng.integers(4) else {"temperature": 0}
        )  # masked only, if stop tokens must wait
        fields |= {"max_tokens": r.max_tokens, "stop_token_ids": r.stop, "min_tokens": 0}
        if rng.integers(3) == 0:
            fields["logprobs"] = int(rng.choice([0, 3, 20]))
        masks = min(r.min_tokens, r.max_tokens)
        sampling = sampling_of(SamplingParams(**fields), len(r.prompt), masks, (), vocab_size)
        out.append(replace(r, sampling=sampling) if rng.integers(2) else r)
    return out


def configuration(number: int, lanes: int | None = None) -> Configuration:
    """Configuration `number`; `lanes` forces one form of the simulator."""
    rng = np.random.default_rng([SALT, number])
    drawn = 32 if rng.integers(48) == 0 else 1  # thirty times as slow
    lanes = lanes or drawn
    many = lanes == 1 and rng.integers(40) == 0
    long = lanes == 1 and not many and rng.integers(12) == 0
    hidden = 1056 if many else int(rng.choice([64, 96]))
    kv_heads, group = int(rng.integers(1, 3)), int(rng.choice([1, 2, 3]))
    world = 1 if many or long else int(rng.choice([1, 2, 2, 3, 4] if lanes == 1 else [1, 2]))
    slices = int(rng.choice([1, 2]))
    blocks = 132 if many else int(rng.integers(2, 4 if lanes == 32 else 5 if world > 2 else 9))
    rows = 1 if many else LONG_ROWS if long else int(rng.integers(1, 5))
    strategy, one_shot_rows = EXCHANGES[int(rng.integers(len(EXCHANGES)))]
    head_dim = 32 if long else int(rng.choice([32, 64, 128]))
    config = model(
        hidden_size=hidden,
        head_dim=head_dim,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        intermediate_size=int(rng.choice([64, 96, 160])) * world,
        vocab_size=int(rng.choice([rng.integers(40, 150), rng.integers(150, 500)])),  # so that some blocks claim units of it
        num_hidden_layers=1 if many else 2,
        tie_word_embeddings=bool(rng.integers(2)),
    )
    count = 1 if many or long else int(rng.choice([1, 1, 2, 3] if lanes == 1 else [1, 2]))
    page = planner.page_size_of(planner.round_up(head_dim, 32))
    requests = _requests(rng, config.vocab_size, rows, page, count, 32 if many else lanes)
    if rng.integers(4) == 0:
        last = requests[-1]
        requests[-1] = replace(last, max_tokens=last.max_tokens + 4, cancel_after=int(rng.integers(0, 40)))
    requests = _drawn(number, requests, config.vocab_size)
    options = {
        "world_size": world, "max_rows": rows, "num_slots": count, "max_model_len": max(r.positions for r in requests),
        "strategy": strategy, "one_shot_rows": None if one_shot_rows is None else min(one_shot_rows, rows),
        "down_slices": min(slices, blocks),
    }  # fmt: skip
    stages = int(rng.integers(4, 13))
    case = Case(f"schedule{number}", number, config, blocks, (), options)
    window = max(2, int(rng.integers(1, min(stages, 4))))  # tiles move in groups of up to two
    renew_steps = int(rng.choice([1, 2, 4, 1 << 20]))
    options["float24_partials"] = bool(rng.integers(2))
    return Configuration(number, lanes, case, stages, window, tuple(requests), renew_steps)


def tiny(number: int, lanes: int = 32) -> Configuration:
    """As small as a configuration gets that still has every kind of phase, row and exchange: for ThreadSanitizer."""
    world, strategy, one_shot_rows, slices = (
        (1, Strategy.ONE_SHOT, None, 1), (2, Strategy.TWO_SHOT, 0, 2), (2, Strategy.ONE_SHOT_LOCAL, 0, 1),
    )[number]  # fmt: skip
    config = model(
        hidden_size=32, head_dim=32, num_attention_heads=2, num_key_value_heads=world, intermediate_size=64, vocab_size=24,
        num_hidden_layers=2, tie_word_embeddings=True,
    )  # fmt: skip
    options = {
        "world_size": world, "max_rows": 2, "num_slots": 1, "max_model_len": 8, "strategy": strategy,
        "one_shot_rows": one_shot_rows, "down_slices": slices, "float24_partials": number > 0,
    }  # fmt: skip
    return Configuration(-1 - number, lanes, Case("tiny", 1, config, 2, (), options), 5, 3, (Request((3, 1, 4), 3),))


def schedule(seed: int) -> Schedule:
    """How seed `seed` is run: the first seed of a configuration plain and in turn, the others as hostile as they are drawn."""
    rng = np.random.default_rng([SALT, 1, seed])
    options = {
        "mode": ("random", "pct")[int(rng.integers(3)) // 2],
        "delay_stores": bool(rng.integers(4)),
        "delay_copies": bool(rng.integers(4)),
        "split_words": bool(rng.integers(2)),
        "stalls": bool(rng.integers(2)),
        "preempt": int(rng.choice([0, 4, 8, 32])),
        "pct_depth": int(rng.integers(1, 9)),
        "pct_steps": int(rng.choice([2_000, 20_000, 100_000])),
    }
    if rng.integers(6) == 0:  # in the middle of it, or before it begins, or when all is done
        options["abort_step"] = int(10 ** rng.uniform(1, 5))
    return Schedule(seed, options)
