"""Random weights of a model's real shapes, made where they are needed and the same on any number of ranks.

An element's value depends on the seed, the tensor's name and its place in the whole matrix only: a hash of the place picks
one of 65536 equally likely values of a normal distribution. No value is zero. Matrices have variance 1 / inputs, so that
normed inputs give outputs near 1, attention is neither flat nor a spike, and the logits' deviation is about 1; norms are
0.8 … 1.2.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from imex_persist.model.bf16 import to_bits
from imex_persist.model.config import ModelConfig
from imex_persist.model.weights import Range, tensor_shapes

CPU_BLOCK = 1 << 16


@lru_cache
def _normal_quantiles() -> np.ndarray:
    """float64 [65536]: the normal distribution's quantiles at odd multiples of 1 / 131072, none of them zero."""
    inverse = NormalDist().inv_cdf
    upper = np.array([inverse(0.5 + (2 * i + 1) / 131072) for i in range(32768)])
    return np.concatenate([-upper[::-1], upper])


class DummyWeights:
    """A WeightSource of hashed random numbers, from a configuration alone; `xp` is numpy, or cupy to make them on a GPU."""

    rope_adjacent = False

    def __init__(self, config: ModelConfig, seed: int = 0, xp=np):
        self._shapes = tensor_shapes(config)
        self._seed, self._xp, self._tables = seed, xp, {}

    def read(self, name: str, rows: Range = None, columns: Range = None):
        """uint16 [rows, columns] in the array module given; see WeightSource.read."""
        xp, shape = self._xp, self._shapes[name]
        start, stop = rows or (0, shape[0])
        key = np.frombuffer(hashlib.sha256(f"{self._seed}/{name}".encode()).digest()[:8], np.uint32)
        if len(shape) == 1:
            return self._table("norm")[_hash(xp.arange(start, stop, dtype=xp.uint32), key, xp)]
        left, right = columns or (0, shape[1])
        out = xp.empty((stop - start, right - left), xp.uint16)
        across, table = xp.arange(left, right, dtype=xp.uint32), self._table(shape[1])
        # on a CPU a block that stays in the cache is four times as fast; on a GPU a large one is
        step = stop - start if xp is not np else max(1, CPU_BLOCK // (right - left))
        for first in range(start, stop, max(1, step)):
            last = min(first + step, stop)
            # places wrap at 2^32: only a matrix of more elements than any model's would repeat itself
            place = xp.arange(first, last, dtype=xp.uint32)[:, None] * xp.uint32(shape[1]) + across
            out[first - start : last - start] = xp.take(table, _hash(place, key, xp))
        return out

    def _table(self, kind):
        if kind not in self._tables:
            if kind == "norm":
                values = 1 + 0.4 * (np.arange(65536) + 0.5 - 32768) / 65536
            else:
                values = _normal_quantiles() / math.sqrt(kind)
            self._tables[kind] = self._xp.asarray(to_bits(values.astype(np.float32)))
        return self._tables[kind]


def _hash(place, key: np.ndarray, xp):
    """16 random bits for each uint32 in `place`, as an index: two rounds of multiply and shift (the `lowbias32` constants)."""
    x = place ^ xp.uint32(key[0])
    x ^= x >> xp.uint32(16)
    x *= xp.uint32(0x7FEB352D)
    x ^= x >> xp.uint32(15)
    x += xp.uint32(key[1])
    x *= xp.uint32(0x846CA68B)
    x >>= xp.uint32(16)
    return x
