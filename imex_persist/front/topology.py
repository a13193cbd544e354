"""`imex-persist topology`: a table, or JSON.

Without a GPU it says so and exits 0, since that is an answer; --require N is a check, for containers and scripts, and exits 1.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import combinations

from imex_persist.front.tables import print_table
from imex_persist.runtime.discover import MIN_CAPABILITY
from imex_persist.runtime.peers import this_machine
from imex_persist.runtime.topology import Topology

EXIT_NOT_MET = 1


def run(args: argparse.Namespace) -> int:
    """The command."""
    if args.require is not None and args.require < 1:
        raise ValueError(f"--require is {args.require}: a number of GPUs from 1 is allowed")
    topology = this_machine()
    missing = None if args.require is None else not_met(topology, args.require)
    if args.json:
        print(json.dumps(as_json(topology) | ({} if args.require is None else {"required": args.require, "missing": missing})))
    else:
        print_topology(topology)
        if args.require is not None:
            print(f"not met: {missing}" if missing else f"met: {args.require} capable GPUs with peer access")
    return EXIT_NOT_MET if missing else 0


def not_met(topology: Topology, count: int) -> str | None:
    """Why `count` GPUs cannot exchange, or None. The first `count` capable ones are looked at, as `device="cuda"` takes them."""
    capable = [gpu.ordinal for gpu in topology.gpus if gpu.capability >= MIN_CAPABILITY]
    if len(capable) < count:
        return f"{len(capable)} GPU(s) of compute capability 9.0 or later are visible and {count} are required"
    for first, second in combinations(capable[:count], 2):
        pair = next((p for p in topology.pairs if {p.first, p.second} == {first, second}), None)
        if pair is None or pair.peer_access is None:
            return f"peer access of GPU {first} and GPU {second} is unknown ({topology.note or 'NVML does not say'})"
        if not pair.peer_access:
            return f"GPU {first} and GPU {second} have no peer access ({pair.why_not})"
    return None


def as_json(topology: Topology) -> dict:
    """The topology; `rate` says what gb_s_each_way is."""
    return {**asdict(topology), "rate": "link rate as the driver reports it, not measured"}


def print_topology(topology: Topology) -> None:
    """The tables, or one line where there is nothing to tell."""
    if not topology.gpus:
        print(f"{topology.note}; device='sim' runs the same kernel in a simulator")
        return
    columns = "gpu, name, uuid, capability, memory, PCI bus, NUMA, NVLink, links, GB/s a link, NVSwitch, fabric".split(", ")
    print_table(f"GPUs{'' if topology.driver is None else f' (driver {topology.driver})'}", columns, map(_gpu, topology.gpus))
    if topology.pairs:
        columns = ("pair", "path", "links", "GB/s each way", "peer access", "native atomics", "PCIe level")
        print_table("pairs; rates are the driver's link rates, not measured", columns, map(_pair, topology.pairs))
    if topology.note:
        print(topology.note)


def _gpu(g) -> tuple:
    capable = "" if g.capability >= MIN_CAPABILITY else " (9.0 is needed)"
    return (
        g.ordinal,
        g.name,
        g.uuid,
        f"{g.capability[0]}.{g.capability[1]}{capable}",
        None if g.memory_bytes is None else f"{g.memory_bytes / 2**30:.1f} GiB",
        g.pci_bus_id or None,
        g.numa_node,
        g.nvlink_generation,
        g.nvlink_links or None,
        g.nvlink_link_gb_s,
        g.nvlink_switch,
        g.fabric_state,
    )


def _pair(p) -> tuple:
    path = f"{p.path} through NVSwitch" if p.via_switch and p.path == "NVLink" else "PCIe only" if p.path == "PCIe" else p.path
    access = f"no: {p.why_not}" if p.peer_access is False else p.peer_access
    return f"{p.first} - {p.second}", path, p.links or None, p.gb_s_each_way, access, p.native_atomics, p.pcie_level
