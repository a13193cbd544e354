"""Whole models, run through the mailbox: the models, the requests, and what every run must satisfy."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace

import numpy as np

from imex_persist.abi import Finish, Phase, Record, Strategy
from imex_persist.model.dummy import DummyWeights
from imex_persist.model.reference import Reference
from imex_persist.tap import tap_view

from . import tolerance
from .cases import Case, deal, model
from .harness import KernelRun
from .pages import garbage

SEED = 2
NUM_MODELS = 12
WEAK = {"mode": "random", "delay": True, "stalls": True}  # a memory model and a schedule as hostile as a GPU's, or more
EXCHANGES = ((Strategy.ONE_SHOT_LOCAL, 0), (Strategy.TWO_SHOT, 1), (Strategy.ONE_SHOT_LOCAL, 16), (Strategy.TWO_SHOT, 0))


def random_model(index: int) -> Case:
    """Smaller than the cases of single phases: a run has dozens of steps."""
    rng = np.random.default_rng([SEED, index])
    group, kv_heads = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    config = model(
        hidden_size=int(rng.integers(40, 200)),
        head_dim=deal(8, (64, 40, 32, 48, 100, 128), index),
        num_attention_heads=group * kv_heads,
        num_key_value_heads=kv_heads,
        intermediate_size=2 * int(rng.integers(20, 150)) + 1,
        vocab_size=int(rng.integers(50, 400)),
        num_hidden_layers=deal(9, (2, 1, 3), index),
        tie_word_embeddings=bool(rng.integers(2)),
    )
    world, slices = deal(10, (2, 1, 4, 3), index), deal(11, (1, 2, 4), index)
    strategy, one_shot_rows = deal(12, EXCHANGES, index)
    rows = deal(13, (4, 1, 8, 3, 16, 2), index)
    options = {
        "world_size": world, "max_rows": rows, "num_slots": min(rows, 3), "max_model_len": 320, "strategy": strategy,
        "one_shot_rows": min(one_shot_rows, rows), "down_slices": slices,
    }  # fmt: skip
    return Case(f"model{index}", index, config, int(rng.integers(max(2, slices), 6)), (), options)


MODELS = [random_model(index) for index in range(NUM_MODELS)]


def with_options(case: Case, **options) -> Case:
    return replace(case, options=case.options | options)


def prompt_of(case: Case, length: int, salt: int = 0) -> list[int]:
    rng = np.random.default_rng([SEED, case.seed, salt, length])
    return [int(t) for t in rng.integers(0, case.config.vocab_size, length)]


@dataclass
class WholeRun:
    """A run that has ended: the kernel's memory is still there."""

    kernel: KernelRun
    requests: list[dict]
    tokens: list[list[int]]
    finishes: list[int]

    @property
    def shape(self) -> np.void:
        return self.kernel.shape

    def taps(self, phase: Phase, layer: int = 0) -> list[np.ndarray]:
        """float32 [max_rows, width] of every rank, of the last step with rows."""
        return [tap_view(values, self.shape, phase, layer) for values in self.all_taps()]

    def all_taps(self) -> list[np.ndarray]:
        if not hasattr(self, "_taps"):
            self._taps = [self.kernel.tap(rank) for rank in range(self.kernel.world)]
        return self._taps

    def logits(self) -> np.ndarray:
        """float32 [max_rows, vocab_size] of the last step that sampled."""
        return np.concatenate(self.taps(Phase.LM_HEAD), axis=1)[:, : self.kernel.config.vocab_size]

    def pages(self) -> list[np.ndarray]:
        """The ranks' KV bytes, as uint16."""
        return [self.kernel.device.download(r.kv, 0, r.kv.nbytes).view(np.uint16) for r in self.kernel.ranks]

    def words(self, rank: int, field: str, count: int) -> np.ndarray:
        """The first `count` words of a buffer, epochs included."""
        memory = self.kernel.ranks[rank].symmetric
        return self.kernel.device.download(memory, int(self.shape[field]) * 8, count * 8).view(np.uint64)


