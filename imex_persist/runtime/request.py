"""One request inside the engine, and what its owner hears of it."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from imex_persist import abi
from imex_persist.runtime.pages import Reservation
from imex_persist.runtime.sampling import Sampling

FINISH_REASONS = {abi.Finish.STOP: "stop", abi.Finish.LENGTH: "length", abi.Finish.CANCELLED: "abort"}


class TokenEvent(NamedTuple):
    """A generated token, or the end, or both. `token` is None when a request ends without another one."""

    token: int | None
    finish_reason: str | None
    device_time_ns: int  # device clock when the step's tokens were known
    host_time: float  # time.perf_counter() when the record was read
    logprobs: tuple[tuple[int, float, int], ...] = ()  # (token id, log-probability, rank), the token's own first


Event = TokenEvent | Exception
Sink = Callable[[Event], None]


@dataclass(frozen=True)
class Submission:
    """What the kernel needs of a request, validated."""

    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    sampling: Sampling | None = None  # None: plainly greedy

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether the kernel must see every prompt token, for the repetition penalty: no pages of another request may be reused."""
        return self.sampling is not None and self.sampling.needs_whole_prompt


@dataclass(eq=False)
class Request:
    """A submitted request. The engine's thread owns every field but `events`; the last event has a finish reason or is an exception."""

    id: int
    submission: Submission
    sink: Sink | None = None
    events: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue, repr=False)
    seen_device_ns: int | None = None  # device clock when the kernel took the descriptor
    arrival: float = field(default_factory=time.perf_counter)
    slot: int = -1  # -1 while it waits
    reservation: Reservation | None = field(default=None, repr=False)  # while it is resident
    num_cached_tokens: int = 0  # of the prompt: not computed, their keys and values were there
    generated: list[int] = field(default_factory=list, repr=False)
    logprobs: list[tuple[int, float, int]] = field(default_factory=list, repr=False)  # of the token whose record comes next
    finished: bool = False
    cancelled: bool = False

    def __post_init__(self) -> None:
        if self.sink is None:
            self.sink = self.events.put

    @property
    def confirmed(self) -> list[int]:
        """The tokens of the positions whose keys and values are certainly in the pages."""
        return [*self.submission.prompt_token_ids, *self.generated][:-1] if self.generated else []

    def tell(self, event: Event) -> None:
        """Hands an event to the owner; nothing after the last."""
        if self.finished:
            return
        self.finished = isinstance(event, Exception) or event.finish_reason is not None
        self.sink(event)

    def __iter__(self):
        """Events until the end. Raises the exception that ended the request."""
        while True:
            event = self.events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if event.finish_reason is not None:
                return
