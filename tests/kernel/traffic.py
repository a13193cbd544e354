"""Random requests, and a client that sends them: prompts that share beginnings, follow-up turns, bursts, cancels, every parameter that
is supported. Who serves them, the simulator in this process or GPUs behind an LLM, is the caller's business.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from imex_persist.runtime.request import Event, Request
from imex_persist.sampling_params import SamplingParams

WAIT_S = 120.0  # for any one request to go on


@dataclass(frozen=True)
class Sizes:
    """How long things are, in tokens, and how many requests may be under way at once."""

    vocab_size: int
    max_model_len: int
    systems: tuple[int, ...]  # lengths of the beginnings that prompts share
    tail: int  # of a prompt, at most
    max_tokens: int
    crowd: int


@dataclass
class Wanted:
    """One request: what is asked, and, after the run, what came."""

    tail: list[int]
    params: SamplingParams
    crowd: int  # sent when fewer are under way
    begins: list[int] = field(default_factory=list)
    follows: int | None = None  # the next turn of this one, if that has ended by then
    cancel_after: int | None = None  # tokens
    prompt: list[int] = field(default_factory=list)
    request: Request | None = None
    events: list[Event] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events if event.token is not None]

    @property
    def finish_reason(self) -> str | None:
        return self.events[-1].finish_reason if self.events else None

    def told(self) -> list[tuple]:
        """The events without their times: what must not depend on company."""
        return [tuple(event._replace(device_time_ns=0, host_time=0.0)) for event in self.events if event.token is not None]


def random_params(rng: np.random.Generator, sizes: Sizes) -> SamplingParams:
    """Any parameters, greedy and drawn."""
    vocab, most = sizes.vocab_size, int(rng.integers(1, sizes.max_tokens + 1))
    fields = {
        "max_tokens": most,
        "min_tokens": int(rng.integers(0, most + 1)) if rng.integers(4) == 0 else 0,
        "ignore_eos": bool(rng.integers(2)),
        "stop_token_ids": [int(t) for t in rng.integers(0, vocab, rng.integers(0, 13))],
        "temperature": 0.0,
    }
    if rng.integers(2):
        fields |= {
            "temperature": float(rng.uniform(0.2, 2)),
            "seed": int(rng.integers(0, 2**31)),
            "top_k": int(rng.choice([0, 1, 5, 40])),
            "top_p": float(rng.choice([1.0, 0.9, 0.4])),
            "min_p": float(rng.choice([0.0, 0.1])),
        }
    if rng.integers(4) == 0:
        fields |= {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": -0.2}
    if rng.integers(4) == 0:
        fields["logprobs"] = int(rng.integers(0, 6))
    return SamplingParams(**fields)


def traffic(seed: int, count: int, sizes: Sizes) -> list[Wanted]:
    rng = np.random.default_rng([seed, count])

    def some(length: int) -> list[int]:
        return [int(t) for t in rng.integers(0, sizes.vocab_size, length)]

    systems, out = [some(length) for length in sizes.systems], []
    for i in range(count):
        system = systems[int(rng.integers(len(systems)))]
        cut = len(system) if rng.integers(3) else int(rng.integers(0, len(system) + 1))
        out.append(
            Wanted(
                tail=some(int(rng.integers(1, sizes.tail + 1))),
                params=random_params(rng, sizes),
                crowd=int(rng.integers(1, sizes.crowd + 1)),
                begins=system[:cut] if rng.integers(4) else [],
                follows=int(rng.integers(i)) if i and rng.integers(4) == 0 else None,
                cancel_after=int(rng.integers(0, 10)) if rng.integers(6) == 0 else None,
            )
        )
    return out


class Client:
    """Sends `wanted` in order through `submit(prompt, params, sink)` and waits for all of them."""

    def __init__(self, submit: Callable, cancel: Callable[[Request], None], sizes: Sizes):
        self._submit, self._cancel, self._sizes = submit, cancel, sizes
        self._changed = threading.Condition()
        self._under_way = 0

    def run(self, wanted: list[Wanted], each: Callable[[int], None] = lambda i: None) -> None:
        """`each(i)` is called before request i is sent. Raises what ended a request."""
        for i, one in enumerate(wanted):
            each(i)
            with self._changed:
                self._wait(lambda one=one: self._under_way < one.crowd)
                self._under_way += 1
            self._send(one, None if one.follows is None else wanted[one.follows])
        with self._changed:
            self._wait(lambda: self._under_way == 0)
        for one in wanted:
            if isinstance(one.events[-1], Exception):
                raise one.events[-1]

    def _wait(self, condition: Callable[[], bool]) -> None:
        before = -1
        while not self._changed.wait_for(condition, WAIT_S):
            assert before != self._under_way, f"{self._under_way} requests were lost: nothing came of them for {WAIT_S:.0f} s"
            before = self._under_way

    def _send(self, one: Wanted, before: Wanted | None) -> None:
        begins = one.begins
        if before is not None and before.finish_reason in ("stop", "length"):
            begins = [*before.prompt, *before.tokens]
        room = self._sizes.max_model_len - self._sizes.max_tokens
        one.prompt = [*begins, *one.tail][:room]

        def sink(event: Event) -> None:  # in the engine's thread
            one.events.append(event)
            if isinstance(event, Exception) or event.finish_reason is not None:
                with self._changed:
                    self._under_way -= 1
                    self._changed.notify()
            elif one.cancel_after and len(one.events) == one.cancel_after:
                self._cancel(one.request)

        one.request = self._submit(one.prompt, one.params, sink)
        if one.cancel_after == 0:
            self._cancel(one.request)


def check_ends(wanted: list[Wanted]) -> dict[str, int]:
    """Every request ended as it had to. How many in which way."""
    counts: dict[str, int] = {}
    for i, one in enumerate(wanted):
        reason, tokens, most = one.finish_reason, one.tokens, one.params.max_tokens
        counts[reason] = counts.get(reason, 0) + 1
        assert [event.finish_reason for event in one.events[:-1]] == [None] * (len(one.events) - 1)
        if reason == "length":
            assert len(tokens) == most, f"request {i}: {len(tokens)} tokens of {most}"
        elif reason == "stop":
            assert one.params.min_tokens < len(tokens) <= most
            assert tokens[-1] in one.request.submission.stop_token_ids
        else:
            assert reason == "abort" and one.cancel_after is not None, f"request {i} ended with {reason}"
            assert len(tokens) < most
    return counts
