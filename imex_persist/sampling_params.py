"""SamplingParams: vLLM's names, defaults and order of application. Values that make no sense raise here."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from numbers import Integral, Real

from imex_persist import abi

MAX_LOGPROBS = 20
GREEDY_EPSILON = 1e-5  # vLLM: a temperature below is greedy


class RequestOutputKind(enum.Enum):
    """What each RequestOutput of AsyncLLM.generate holds."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what came since the one before
    FINAL_ONLY = 2  # everything, and there is only the last


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is decoded.

    `temperature=0` takes the most probable token each time, whatever top_p, top_k, min_p and seed are. Otherwise tokens are drawn on
    the device: penalties, the mask of `min_tokens`, temperature, min_p, top_k, then top_p of what is left; where several tokens equal
    the last one that top_k or top_p leaves, all of them stay. The same `seed` gives the same tokens, whatever else is in the batch;
    without one each request draws anew. `n` completions of a prompt are n requests, with seeds `seed`, `seed + 1`, …

    `logprobs=N` adds the log-probabilities of the N most probable tokens and of the token itself, of the raw logits.
    `max_tokens=None` generates up to `max_model_len`. `stop` strings are cut from the text unless `include_stop_str_in_output`;
    `min_tokens` masks EOS and stop token ids, and holds back stop strings.

    Raises ValueError for values out of range and TypeError for names that are not supported (best_of, logit_bias, prompt_logprobs, …).
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: all
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        _integer("n", self.n, 1)
        _number("temperature", self.temperature, 0.0, math.inf)
        if self.n > 1 and self.greedy:
            raise ValueError(f"n is {self.n} but temperature 0 gives the same completion every time: use n=1, or a temperature")
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _integer("top_k", self.top_k, -1)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}: raise max_tokens")
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, above=True)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}: True or False is allowed")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise ValueError(f"output_kind is {self.output_kind!r}: a member of RequestOutputKind is allowed")
        object.__setattr__(self, "stop", _strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_EPSILON


def _integer(name: str, value, low: int, high: int | None = None) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name} is {value!r}: an integer of {limit} is allowed")


def _number(name: str, value, low: float, high: float, *, above: bool = False) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (above and value == low):
        start = f"above {low:g}" if above else f"at least {low:g}"
        limit = start if high == math.inf else f"{start} and at most {high:g}"
        raise ValueError(f"{name} is {value!r}: a number {limit} is allowed")


def _strings(stop) -> list[str]:
    strings = [stop] if stop is None or isinstance(stop, str) else stop
    strings = [s for s in strings if s is not None] if isinstance(strings, (list, tuple)) else [strings]
    if any(not isinstance(s, str) or not s for s in strings):
        raise ValueError(f"stop is {stop!r}: a string or a list of strings, none of them empty, is allowed")
    return strings


def _token_ids(ids) -> list[int]:
    if ids is not None and (isinstance(ids, (str, bytes)) or not hasattr(ids, "__iter__")):
        raise ValueError(f"stop_token_ids is {ids!r}: a list of token ids is allowed")
    ids = list(ids or [])
    for token in ids:
        _integer("stop_token_ids", token, 0, 2**31 - 1)
    if len(ids) > abi.MAX_STOP_IDS:
        raise ValueError(f"stop_token_ids has {len(ids)} entries: at most {abi.MAX_STOP_IDS} are allowed")
    return [int(token) for token in ids]
