"""KV pages as docs/architecture.md describes them, read and written from outside the kernel."""

from __future__ import annotations

import numpy as np

from imex_persist import planner
from imex_persist.abi import CHUNK


def key_places(dim: int, positions: np.ndarray) -> np.ndarray:
    """Index in a page, in values, of each dim of the key of each position in the page: [positions, dim]."""
    chunk, p = np.divmod(np.asarray(positions)[:, None], CHUNK)
    d = np.arange(dim)
    unit, n = p % 8 // 2, 2 * (p // 8) + p % 2  # so that a unit's scores end up with the lane that weighs these positions
    half = (unit // 2 * (dim // 32) + d // 32) * 2 + d % 8 // 4
    piece = (half * 8 + n) * 4 + d % 32 // 8  # of 8 values, a lane's of a fragment
    return chunk * 2 * CHUNK * dim + piece * 8 + d % 4 // 2 * 4 + unit % 2 * 2 + d % 2


def value_places(dim: int, positions: np.ndarray) -> np.ndarray:
    """The same for values."""
    chunk, p = np.divmod(np.asarray(positions)[:, None], CHUNK)
    d = np.arange(dim)
    piece = ((d // 16 * 2 + p % 8 // 4) * 8 + d % 8) * 4 + p // 8
    return chunk * 2 * CHUNK * dim + CHUNK * dim + piece * 8 + p % 4 // 2 * 4 + d // 8 % 2 * 2 + p % 2


def garbage(rng: np.random.Generator, shape) -> np.ndarray:
    """bf16 bits of anything: numbers of all sizes, infinities, and every eighth value a NaN."""
    bits = rng.integers(0, 1 << 16, shape, np.uint16)
    return np.where(rng.integers(0, 8, shape, np.uint8) == 0, bits | 0x7F81, bits)


def normal_bits(rng: np.random.Generator, shape, scale: float = 1.0) -> np.ndarray:
    """bf16 bits of normally distributed numbers."""
    values = rng.standard_normal(shape, np.float32) * np.float32(scale)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


class Pages:
    """One rank's KV pages: uint16 [layers, pages, kv_heads, page]. `table` [slots, pages of a slot] says which page is whose."""

    def __init__(self, shape: np.void, table: np.ndarray, bits: np.ndarray | None = None):
        self.dim, self.page_size = int(shape["head_dim"]), int(shape["page_size"])
        size = tuple(int(shape[k]) for k in ("num_layers", "num_pages", "num_kv_heads"))
        if bits is None:
            bits = np.zeros(planner.kv_bytes(shape) // 2, np.uint16)
        self.table, self.bits = table, bits.reshape(*size, planner.page_bytes(shape) // 2)

    def _places(self, slot: int, start: int, count: int):
        """(pages [count, 1], key places, value places [count, dim])."""
        number, inside = np.divmod(np.arange(start, start + count), self.page_size)
        return self.table[slot, number][:, None], key_places(self.dim, inside), value_places(self.dim, inside)

    def write(self, layer: int, slot: int, start: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Keys and values [positions, kv_heads, dim] of the positions from `start` on."""
        page, key, value = self._places(slot, start, len(keys))
        for head in range(keys.shape[1]):
            self.bits[layer, page, head, key] = keys[:, head]
            self.bits[layer, page, head, value] = values[:, head]

    def read(self, layer: int, slot: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of the first `count` positions: uint16 [count, kv_heads, dim]."""
        page, key, value = self._places(slot, 0, count)
        heads = range(self.bits.shape[2])
        return tuple(np.stack([self.bits[layer, page, h, at] for h in heads], axis=1) for at in (key, value))
