"""Ranks on one axis: the words of the exchanges are the ping-pong.

A word that rank a sends at its time s and rank b has at its time v gives v - s >= hop + (b's timer - a's). Over many exchanges in both
directions the smallest differences bound the offset between the two timers from both sides; the middle is the estimate and half the
smallest round trip the error that it cannot exceed, whatever the two directions cost each.
"""

from __future__ import annotations

import numpy as np

from imex_persist.abi import Phase
from imex_persist.observe.spans import Trace, moved, order_of


def smallest_delays(trace: Trace) -> np.ndarray:
    """float [ranks, ranks]: the smallest µs, each by its own timer, from rank a's words leaving to rank b having them."""
    world, layers = int(trace.shape["world_size"]), int(trace.shape["num_layers"])
    out = np.full((world, world), np.inf)
    for step in trace.steps:
        table = trace.table(step)
        for source, target in exchange_places(layers):
            left = _left(table, source)  # [ranks]: the last word of each
            if np.isnan(left).any():
                continue
            if np.isnan(table["sum"][..., target]).any():
                seen = np.nanmin(table["input"][..., target], axis=1)  # every block waits for all words
            else:
                seen = np.max(table["sum"][..., target], axis=1)  # an owner waits for its slice's: only the last had all
            out = np.minimum(out, seen[None, :] - left[:, None])
    return out


def exchange_places(num_layers: int) -> list[tuple[int, int]]:
    """(place of the phase that sends, place of the one that takes in) of a step's exchanges."""
    pairs = []
    for layer in range(num_layers):
        after = (Phase.QKV, layer + 1) if layer + 1 < num_layers else (Phase.LM_HEAD, num_layers)
        pairs.append(((Phase.O_PROJ, layer), (Phase.GATE_UP, layer)))
        pairs.append(((Phase.DOWN_PROJ, layer), after))
    return [tuple(int(order_of(phase, layer, num_layers)) for phase, layer in pair) for pair in pairs]


def _left(table: np.ndarray, place: int) -> np.ndarray:
    sent = table["sent"][..., place]
    return np.max(np.where(np.isnan(sent), table["end"][..., place], sent), axis=1)


def offsets(delays: np.ndarray) -> tuple[np.ndarray, float]:
    """(µs to subtract from each rank's times, largest error) from `smallest_delays`; rank 0 stays."""
    error = np.maximum((delays + delays.T) / 2, 0.0)
    offset = (delays[0] - delays[:, 0]) / 2  # a = 0 to b, less b to 0
    return np.nan_to_num(offset), float(np.max(error[0, 1:], initial=0.0))


def align(trace: Trace) -> Trace:
    """The trace on rank 0's axis, for ranks whose timers differ."""
    if int(trace.shape["world_size"]) == 1 or not len(trace.spans):
        return trace
    return moved(trace, *offsets(smallest_delays(trace)))
