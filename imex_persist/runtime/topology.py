"""How this machine's GPUs reach each other, as NVML tells it: no CUDA context is made and nothing is measured.

NVLink's figures are link rates as the driver reports them. Whether peer memory really works is found at start, by writing and
reading through the real handles (rank.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from imex_persist.runtime import discover

MAX_LINKS = 36
PCI_DEVICES = Path("/sys/bus/pci/devices")
GENERATIONS = {1: "1", 2: "2", 3: "2", 4: "3", 5: "3", 6: "4", 7: "5", 8: "6"}  # NVML_NVLINK_VERSION_…
SWITCH = 2  # NVML_NVLINK_DEVICE_TYPE_SWITCH
# NVML_P2P_CAPS_INDEX_…, written out: in pynvml the first is a tuple by mistake
READ, WRITE, NVLINK, ATOMICS = 0, 1, 2, 3
P2P_STATUS = (
    "ok, chipset not supported, GPU not supported, IOH topology not supported, disabled by registry key, not supported"
).split(", ")
# NVML_TOPOLOGY_… in NCCL's words: 40 is one NUMA node
ANCESTORS = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "PHB", 50: "SYS"}
FABRIC = ("not supported", "not started", "in progress", "completed")
FIELD_SPEED_COMMON, FIELD_SPEED = 90, 164  # NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON, …_GET_SPEED with the link as scope


@dataclass(frozen=True)
class GpuInfo:
    """One GPU; None is what the driver does not say."""

    ordinal: int  # as CUDA counts with CUDA_DEVICE_ORDER=PCI_BUS_ID, CUDA_VISIBLE_DEVICES applied
    uuid: str
    name: str
    capability: tuple[int, int]
    memory_bytes: int | None
    pci_bus_id: str
    numa_node: int | None
    nvlink_generation: str | None  # "4"
    nvlink_links: int  # that are up
    nvlink_link_gb_s: float | None  # of one link, each way
    nvlink_switch: bool  # links end at an NVSwitch
    fabric_state: str | None


@dataclass(frozen=True)
class Pair:
    """Two GPUs by ordinal, first < second."""

    first: int
    second: int
    path: str  # "NVLink", "PCIe", or "none": no peer access
    links: int
    gb_s_each_way: float | None  # NVLink's
    peer_access: bool | None
    why_not: str | None  # NVML's word where there is no peer access
    native_atomics: bool | None
    via_switch: bool
    pcie_level: str | None  # PIX, PXB, PHB or SYS


@dataclass(frozen=True)
class Topology:
    gpus: tuple[GpuInfo, ...] = ()
    pairs: tuple[Pair, ...] = ()
    driver: str | None = None
    note: str | None = None  # why less is known than there might be

    def pair(self, uuid: str, other: str) -> Pair | None:
        """The pair of two GPUs by UUID; None where one is not known."""
        ordinals = {gpu.ordinal for gpu in self.gpus if gpu.uuid in (uuid, other)}
        return next((pair for pair in self.pairs if {pair.first, pair.second} == ordinals), None)


def read_topology(nvml: Any = None, setting: str | None = None) -> Topology:
    """This machine's topology; empty, with a note, where there is no GPU.

    `setting` is CUDA_VISIBLE_DEVICES, `nvml` pynvml or a stand-in.
    """
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return _without_nvml(
                "nvidia-ml-py is not installed, so links and peer access are unknown: pip install nvidia-ml-py"
            )
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return _without_nvml(f"NVML cannot be asked ({error}), so links and peer access are unknown")
    try:
        return _read(_Asker(nvml), setting)
    except nvml.NVMLError as error:
        return Topology(note=f"NVML stopped answering ({error}): check the driver with nvidia-smi")
    finally:
        nvml.nvmlShutdown()


def _without_nvml(why: str) -> Topology:
    gpus = discover.find_gpus()
    if not gpus:
        return Topology(note="no GPU found")
    known = (GpuInfo(g.ordinal, g.uuid, g.name, g.capability, None, "", None, None, 0, None, False, None) for g in gpus)
    return Topology(tuple(known), note=why)


class _Asker:
    """NVML calls whose refusal is an answer."""

    def __init__(self, nvml: Any):
        self.nvml = nvml

    def __call__(self, name: str, *args: Any, default: Any = None) -> Any:
        function: Callable | None = getattr(self.nvml, name, None)
        try:
            return default if function is None else function(*args)
        except self.nvml.NVMLError:
            return default


def _read(ask: _Asker, setting: str | None) -> Topology:
    nvml = ask.nvml
    handles, infos, remotes = {}, {}, {}
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        info, ends = _gpu(ask, handle, index)
        handles[info.uuid], infos[info.uuid], remotes[info.uuid] = handle, info, ends
    counted = [discover.Gpu(i.ordinal, i.uuid, i.name, i.capability) for i in infos.values()]
    gpus = [replace(infos[gpu.uuid], ordinal=gpu.ordinal) for gpu in discover.visible(counted, setting)]
    pairs = [
        _pair(ask, a, b, handles[a.uuid], handles[b.uuid], remotes[a.uuid]) for i, a in enumerate(gpus) for b in gpus[i + 1 :]
    ]
    note = (
        None if gpus else "no GPU found" if not counted else f"CUDA_VISIBLE_DEVICES={setting} hides every GPU of {len(counted)}"
    )
    return Topology(tuple(gpus), tuple(pairs), _text(ask("nvmlSystemGetDriverVersion")), note)


def _gpu(ask: _Asker, handle: Any, index: int) -> tuple[GpuInfo, list[str]]:
    """One GPU, and the PCI bus id at the other end of each of its links that are up."""
    nvml = ask.nvml
    pci = ask("nvmlDeviceGetPciInfo", handle)
    bus_id = "" if pci is None else _text(pci.busId).lower()
    memory = ask("nvmlDeviceGetMemoryInfo", handle)
    links = [link for link in range(MAX_LINKS) if ask("nvmlDeviceGetNvLinkState", handle, link) == 1]
    ends = [ask("nvmlDeviceGetNvLinkRemotePciInfo", handle, link) for link in links]
    kinds = [ask("nvmlDeviceGetNvLinkRemoteDeviceType", handle, link) for link in links]
    version = ask("nvmlDeviceGetNvLinkVersion", handle, links[0]) if links else None
    info = GpuInfo(
        ordinal=index,
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        name=_text(nvml.nvmlDeviceGetName(handle)),
        capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        memory_bytes=None if memory is None else int(memory.total),
        pci_bus_id=bus_id,
        numa_node=_numa_node(ask, handle, bus_id),
        nvlink_generation=None if version is None else GENERATIONS.get(int(version), f"unknown ({version})"),
        nvlink_links=len(links),
        nvlink_link_gb_s=_link_gb_s(ask, handle, links[0]) if links else None,
        nvlink_switch=SWITCH in kinds,
        fabric_state=_fabric(ask, handle),
    )
    return info, ["" if end is None else _text(end.busId).lower() for end in ends]


def _link_gb_s(ask: _Asker, handle: Any, link: int) -> float | None:
    """GB/s each way of one link."""
    for field in ((FIELD_SPEED, link), FIELD_SPEED_COMMON):
        (value,) = ask("nvmlDeviceGetFieldValues", handle, [field], default=(None,))
        if value is not None and value.nvmlReturn == 0 and int(value.value.uiVal) > 0:
            return int(value.value.uiVal) / 1e3  # MB/s
    return None


def _numa_node(ask: _Asker, handle: Any, bus_id: str) -> int | None:
    node = ask("nvmlDeviceGetNumaNodeId", handle)  # only where GPU memory is a node of its own
    if node is None and bus_id:
        try:  # NVML writes 00000000:18:00.0, the kernel 0000:18:00.0
            node = int((PCI_DEVICES / bus_id[-12:] / "numa_node").read_text())
        except (OSError, ValueError):
            return None
    return node if node is not None and node >= 0 else None


def _fabric(ask: _Asker, handle: Any) -> str | None:
    make = getattr(ask.nvml, "c_nvmlGpuFabricInfo_t", None)
    if make is None:
        return None
    info = make()
    if ask("nvmlDeviceGetGpuFabricInfo", handle, _by_reference(info), default=-1) != 0:
        return None
    state = int(info.state)
    return FABRIC[state] if state < len(FABRIC) else f"unknown ({state})"


def _by_reference(structure: Any) -> Any:
    import ctypes

    return ctypes.byref(structure) if isinstance(structure, ctypes.Structure) else structure


def _pair(ask: _Asker, a: GpuInfo, b: GpuInfo, first: Any, second: Any, ends: list[str]) -> Pair:
    states = [ask("nvmlDeviceGetP2PStatus", first, second, index) for index in (READ, WRITE, NVLINK, ATOMICS)]
    known = None not in states[:2]
    access = states[0] == 0 and states[1] == 0 if known else None
    direct = sum(end == b.pci_bus_id for end in ends if end)
    links = direct or (min(a.nvlink_links, b.nvlink_links) if states[2] == 0 or (a.nvlink_switch and b.nvlink_switch) else 0)
    rate = min((r for r in (a.nvlink_link_gb_s, b.nvlink_link_gb_s) if r is not None), default=None)
    bad = next((state for state in states[:2] if state), None) if known else None
    return Pair(
        first=a.ordinal,
        second=b.ordinal,
        path="none" if access is False else "NVLink" if links else "PCIe",
        links=links,
        gb_s_each_way=None if rate is None or not links else round(links * rate, 1),
        peer_access=access,
        why_not=None if bad is None else P2P_STATUS[bad] if bad < len(P2P_STATUS) else "unknown",
        native_atomics=None if states[3] is None else states[3] == 0,
        via_switch=bool(links and not direct),
        pcie_level=ANCESTORS.get(ask("nvmlDeviceGetTopologyCommonAncestor", first, second)),
    )


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
