"""Under what conditions something was measured: cards, clocks, driver, commit, versions. Nothing of a GPU is ever set, only asked."""

from __future__ import annotations

import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import imex_persist
from imex_persist.runtime.placement import Placement

FIELDS = "uuid,name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,memory.total"
PACKAGES = "numpy cupy-cuda13x cupy-cuda12x cuda-bindings nvidia-cuda-nvrtc nvidia-cuda-nvrtc-cu12 torch vllm flashinfer-python".split()
ASK_S = 20


def where(placement: Placement) -> dict:
    """Everything but the clocks, which `clocks` asks for while something runs."""
    return {
        "device": placement.kind,
        "cards": [{"name": place.name, "uuid": place.uuid, "ranks": list(place.ranks)} for place in placement.places],
        "driver": next((card["driver_version"] for card in clocks(placement)), None),
        "commit": commit(),
        "version": imex_persist.__version__,
        "packages": packages(),
    }


def clocks(placement: Placement) -> list[dict]:
    """What nvidia-smi says of the placement's GPUs now: MHz, °C, W; empty where there is none."""
    wanted = {place.uuid for place in placement.places if place.uuid}
    smi = shutil.which("nvidia-smi")
    if not wanted or smi is None:
        return []
    lines = _said(smi, f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits").splitlines()
    cards = [dict(zip(FIELDS.split(","), map(str.strip, line.split(",")), strict=False)) for line in lines]
    return [card for card in cards if card["uuid"] in wanted]


def commit() -> str | None:
    """The checkout's commit, "+" if anything in it was changed; None outside a checkout."""
    root = Path(imex_persist.__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    name = _said("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    return name + ("+" if _said("git", "-C", str(root), "status", "--porcelain") else "") if name else None


def packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def is_virtual(record: dict) -> bool:
    """Whether the device's times in a benchmark's record are virtual: the engine's ranks all in one simulator. What measures with kernels
    of its own (bench/worker.py) counts wall time."""
    return record["where"]["device"] == "sim" and len(record["where"]["cards"]) == 1 and "kernel" in record


def describe(record: dict) -> list[str]:
    """Where a benchmark's record is from, as lines."""
    facts, busy = record["where"], record.get("busy")
    if is_virtual(record):
        lines = [
            "simulator: these times say nothing about a GPU; a step's is virtual, 20 ns a turn of the scheduler, the host's and the floor "
            "depend on this CPU and on what else runs on it, so a step's ratio to the floor means nothing"
        ]
    elif facts["device"] == "sim":
        lines = ["simulator: these times say nothing about a GPU, they depend on this CPU and on what else runs on it"]
    else:
        names = ", ".join(sorted({card["name"] for card in facts["cards"]}))
        lines = [f"card: {len(facts['cards'])} x {names}, driver {facts['driver']}"]
        lines += [f"clocks while running: SM {c['clocks.sm']} MHz, memory {c['clocks.mem']} MHz" for c in (busy or [])[:1]]
    lines.append(f"imex-persist {facts['version']}, commit {facts['commit'] or 'unknown'}")
    return lines


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
