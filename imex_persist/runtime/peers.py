"""Whether the ranks' GPUs may exchange under the setting `p2p_level`, and what the start log says about the way between them."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import combinations

from imex_persist.runtime.placement import Place, Placement
from imex_persist.runtime.topology import Pair, Topology, read_topology

PCIE_LEVELS = ("PIX", "PXB", "PHB", "SYS")  # ever farther apart
UNSET = "unset IMEX_P2P_LEVEL and NCCL_P2P_LEVEL"


def this_machine() -> Topology:
    """What this process sees."""
    return read_topology(setting=os.environ.get("CUDA_VISIBLE_DEVICES"))


def check_peers(level: str | None, placement: Placement, read: Callable[[], Topology] = this_machine) -> None:
    """Raises ValueError for ranks that `level` (config.P2P_LEVELS) keeps apart, or that cannot be shown to be near enough."""
    world = sum(len(place.ranks) for place in placement.places)
    if level == "LOC" and world > 1:
        raise ValueError(
            f"p2p_level is LOC, which forbids peer access, and tensor_parallel_size is {world}: {UNSET}, or use tensor_parallel_size 1"
        )
    if level in (None, "LOC", "SYS") or placement.kind == "sim" or len(placement.places) == 1:
        return
    topology = read()
    for a, b in combinations(placement.places, 2):
        pair = topology.pair(a.uuid, b.uuid)
        between = f"between GPU {a.ordinal} ({a.name}) and GPU {b.ordinal}"
        if pair is None:
            raise ValueError(f"p2p_level is {level} but the way {between} is unknown ({topology.note}): {UNSET}, or install it")
        if not _near(pair, level):
            way = (
                "there is no peer access" if pair.path == "none" else f"the way is PCIe ({pair.pcie_level or 'level unknown'})"
            )
            raise ValueError(f"p2p_level is {level} and {between} {way}: choose GPUs with CUDA_VISIBLE_DEVICES, or {UNSET}")


def _near(pair: Pair, level: str) -> bool:
    if pair.path == "NVLink":
        return True
    known = pair.path == "PCIe" and pair.pcie_level in PCIE_LEVELS
    return known and level != "NVL" and PCIE_LEVELS.index(pair.pcie_level) <= PCIE_LEVELS.index(level)


def describe_peers(places: tuple[Place, ...], read: Callable[[], Topology] = this_machine) -> str:
    """ "NVLink, 18 links, 478 GB/s each way, peer access verified", of the ranks' weakest pair. Call it once that is true."""
    if places[0].kind == "sim":
        return "simulated"
    if len(places) == 1:
        return f"one GPU ({places[0].name}), {len(places[0].ranks)} rank(s)"
    topology = read()
    pairs = [topology.pair(a.uuid, b.uuid) for a, b in combinations(places, 2)]
    known = [pair for pair in pairs if pair is not None]
    if len(known) < len(pairs):
        way = f"{len(places)} GPUs ({places[0].name}), links unknown ({topology.note})"
    elif any(pair.path != "NVLink" for pair in known):
        far = next(pair for pair in known if pair.path != "NVLink")
        way = f"PCIe, no NVLink between GPU {far.first} and GPU {far.second}"
    else:
        least = min(known, key=lambda pair: (pair.gb_s_each_way or 0.0, pair.links))
        rate = "rate unknown" if least.gb_s_each_way is None else f"{least.gb_s_each_way:.0f} GB/s each way"
        way = f"NVLink, {least.links} links, {rate}"
    return f"{way}, peer access verified"