def run_whole(make_device, case: Case, requests: list[dict], *, source=None, device_options=None, **options) -> WholeRun:
    """Runs `requests` to their ends on pages full of garbage, and checks what the kernel told the host about them."""
    device = make_device(case.num_blocks, **(device_options or {}))
    source = source or DummyWeights(case.config, case.seed)
    run = KernelRun(device, case.config, source, case.shape(device.machine, **options))
    rng = np.random.default_rng(case.seed)
    for rank in run.ranks:  # nobody may read what nobody wrote
        device.upload(rank.kv, 0, garbage(rng, rank.kv.nbytes // 2))
    tokens = run.decode(requests)
    return WholeRun(run, requests, tokens, check_records(run, requests))


def check_records(run: KernelRun, requests: list[dict]) -> list[int]:
    """Every command is acknowledged once, every request ends once, is then released, and nothing comes after. Its finish reasons."""
    assert [int(r["sequence"]) for r in run.records] == list(range(1, len(run.records) + 1))
    acks = [int(r["token"]) for r in run.records if r["kind"] == Record.ACK]
    assert acks == list(range(1, len(requests) + 2))
    finishes = []
    for i in range(len(requests)):
        mine = [r for r in run.records if r["request"] == i and r["kind"] not in (Record.ACK, Record.LOGPROB)]
        assert [int(r["kind"]) for r in mine] == [Record.TOKEN] * (len(mine) - 1) + [Record.RELEASE]
        assert [int(r["index"]) for r in mine] == [*range(len(mine) - 1), len(mine) - 1]
        ends = [int(r["finish"]) for r in mine[:-1]]
        assert ends[:-1] == [Finish.NONE] * (len(ends) - 1)
        assert ends[-1] == mine[-1]["finish"] != Finish.NONE
        times = [int(r["time_ns"]) for r in mine]
        assert times == sorted(times)
        finishes.append(ends[-1])
    return finishes


# ------------------------------------------------------------------------------------------------ against the reference
def reference_logits(run: WholeRun, request: int, tokens: Tokens[int] | None = None) -> np.ndarray:
    """The reference's logits from which each of a request's tokens is sampled, given the kernel's own tokens before it."""
    prompt = run.requests[request]["prompt"]
    tokens = run.tokens[request] if tokens is None else tokens
    kernel = run.kernel
    reference = Reference(kernel.config, kernel.source, shape=kernel.shape)
    return reference.forward(reference.sequence(), [*prompt, *tokens[:-1]])[len(prompt) - 1 :]


def logit_limit(logits: np.ndarray) -> np.ndarray:
    """How far the kernel's logits may be from these: one number a row."""
    return tolerance.LOGITS * np.sqrt(np.mean(logits.astype(np.float64) ** 2, axis=-1))


def check_greedy(run: WholeRun) -> int:
    """Every token has the reference's largest logit, or one that the tolerance cannot tell from it. Returns how many differ.

    A token that differs is no end: the reference goes on from the kernel's own tokens.
    """
    others = 0
    for i, tokens in enumerate(run.tokens):
        logits = reference_logits(run, i)
        chosen = logits[np.arange(len(tokens)), tokens]
        margin = logits.max(axis=1) - chosen
        assert np.all(margin <= 2 * logit_limit(logits)), f"request {i}: tokens {tokens} are not greedy; margins {margin}"
        others += int(np.count_nonzero(margin))
    return others


def same_bits(one: WholeRun, two: WholeRun, what: str) -> None:
    """Tokens, every phase's output in the last step, and all keys and values."""
    assert one.tokens == two.tokens, what
    for rank, (a, b) in enumerate(zip(one.all_taps(), two.all_taps(), strict=True)):
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32), f"{what}: taps of rank {rank}")
    for rank, (a, b) in enumerate(zip(one.pages(), two.pages(), strict=True)):
        np.testing.assert_array_equal(a, b, f"{what}: KV pages of rank {rank}")
