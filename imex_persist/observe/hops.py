"""Words on their way: when a phase's last ones left each block, who takes them in, and whether they were seen after they had left."""

from __future__ import annotations

import numpy as np

from imex_persist.abi import Phase
from imex_persist.observe.spans import EXCHANGED, Trace, num_phases, order_of


def exchange_places(num_layers: int) -> list[tuple[int, int]]:
    """(place of the phase that sends, place of the one that takes in) of a step's exchanges."""
    pairs = []
    for layer in range(num_layers):
        after = (Phase.QKV, layer + 1) if layer + 1 < num_layers else (Phase.LM_HEAD, num_layers)
        pairs.append(((Phase.O_PROJ, layer), (Phase.GATE_UP, layer)))
        pairs.append(((Phase.DOWN_PROJ, layer), after))
    return [tuple(int(order_of(phase, layer, num_layers)) for phase, layer in pair) for pair in pairs]


def without_item(table: np.ndarray) -> np.ndarray:
    """[ranks, blocks, phases] Where blocks attend to nothing and send nothing. Where a context is cut, all merge its runs."""
    return (table["phase"] == Phase.ATTENTION) & (table["value"] == 0) & ~table["cut"]


def words_left(table: np.ndarray) -> np.ndarray:
    """µs [ranks, blocks, phases of a step] when the last words of a phase had left a block; -inf: it sends none.

    The matrices' words are sent by adders, whose mark is missing where a block had no unit; attention's by the end of the phase; lm_head's
    by the consumers, who then begin `sample`.
    """
    out = np.where(np.isnan(table["sent"]), -np.inf, table["sent"])
    attention = table["phase"] == Phase.ATTENTION
    out[attention] = table["end"][attention]
    out[..., -2] = table["begin"][..., -1]
    out[without_item(table)] = -np.inf
    return out


def needs_some(phase: Phase, shape: np.void) -> bool:
    """Whether a block needs the words of some blocks only: of an item's heads in attention, of its slice where down_proj's K is cut."""
    return phase == Phase.ATTENTION or (phase == Phase.DOWN_PROJ and int(shape["down_slices"]) > 1)


def hop_check(trace: Trace) -> dict:
    """The shortest hops, and how many words were seen before they had left, which clocks that are wrong would show.

    A hop is from the last word of all that a block needs to the block having them all. Left out are phases that need some blocks' words
    only, and o_proj: attention's words leave before its end, which is what its mark tells. "local" hops wait for the own rank's words
    only, or had one of them as the last; "peers" the others.
    """
    shortest = {"local": np.inf, "peers": np.inf}
    count = wrong = 0
    for step in trace.steps:
        table = trace.table(step)
        out = words_left(table)
        for target in range(2, num_phases(trace.shape)):
            phase = Phase(int(table["phase"][0, 0, target]))
            if phase == Phase.O_PROJ or needs_some(phase, trace.shape):
                continue
            left = out[..., target - 1].max(axis=1)
            seen = table["input"][..., target].min(axis=1)  # also where slice owners stand between: all words are in it
            if not np.isfinite(left).all():  # of a step without logits, after its last o_proj
                continue
            for rank in range(len(left)):
                last = int(np.argmax(left)) if phase in EXCHANGED else rank
                hop = float(seen[rank] - left[last])
                kind = "local" if last == rank else "peers"
                shortest[kind] = min(shortest[kind], hop)
                count += 1
                wrong += hop < 0
    return {
        "checked": count,
        "contradictions": wrong,
        "shortest_local_us": shortest["local"] if np.isfinite(shortest["local"]) else None,
        "shortest_peers_us": shortest["peers"] if np.isfinite(shortest["peers"]) else None,
    }
