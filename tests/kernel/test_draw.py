"""Rows that are not plainly greedy, on random cases: what lm_head publishes for them against the NumPy reference of drawing
(imex_persist/model/sampling.py), given the kernel's own logits.
"""

from __future__ import annotations

import numpy as np
import pytest

from imex_persist import abi
from imex_persist.abi import Phase

from .cases import CASES, NUM_CASES, only, uses
from .drawing import check_token
from .phase_run import PhaseRun


def random_sampling(rng: np.random.Generator, vocab_size: int, position: int) -> np.void:
    """An abi.Sampling of a row at `position`; half of everything is off."""
    s = np.zeros((), abi.Sampling)
    index = int(rng.integers(0, min(position + 1, 50)))
    s["seed"] = rng.integers(0, 2**32, 2)
    s["temperature"] = rng.choice([0, 0.3, 1, 1, 2.5])
    if rng.integers(2):
        s["min_p"], s["log_min_p"] = 1, np.log(rng.choice([0.01, 0.1, 0.6, 1.0]))
    s["top_k"] = rng.choice([0, rng.integers(1, vocab_size + 2), rng.integers(1, 6)])
    s["top_p"] = rng.choice([0, rng.integers(1, 2**32), 2**32 - 1])
    s["repetition_penalty"] = rng.choice([1, 1.3, 0.7])
    s["presence_penalty"] = rng.choice([0, 0.5, -1])
    s["frequency_penalty"] = rng.choice([0, 0.5, -1])
    s["prompt_len"] = position + 1 - index
    s["min_tokens"] = rng.choice([0, index, index + 1])
    count = min(int(rng.integers(0, abi.MAX_STOP_IDS + 1)), vocab_size - 1)
    s["num_masked"], s["masked"][:count] = count, rng.choice(vocab_size, count, replace=False)
    return s


def words_of(s: np.void) -> list[int]:
    return np.array([s]).view(np.uint32).tolist()


@pytest.mark.parametrize("index", range(NUM_CASES))
@uses(lambda index: [only(CASES[index], Phase.LM_HEAD)])
def test_draw(make_device, index):
    """Every other slot of the case draws; the others are greedy, as without company."""
    case, options = only(CASES[index], Phase.LM_HEAD)
    p = PhaseRun(make_device, case, **options)
    p.put_partials("off_down_part", p.size("down_slices"), p.size("num_layers"))
    vocab, sampling = case.config.vocab_size, {}
    first = int(p.rng.integers(2))
    for i, slot in enumerate(dict.fromkeys(p.slots.tolist())):
        if i % 2 == first:
            continue
        rows = np.flatnonzero(p.slots == slot)
        s = random_sampling(p.rng, vocab, int(p.positions[rows[-1]]))
        sampling |= {int(row): s for row in rows}
    p.run.put_plan(p.plan_rows, {row: words_of(s) for row, s in sampling.items()})
    p.launch()
    logits = np.concatenate([p.run.tap_of(rank, Phase.LM_HEAD) for rank in p.ranks], axis=1)[: p.rows, :vocab]
    size = (p.run.world * p.size("num_blocks"), p.size("max_rows"), 2)
    for rank in p.ranks:
        words, epochs = (a.reshape(size) for a in p.raw(rank, "off_best", int(np.prod(size))))
        assert np.all(epochs[:, : p.rows] == p.size("num_layers") + 1)
        best = (words[..., 0].astype(np.uint64) << np.uint64(32) | words[..., 1]).max(axis=0)
        for row in np.flatnonzero(p.samples):
            token = 0xFFFFFFFF - int(best[row] & np.uint64(0xFFFFFFFF))
            if row not in sampling:
                assert token == logits[row].argmax()
                continue
            check_row(p, logits[row], sampling[row], int(row), token)


def check_row(p: PhaseRun, logits: np.ndarray, s: np.void, row: int, token: int) -> None:
    """What the kernel knows of a request's tokens is what this step has brought: it began with no counts."""
    number = int(p.positions[row]) + 1 - int(s["prompt_len"])
    mine = np.flatnonzero((p.slots == p.slots[row]) & (np.arange(p.rows) <= row))
    if s["repetition_penalty"] == 1 and number == 0:
        mine = mine[
            -1:
        ]  # of presence and frequency only what is generated matters: counts begin with the first row that samples
    prompt = [int(p.tokens[r]) for r in mine if p.positions[r] < s["prompt_len"]]
    generated = [int(p.tokens[r]) for r in mine if p.positions[r] >= s["prompt_len"]]
    check_token(f"row {row}", token, logits, s, prompt, generated, number)
