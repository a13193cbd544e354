"""Drawing tokens in NumPy, as the kernel does (cuda_src/draw.cuh, search.cuh, logprobs.cuh): what it is compared with.

A row's parameters are an abi.Sampling record; `logits` are one row's raw ones, float32 [vocab_size].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
UNIT_MASS = np.float32(2**30)


def philox(counter: np.ndarray, key: Sequence[int]) -> np.ndarray:
    """Philox4x32-10: uint32 [n, 4] random words of counters [n, 4] under a key of two words."""
    c = [np.asarray(counter[:, i], np.uint64) for i in range(4)]
    k = [int(word) for word in key]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c[0], _MULTIPLIERS[1] * c[2]
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]), p1 & low, (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]), p0 & low]
        k = [(word + weyl) & 0xFFFFFFFF for word, weyl in zip(k, _WEYL, strict=True)]
    return np.stack(c, axis=1).astype(np.uint32)


def gumbel(bits: np.ndarray) -> np.ndarray:
    """-log(-log(1 - v)), v = (bits + 1/2) / 2^32: float32 samples of Gumbel's distribution."""
    v = np.minimum((bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32), np.float32(1 - 2.0**-24))
    return (-np.log(-np.log1p(-v.astype(np.float64)))).astype(np.float32)


def noise(seed: Sequence[int], index: int, vocab_size: int) -> np.ndarray:
    """The noise of every token id where the request's token number `index` is drawn: float32 [vocab_size]."""
    quads = np.arange(-(-vocab_size // 4))
    counter = np.zeros((len(quads), 4), np.uint32)
    counter[:, 0], counter[:, 1] = quads, index
    return gumbel(philox(counter, seed).reshape(-1)[:vocab_size])


def scale(
    logits: np.ndarray, s: np.void, prompt: Sequence[int] = (), generated: Sequence[int] = (), index: int | None = None
) -> np.ndarray:
    """Logits after penalties, the mask of min_tokens and temperature, in this order; -inf is never drawn. They are of the request's
    token number `index`, len(generated) if not given.
    """
    x = np.asarray(logits, np.float32).copy()
    counts = np.bincount(np.asarray(generated, np.int64), minlength=len(x)).astype(np.float32)
    seen = counts > 0
    seen[np.asarray(prompt, np.int64)] = True
    repetition = s["repetition_penalty"]
    if repetition != 1:
        x[seen] = np.where(x[seen] > 0, x[seen] / repetition, x[seen] * repetition)
    x -= s["frequency_penalty"] * counts
    x -= s["presence_penalty"] * (counts > 0).astype(np.float32)
    if (len(generated) if index is None else index) < s["min_tokens"]:
        x[s["masked"][: s["num_masked"]]] = -np.inf
    return x / s["temperature"] if s["temperature"] > 0 else x


def allowed(x: np.ndarray, s: np.void) -> np.ndarray:
    """Which tokens min_p, then top_k, then top_p leave: bool [vocab_size]. What equals the last that is left, is left too."""
    left = x > -np.inf
    if s["temperature"] == 0 or not left.any():
        return left
    largest = x.max()
    if s["min_p"]:
        left &= x >= min(largest, largest + s["log_min_p"])
    if s["top_k"] and np.count_nonzero(left) > s["top_k"]:
        left &= x >= np.sort(x[left])[-int(s["top_k"])]
    if s["top_p"]:
        masses = np.floor(np.exp((x - largest).astype(np.float32)) * UNIT_MASS).astype(np.uint64)
        values = np.sort(x[left])[::-1]
        total = np.cumsum(np.sort(masses[left])[::-1])
        target = max(1, -(-int(total[-1]) * int(s["top_p"]) // 2**32))
        left &= x >= values[np.searchsorted(total, target)]
    return left


def draw(logits: np.ndarray, s: np.void, prompt: Sequence[int] = (), generated: Sequence[int] = ()) -> int:
    """The token: the largest of what is allowed, with its noise unless the temperature is 0; ties to the lowest id."""
    x = scale(logits, s, prompt, generated)
    left = allowed(x, s)
    if s["temperature"] > 0:
        x = x + noise(s["seed"], len(generated), len(x))
    return int(np.where(left, x, -np.inf).argmax())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in float64 of raw logits."""
    x = np.asarray(logits, np.float64)
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def distribution(logits: np.ndarray, s: np.void, prompt: Sequence[int] = (), generated: Sequence[int] = ()) -> np.ndarray:
    """The exact probabilities that `draw` samples, float64 [vocab_size]."""
    x = scale(logits, s, prompt, generated)
    p = np.exp(log_softmax(np.where(allowed(x, s), x, -np.inf)))
    return p / p.sum()
