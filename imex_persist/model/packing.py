"""Weights in the order the kernel streams them: tiles of 8 output rows by 32 inputs, all of a unit's tiles after each
other.

W[N, K] becomes [N / 8, K / 32, 8, 32], so one unit (8 rows, all of K) is one contiguous run, and a tensor-core lane's
operand is one 16-byte load. A rank's buffers are filled piece by piece: never is more than one piece of the model held
beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from imex_persist import abi
from imex_persist.model.config import ModelConfig
from imex_persist.model.rope import rope_table
from imex_persist.model.shard import RankShard
from imex_persist.model.weights import WeightSource

TILE_COLUMNS = 32
PIECE_BYTES = 64 << 20  # how much of a matrix is read, packed and handed over at once
LAYER_FIELDS = ("qkv", "o_proj", "gate_up", "down_proj")
FIELDS = (*LAYER_FIELDS, "lm_head", "embed", "norms", "rope")
Put = Callable[[str, int, np.ndarray], None]


def pack_matrix(matrix, xp=np):
    """uint16 [N, K] in tile order, flat: [N / 8 * K / 32 * 8 * 32], N and K padded with zeros to multiples of 8 and 32."""
    rows, columns = (-(-n // m) * m for n, m in zip(matrix.shape, (abi.UNIT_ROWS, TILE_COLUMNS), strict=True))
    if matrix.shape != (rows, columns):
        whole = xp.zeros((rows, columns), matrix.dtype)
        whole[: matrix.shape[0], : matrix.shape[1]] = matrix
        matrix = whole
    tiles = matrix.reshape(rows // abi.UNIT_ROWS, abi.UNIT_ROWS, columns // TILE_COLUMNS, TILE_COLUMNS)
    return xp.ascontiguousarray(tiles.transpose(0, 2, 1, 3)).reshape(-1)


def unpack_matrix(packed, rows: int, columns: int, xp=np):
    """The inverse of pack_matrix: [rows, columns] without the padding."""
    n, k = -(-rows // abi.UNIT_ROWS), -(-columns // TILE_COLUMNS)
    tiles = packed.reshape(n, k, abi.UNIT_ROWS, TILE_COLUMNS).transpose(0, 2, 1, 3)
    return xp.ascontiguousarray(tiles.reshape(n * abi.UNIT_ROWS, k * TILE_COLUMNS)[:rows, :columns])


def embed_is_lm_head(config: ModelConfig, shape: np.void) -> bool:
    """Whether RankParams.embed points at the lm_head buffer: tied, and one rank, so that both are the whole vocabulary."""
    return bool(config.tie_word_embeddings and shape["world_size"] == 1)


def rope_positions(shape: np.void) -> int:
    """Rows of the rope table: every position that a slot's pages can hold."""
    return int(shape["pages_per_slot"]) * int(shape["page_size"])


def rank_bytes(config: ModelConfig, shape: np.void) -> dict[str, int]:
    """Bytes of each weight buffer of one rank, by its field of abi.RankParams; no `embed` where it is the lm_head buffer."""
    s = {name: int(shape[name]) for name in abi.Shape.names if name not in ("rms_eps", "attn_scale")}
    hidden, heads_dim = s["hidden_size"], s["num_heads"] * s["head_dim"]
    elements = {
        "qkv": s["num_layers"] * (heads_dim + 2 * s["num_kv_heads"] * s["head_dim"]) * hidden,
        "o_proj": s["num_layers"] * hidden * heads_dim,
        "gate_up": s["num_layers"] * 2 * s["intermediate_size"] * hidden,
        "down_proj": s["num_layers"] * hidden * s["intermediate_size"],
        "lm_head": s["vocab_rows"] * hidden,
        "embed": -(-s["vocab_size"] // abi.UNIT_ROWS) * abi.UNIT_ROWS * hidden,
        "norms": (2 * s["num_layers"] + 1) * hidden,
    }
    if embed_is_lm_head(config, shape):
        del elements["embed"]
    return {name: 2 * count for name, count in elements.items()} | {"rope": rope_positions(shape) * s["head_dim"] * 4}


def pieces(
    source: WeightSource, config: ModelConfig, shape: np.void, rank: int, *, xp=np, fields=FIELDS
) -> Iterator[tuple[str, int, np.ndarray]]:
    """(field, byte offset, flat array) of every part of a rank's buffers, in order: uint16 bits, float32 for rope.

    `fields` limits it to some of FIELDS. Raises ValueError if the source's files cannot be read.
    """
    shard = RankShard(source, config, shape, rank, xp)
    for field in fields:
        if field == "norms":
            yield field, 0, shard.norms().reshape(-1)
        elif field == "rope":
            yield field, 0, xp.asarray(rope_table(config, rope_positions(shape)).reshape(-1))
        elif field != "embed" or not embed_is_lm_head(config, shape):
            offset = 0
            for layer in range(config.num_hidden_layers if field in LAYER_FIELDS else 1):
                for matrix in shard.matrices(field, layer):
                    rows, columns = matrix.shape
                    step = max(abi.UNIT_ROWS, PIECE_BYTES // (2 * columns) // abi.UNIT_ROWS * abi.UNIT_ROWS)
                    for start in range(0, rows, step if matrix.splittable else rows):
                        stop = min(start + step, rows) if matrix.splittable else rows
                        packed = pack_matrix(matrix.read(start, stop), xp)
                        yield field, offset, packed
                        offset += packed.nbytes


def load_rank(
    source: WeightSource,
    config: ModelConfig,
    shape: np.void,
    rank: int,
    put: Put,
    *,
    xp=np,
    progress: Callable[[int], None] | None = None,
    fields=FIELDS,
) -> int:
    """Fills a rank's weight buffers: `put(field, byte_offset, array)` for every piece, then `progress(bytes of the piece)`.

    The buffers' sizes are `rank_bytes`; `xp` is the array module that assembles and packs (numpy or cupy), and the pieces
    are its arrays. Returns the bytes put. Raises ValueError if the source's files cannot be read.
    """
    total = 0
    for field, offset, array in pieces(source, config, shape, rank, xp=xp, fields=fields):
        put(field, offset, array)
        total += array.nbytes
        if progress is not None:
            progress(array.nbytes)
    return total
