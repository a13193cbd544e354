"""Where the tap (cuda_src/tap.cuh) keeps what: every phase's output as float32, of the last step the kernel ran."""

from __future__ import annotations

import numpy as np

from imex_persist.abi import Phase

LAYER_PHASES = (Phase.QKV, Phase.ATTENTION, Phase.O_PROJ, Phase.GATE_UP, Phase.DOWN_PROJ)


def tap_width(shape: np.void, phase: Phase) -> int:
    """Values of one row of a phase's output."""
    heads, kv_heads, dim = (int(shape[k]) for k in ("num_heads", "num_kv_heads", "head_dim"))
    return {
        Phase.QKV: (heads + 2 * kv_heads) * dim,
        Phase.ATTENTION: heads * dim,
        Phase.O_PROJ: int(shape["hidden_size"]),
        Phase.GATE_UP: int(shape["intermediate_size"]),
        Phase.DOWN_PROJ: int(shape["hidden_size"]) * int(shape["down_slices"]),
        Phase.EMBED: int(shape["hidden_size"]),
        Phase.LM_HEAD: int(shape["vocab_rows"]),
    }[phase]


def tap_offset(shape: np.void, phase: Phase, layer: int = 0) -> int:
    """Index of row 0 of a phase's output in the tap."""
    rows = int(shape["max_rows"])
    layer_size = sum(rows * tap_width(shape, p) for p in LAYER_PHASES)
    if phase == Phase.EMBED:
        return int(shape["num_layers"]) * layer_size
    if phase == Phase.LM_HEAD:
        return tap_offset(shape, Phase.EMBED) + rows * tap_width(shape, Phase.EMBED)
    return layer * layer_size + sum(rows * tap_width(shape, p) for p in LAYER_PHASES if p < phase)


def tap_floats(shape: np.void) -> int:
    """Values in the whole tap."""
    return tap_offset(shape, Phase.LM_HEAD) + int(shape["max_rows"]) * tap_width(shape, Phase.LM_HEAD)


def tap_view(values: np.ndarray, shape: np.void, phase: Phase, layer: int = 0) -> np.ndarray:
    """float32 [max_rows, width]: one phase's output in a downloaded tap."""
    start, width, rows = tap_offset(shape, phase, layer), tap_width(shape, phase), int(shape["max_rows"])
    return values[start : start + rows * width].reshape(rows, width)
