"""Models whose logits are the same at every position, so that the distribution of every token is known, and requests that draw from them.

Embeddings are all equal and nothing is added to them; what the LM head makes of it is a list of given logits, rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from imex_persist import SamplingParams, abi
from imex_persist.abi import Phase, Record, Strategy
from imex_persist.model import sampling as reference
from imex_persist.model.weights import DictWeights, tensor_shapes
from imex_persist.runtime.sampling import Sampling, sampling_of

from .cases import Case, model
from .harness import KernelRun

HIDDEN, BLOCKS, LENGTH = 32, 3, 256
CLOSE = 1e-4  # of a scaled logit, or of probability: closer calls may go either way, since e^x and log are not NumPy's to the last bit


def flat_case(vocab_size: int, world_size: int = 1, rows: int = 16) -> Case:
    config = model(
        hidden_size=HIDDEN, head_dim=32, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, num_hidden_layers=1,
        vocab_size=vocab_size,
    )  # fmt: skip
    options = {
        "world_size": world_size, "max_rows": rows, "num_slots": rows, "max_model_len": LENGTH,
        "strategy": Strategy.TWO_SHOT if world_size > 2 else Strategy.ONE_SHOT_LOCAL, "down_slices": 1,
    }  # fmt: skip
    return Case("flat", 1, config, BLOCKS, (), options)


def flat_weights(case: Case, logits: np.ndarray) -> DictWeights:
    tensors = {name: np.zeros(size, np.float32) for name, size in tensor_shapes(case.config).items()}
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor[:] = 1
    tensors["model.embed_tokens.weight"][:] = 1
    tensors["lm_head.weight"][:] = logits[:, None] / HIDDEN
    return DictWeights(tensors)


class FlatModel:
    """Runs requests to their ends, again and again. `logits` are what the kernel makes of the given ones: float32 [vocab_size]."""

    def __init__(
        self, make_device, logits: Sequence[float], world_size: int = 1, rows: int = 16, renew_steps: int | None = None
    ):
        self.case = flat_case(len(logits), world_size, rows)
        device = make_device(BLOCKS)
        shape = self.case.shape(device.machine, tap=True)
        shape["renew_steps"] = renew_steps or shape["renew_steps"]
        self.run = KernelRun(device, self.case.config, flat_weights(self.case, np.asarray(logits, np.float32)), shape)
        self.decode([{"prompt": [0], "max_tokens": 1}])
        taps = [self.run.tap_of(rank, Phase.LM_HEAD) for rank in range(self.run.world)]
        self.logits = np.concatenate(taps, axis=1)[0, : self.case.config.vocab_size].copy()

    def decode(self, requests: list[dict]) -> list[list[int]]:
        self.run.reset()
        return self.run.decode(requests)

    def request(self, prompt: Sequence[int], **params) -> dict:
        """A request of SamplingParams' fields; `eos` are ids masked by min_tokens beside its stop tokens."""
        return request(self.case.config.vocab_size, prompt, **params)

    def logprobs(self, request: int) -> list[list[tuple[int, float, int]]]:
        """(token id, log-probability, rank) before each token of a request of the last run."""
        return logprobs_of(self.run.records, request)


def check_token(what: str, token: int, logits, s: np.void, prompt=(), generated=(), index: int | None = None) -> None:
    """`token` is the reference's, or the reference's for parameters that differ by less than arithmetic does."""
    index = len(generated) if index is None else index
    x = reference.scale(logits, s, prompt, generated, index)
    noise = reference.noise(s["seed"], index, len(x)) if s["temperature"] > 0 else np.zeros_like(x)
    for shift in (0, -CLOSE, CLOSE):
        near = s.copy()
        near["top_p"] = int(np.clip(int(s["top_p"]) * (1 + shift), 1, 2**32 - 1)) if s["top_p"] else 0
        near["log_min_p"] += shift
        noisy = np.where(reference.allowed(x, near), x + noise, -np.inf)
        if token == noisy.argmax() or (shift and noisy[token] > noisy.max() - CLOSE * max(1, abs(noisy.max()))):
            return
    expected = int(np.where(reference.allowed(x, s), x + noise, -np.inf).argmax())
    raise AssertionError(f"{what}: token {token} instead of {expected}, {s}")


def sampling_record(sampling: Sampling) -> np.void:
    """The abi.Sampling of a request's words."""
    return np.array(sampling.words, np.uint32).view(abi.Sampling)[0]


def random_params(rng: np.random.Generator, vocab_size: int) -> dict:
    """SamplingParams' fields: a third is greedy, and half of everything is off."""
    return {
        "seed": int(rng.integers(0, 2**63)),
        "temperature": float(rng.choice([0, 0.6, 1.3])),
        "top_k": int(rng.choice([0, 0, 3, vocab_size // 2])),
        "top_p": float(rng.choice([1, 1, 0.4, 0.95])),
        "min_p": float(rng.choice([0, 0, 0.2])),
        "repetition_penalty": float(rng.choice([1, 1, 1.5, 0.8])),
        "presence_penalty": float(rng.choice([0, 0, 0.7, -0.5])),
        "frequency_penalty": float(rng.choice([0, 0, 0.6, -0.3])),
        "max_tokens": int(rng.integers(6, 14)),
        "min_tokens": int(rng.choice([0, 3, 6])),
        "stop_token_ids": [int(t) for t in rng.choice(vocab_size, int(rng.choice([0, 0, 2, 5])), replace=False)],
    }


def request(vocab_size: int, prompt: Sequence[int], **params) -> dict:
    params = SamplingParams(**params)
    sampling: Sampling | None = sampling_of(params, len(prompt), params.min_tokens, (), vocab_size)
    return {
        "prompt": list(prompt), "max_tokens": params.max_tokens, "min_tokens": params.min_tokens, "stop": params.stop_token_ids,
        "sampling": sampling,
    }  # fmt: skip


def logprobs_of(records, request: int) -> list[list[tuple[int, float, int]]]:
    found, out = [], []
    for r in records:
        if r["request"] != request:
            continue
        if r["kind"] == Record.LOGPROB:
            found.append((int(r["token"]), float(np.uint32(r["finish"]).view(np.float32)), int(r["index"])))
        elif r["kind"] == Record.TOKEN:
            out.append(found)
            found = []
    assert not found
    return out
