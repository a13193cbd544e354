"""Finding GPUs without a CUDA context: through nvidia-ml-py where installed, else nvidia-smi. CUDA_VISIBLE_DEVICES is respected."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

MIN_CAPABILITY = (9, 0)
SMI_TIMEOUT_S = 20
_PROC = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class Gpu:
    """A GPU as CUDA would count it with CUDA_DEVICE_ORDER=PCI_BUS_ID."""

    ordinal: int
    uuid: str  # "GPU-…"
    name: str
    capability: tuple[int, int]


def find_gpus() -> list[Gpu]:
    """The visible GPUs; empty where there is no driver. Makes no CUDA context."""
    found = _from_nvml()
    if found is None:
        found = _from_smi()
    return visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible(gpus: list[Gpu], setting: str | None) -> list[Gpu]:
    """`gpus` after CUDA_VISIBLE_DEVICES, by CUDA's rules: indices or UUID prefixes, everything after a bad entry is dropped."""
    if setting is None:
        return gpus
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdigit():
            match = [gpu for gpu in gpus if gpu.ordinal == int(entry)]
        else:
            match = [gpu for gpu in gpus if entry and gpu.uuid.startswith(entry)]
        if len(match) != 1:
            break
        chosen.append(replace(match[0], ordinal=len(chosen)))
    return chosen


def _from_nvml() -> list[Gpu] | None:
    """None when NVML cannot be asked."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid, name = (_text(ask(handle)) for ask in (pynvml.nvmlDeviceGetUUID, pynvml.nvmlDeviceGetName))
            gpus.append(Gpu(index, uuid, name, tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))))
        return gpus
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _text(value) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _from_smi() -> list[Gpu]:
    if not (_PROC.is_dir() or Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()) or not (
        smi := shutil.which("nvidia-smi")
    ):
        return []
    try:
        out = subprocess.run(
            [smi, "--query-gpu=index,uuid,compute_cap,name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=SMI_TIMEOUT_S,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_smi(out)


def parse_smi(text: str) -> list[Gpu]:
    """The output of `nvidia-smi --query-gpu=index,uuid,compute_cap,name --format=csv,noheader`."""
    gpus = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",", 3)]
        if len(parts) == 4 and parts[0].isdigit():
            major, _, minor = parts[2].partition(".")
            capability = (int(major), int(minor or 0)) if major.isdigit() else (0, 0)
            gpus.append(Gpu(int(parts[0]), parts[1], parts[3], capability))
    return gpus


def missing_packages() -> str | None:
    """One sentence when the packages that drive a GPU are not installed, else None."""
    missing = [name for name, module in (("cupy", "cupy"), ("cuda-python", "cuda.bindings")) if not _installed(module)]
    if not missing:
        return None
    return (
        f"a capable GPU was found but {' and '.join(missing)} cannot be imported: run  pip install 'imex-persist[cuda12]'  "
        "(or [cuda13] for CUDA 13), or use device='sim'"
    )


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
        return False
