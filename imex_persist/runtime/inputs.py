"""What users pass as prompts, and what the kernel gets for it. Mistakes become ValueError here, before a descriptor is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral

from imex_persist.model.load import Model
from imex_persist.runtime.request import Submission
from imex_persist.runtime.sampling import sampling_of
from imex_persist.sampling_params import SamplingParams

Prompt = str | Sequence[int] | Mapping
Prompts = Prompt | Sequence[Prompt]
_MESSAGE = "{'role': …, 'content': …}"
_ALLOWED = "a string, a list of token ids, {'prompt': …} or {'prompt_token_ids': …} is allowed"


def as_list(given: Prompts) -> list[Prompt]:
    """One prompt or several as a list of prompts."""
    if isinstance(given, (str, Mapping)):
        return [given]
    if isinstance(given, bytes) or not isinstance(given, Sequence):
        raise ValueError(f"a prompt of type {type(given).__name__} was given: {_ALLOWED}, or a list of these")
    if not len(given):
        raise ValueError("the list of prompts is empty: give at least one prompt")
    return [given] if isinstance(given[0], Integral) else list(given)


def params_for(prompts: list[Prompt], given, default: SamplingParams) -> list[SamplingParams]:
    """One SamplingParams a prompt."""
    if given is None:
        return [default] * len(prompts)
    if isinstance(given, SamplingParams):
        return [given] * len(prompts)
    if not isinstance(given, Sequence) or any(not isinstance(one, SamplingParams) for one in given):
        raise ValueError(f"sampling_params is {given!r}: a SamplingParams or a list of them is allowed")
    if len(given) != len(prompts):
        raise ValueError(
            f"{len(given)} sampling_params were given for {len(prompts)} prompts: give one, or one for each prompt"
        )
    return list(given)


def repeated(prompts: list[Prompt], params: list[SamplingParams]) -> tuple[list[Prompt], list[SamplingParams]]:
    """Each prompt n times, with seeds of their own."""
    out_prompts, out_params = [], []
    for prompt, one in zip(prompts, params, strict=True):
        for i in range(one.n):
            out_prompts.append(prompt)
            out_params.append(replace(one, seed=(one.seed + i) % 2**64) if i and one.seed is not None else one)
    return out_prompts, out_params


def to_ids(prompt: Prompt, model: Model) -> tuple[str | None, list[int]]:
    """(text or None, token ids). Raises ValueError for ids outside the vocabulary and for text without a tokenizer."""
    if isinstance(prompt, Mapping):
        known = {"prompt", "prompt_token_ids"}
        if not set(prompt) <= known or not set(prompt):
            raise ValueError(f"a prompt with the keys {sorted(map(str, prompt))} was given: {_ALLOWED}")
        if "prompt_token_ids" in prompt:
            return prompt.get("prompt"), _checked_ids(prompt["prompt_token_ids"], model)
        prompt = prompt["prompt"]
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("the prompt is an empty string: give at least one character")
        return prompt, _checked_ids(model.require_tokenizer().encode(prompt), model)
    return None, _checked_ids(prompt, model)


def as_conversations(given) -> list[Sequence[Mapping]]:
    """One conversation or several as a list of them."""
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise ValueError(
            f"messages of type {type(given).__name__} were given: a list of {_MESSAGE}, or a list of such lists is allowed"
        )
    if not len(given):
        raise ValueError("messages is empty: give at least one message with role and content")
    return [given] if isinstance(given[0], Mapping) else list(given)


def render_chat(conversation, model: Model) -> dict:
    """A conversation as a prompt, with the model's template and the start of the assistant's answer."""
    if isinstance(conversation, (str, bytes)) or not isinstance(conversation, Sequence):
        raise ValueError(f"a conversation is {conversation!r}: a list of {_MESSAGE} is allowed")
    for message in conversation:
        if (
            not isinstance(message, Mapping)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            raise ValueError(f"a message is {message!r}: {_MESSAGE} with strings is allowed")
    tokenizer = model.require_tokenizer()
    messages = [dict(message) for message in conversation]
    return {"prompt": tokenizer.apply_chat_template(messages), "prompt_token_ids": tokenizer.encode_chat(messages)}


def submission(ids: list[int], params: SamplingParams, eos: Sequence[int], max_model_len: int, vocab_size: int) -> Submission:
    """`max_tokens` ends at `max_model_len`, as in vLLM; a prompt that leaves no room is left for Engine.check to refuse.

    Raises ValueError for stop token ids outside the vocabulary.
    """
    for token in params.stop_token_ids:
        if token >= vocab_size:
            raise ValueError(f"stop_token_ids has {token}: integers of 0 to {vocab_size - 1} are allowed")
    room = max(1, max_model_len - len(ids))
    max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    stop = dict.fromkeys([*([] if params.ignore_eos else eos), *params.stop_token_ids])
    min_tokens = min(params.min_tokens, max_tokens)
    sampling = sampling_of(params, len(ids), min_tokens, eos, vocab_size)
    return Submission(tuple(ids), max_tokens, min_tokens, tuple(stop), sampling)


def _checked_ids(ids, model: Model) -> list[int]:
    if isinstance(ids, (str, bytes)) or not hasattr(ids, "__iter__"):
        raise ValueError(f"a prompt of type {type(ids).__name__} was given: {_ALLOWED}")
    ids = list(ids)
    size = int(model.config.vocab_size)
    for token in ids:
        if not isinstance(token, Integral) or isinstance(token, bool) or not 0 <= token < size:
            raise ValueError(f"the prompt has {token!r} as a token id: integers of 0 to {size - 1} are allowed")
    if not ids:
        raise ValueError("the prompt has no tokens: give at least one")
    return [int(token) for token in ids]
