"""Which rank lives where: from `device` ("auto", "sim", "cuda", "cuda:0", "cuda:0,1", "sim:0") and the number of ranks.

Without ordinals every rank gets a machine of its own. With ordinals the ranks are divided evenly among the named machines, in order,
and ranks of one machine share a process and a launch: `cuda:0` runs TP 2 and 4 on one card, `sim:0` all ranks in one simulator.
"""

from __future__ import annotations

from dataclasses import dataclass

from imex_persist import abi
from imex_persist.runtime.discover import MIN_CAPABILITY, Gpu, find_gpus, missing_packages


@dataclass(frozen=True)
class Place:
    """One machine: the ranks it hosts, and for CUDA which GPU it is."""

    kind: str  # "cuda" or "sim"
    ordinal: int  # as this process counts them: CUDA_VISIBLE_DEVICES applied
    ranks: tuple[int, ...]
    uuid: str = ""
    name: str = "simulator"


@dataclass(frozen=True)
class Placement:
    places: tuple[Place, ...]
    warning: str | None = None  # why "auto" simulates

    @property
    def kind(self) -> str:
        return self.places[0].kind


def place_ranks(device: str, world_size: int, gpus: list[Gpu] | None = None) -> Placement:
    """Raises ValueError for a device that cannot be parsed or does not exist, DeviceError for a GPU whose packages are missing."""
    if not isinstance(world_size, int) or isinstance(world_size, bool) or not 1 <= world_size <= abi.MAX_RANKS:
        raise ValueError(f"tensor_parallel_size is {world_size!r}: 1 to {abi.MAX_RANKS} is allowed")
    kind, ordinals = parse_device(device)
    warning = None
    if kind == "auto":
        gpus = find_gpus() if gpus is None else gpus
        capable = [gpu for gpu in gpus if gpu.capability >= MIN_CAPABILITY]
        kind = "cuda" if capable else "sim"
        if not capable:
            why = (
                "no GPU was found"
                if not gpus
                else f"no GPU is capable: {_found(gpus)}, compute capability 9.0 or later is needed"
            )
            warning = f"{why}, so this runs in the simulator (device='sim' says so without this warning)"
    if kind == "sim":
        count = len(ordinals) if ordinals else world_size
        _check_division(world_size, count)
        return Placement(tuple(Place("sim", i, ranks) for i, ranks in enumerate(_divide(world_size, count))), warning)
    gpus = find_gpus() if gpus is None else gpus
    chosen = _choose(device, gpus, ordinals, world_size)
    _check_division(world_size, len(chosen))
    if missing := missing_packages():
        from imex_persist.errors import DeviceError

        raise DeviceError(missing)
    divided = _divide(world_size, len(chosen))
    return Placement(tuple(Place("cuda", g.ordinal, ranks, g.uuid, g.name) for g, ranks in zip(chosen, divided, strict=True)))


def parse_device(device: str) -> tuple[str, list[int]]:
    """(kind, ordinals) of a `device` setting. Raises ValueError for one that means nothing."""
    kind, colon, rest = device.partition(":") if isinstance(device, str) else ("", "", "")
    ordinals = [part.strip() for part in rest.split(",")] if colon else []
    if kind not in ("auto", "cuda", "sim") or (kind == "auto" and colon) or not all(part.isdigit() for part in ordinals):
        raise ValueError(
            f"device is {device!r}: 'auto', 'cuda', 'sim', or one with ordinals such as 'cuda:0' or 'cuda:0,1' is allowed"
        )
    numbers = [int(part) for part in ordinals]
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"device is {device!r}: each ordinal may be named once, ranks are divided among them")
    return kind, numbers


def share_one_gpu(device: str, world_size: int, gpus: list[Gpu] | None = None) -> str:
    """`device`, or on "auto" the one capable GPU if all ranks have to share it: for what is to run everywhere."""
    if device != "auto":
        return device
    capable = [gpu for gpu in (find_gpus() if gpus is None else gpus) if gpu.capability >= MIN_CAPABILITY]
    return f"cuda:{capable[0].ordinal}" if 0 < len(capable) < world_size else "auto"


def _choose(device: str, gpus: list[Gpu], ordinals: list[int], world_size: int) -> list[Gpu]:
    if not gpus:
        raise ValueError(f"device is {device!r} but no GPU was found: use device='sim', or check the driver with nvidia-smi")
    by_ordinal = {gpu.ordinal: gpu for gpu in gpus}
    for ordinal in ordinals:
        if ordinal not in by_ordinal:
            raise ValueError(f"device is {device!r}: GPUs 0 to {len(gpus) - 1} are visible")
    capable = [gpu for gpu in gpus if gpu.capability >= MIN_CAPABILITY]
    chosen = [by_ordinal[o] for o in ordinals] if ordinals else capable[:world_size]
    if poor := [gpu for gpu in chosen if gpu.capability < MIN_CAPABILITY]:
        raise ValueError(f"{_found(poor)}: compute capability 9.0 or later (Hopper) is needed; device='sim' runs without a GPU")
    if not chosen:
        raise ValueError(
            f"no GPU is capable: {_found(gpus)}, compute capability 9.0 or later is needed; device='sim' runs without"
        )
    if not ordinals and len(chosen) < world_size:
        raise ValueError(
            f"tensor_parallel_size is {world_size} but {len(chosen)} capable GPU(s) are visible: use at most {len(chosen)}, or "
            f"device='cuda:{chosen[0].ordinal}' to run all ranks on one GPU"
        )
    return chosen


def _check_division(world_size: int, places: int) -> None:
    if world_size % places:
        raise ValueError(
            f"{world_size} rank(s) cannot be divided evenly among {places} devices: name a divisor of {world_size}"
        )


def _divide(world_size: int, places: int) -> list[tuple[int, ...]]:
    each = world_size // places
    return [tuple(range(i * each, (i + 1) * each)) for i in range(places)]


def _found(gpus: list[Gpu]) -> str:
    return ", ".join(f"GPU {g.ordinal} is {g.name} with compute capability {g.capability[0]}.{g.capability[1]}" for g in gpus)
