"""What `LLM.generate` and `LLM.stream` return, in vLLM's shape."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a token by the raw logits; `rank` 1 is the most probable. `decoded_token` is None without a tokenizer."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One completion of a prompt. `text` is "" when the model has no tokenizer.

    `logprobs`, where asked for, has for each token those of the most probable ones and its own; `cumulative_logprob` is the sum of
    the tokens' own.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None  # "stop", "length" or "abort"; None while it goes on
    stop_reason: int | str | None = None  # the stop token id or stop string, None for EOS and for length
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None


@dataclass
class RequestMetrics:
    """Times of one request in seconds, by the host's monotonic clock (`time.perf_counter`)."""

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None
    device_time_ns: list[int] = field(default_factory=list, repr=False)  # device clock of every token

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass
class RequestOutput:
    """A finished request: its prompt and what was generated."""

    request_id: str
    prompt: str | None  # None when token ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0  # of the prompt: keys and values were there from earlier requests


@dataclass(frozen=True)
class StreamOutput:
    """One step of `LLM.stream`: what is new. `text` may be "" while bytes of a character or a possible stop string are held back."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: tuple[dict[int, Logprob], ...] = ()  # of each of token_ids, where asked for
