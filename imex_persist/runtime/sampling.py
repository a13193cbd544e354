"""From SamplingParams to what the kernel draws with (abi.Sampling): nothing for plainly greedy requests, which have a path of their own."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from imex_persist import abi
from imex_persist.abi import Draw
from imex_persist.sampling_params import SamplingParams


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn. `words` follow its stop token ids in the arena."""

    draw: Draw
    num_logprobs: int  # records before each token; 0: none
    words: tuple[int, ...]

    @property
    def needs_whole_prompt(self) -> bool:
        """The kernel must see every prompt token: no part of it may come from another request's pages."""
        return self.draw == Draw.ALL


def sampling_of(
    params: SamplingParams, prompt_len: int, min_tokens: int, eos: Sequence[int], vocab_size: int
) -> Sampling | None:
    """None for a request that is plainly greedy. Without a seed one is drawn. `min_tokens` is what max_tokens leaves of it.

    Raises ValueError if stop tokens, EOS among them, are all there is to draw while fewer than `min_tokens` are out.
    """
    masked = list(dict.fromkeys([*eos, *params.stop_token_ids])) if min_tokens else []
    repeats = params.repetition_penalty != 1
    penalized = repeats or params.presence_penalty != 0 or params.frequency_penalty != 0
    if params.greedy and not penalized and params.logprobs is None and not masked:
        return None
    masked = [token for token in masked if token < vocab_size]
    if len(masked) >= vocab_size:
        raise ValueError(f"min_tokens is {min_tokens} but every token id is a stop token: nothing is left to generate")
    if len(masked) > abi.MAX_STOP_IDS:
        raise ValueError(f"{len(masked)} stop tokens, EOS included: at most {abi.MAX_STOP_IDS} are allowed")
    s = np.zeros((), abi.Sampling)
    seed = secrets.randbits(64) if params.seed is None else params.seed % 2**64
    s["seed"] = seed & 0xFFFFFFFF, seed >> 32
    if not params.greedy:
        s["temperature"] = params.temperature
        if params.min_p > 0:
            s["min_p"], s["log_min_p"] = 1, math.log(params.min_p)
        s["top_k"] = params.top_k if 0 < params.top_k < vocab_size else 0
        s["top_p"] = min(2**32 - 1, max(1, round(params.top_p * 2**32))) if params.top_p < 1 else 0
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        s[name] = getattr(params, name)
    s["prompt_len"], s["min_tokens"] = prompt_len, min_tokens
    s["num_masked"], s["masked"][: len(masked)] = len(masked), masked
    s["num_logprobs"] = 0 if params.logprobs is None else 1 + min(params.logprobs, vocab_size)
    only_masks = params.greedy and not penalized and params.logprobs is None
    draw = Draw.ALL if repeats else Draw.MASKED if only_masks else Draw.SAMPLED
    return Sampling(draw, int(s["num_logprobs"]), tuple(s.reshape(1).view(np.uint32).tolist()))
