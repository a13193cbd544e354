"""Runs the peers that are installed and says why the others were not run. A peer cannot hurt us: it is a process with a time limit."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from imex_persist.runtime.placement import Placement
from imex_persist.runtime.process import environment

LIMIT_S = 400.0  # of one peer, torch.compile's time included
WORDS = 300  # of what a failed peer said last


@dataclass(frozen=True)
class Peer:
    name: str
    bench: str  # decode or exchange
    module: str  # of this folder
    package: str  # that must be installed
    mode: str = ""  # what the module is to measure


PEERS = (
    Peer("torch.compile, CUDA graphs", "decode", "decode_torch", "torch", "compile"),
    Peer("torch, hand-captured CUDA graph", "decode", "decode_torch", "torch", "graph"),
    Peer("torch prefill, CUDA graph", "decode", "decode_torch", "torch", "prefill"),
    Peer("vLLM", "decode", "decode_vllm", "vllm"),
    Peer("NCCL in a CUDA graph", "exchange", "exchange_torch", "torch", "nccl"),
    Peer("torch symmetric memory, one-shot", "exchange", "exchange_torch", "torch", "one_shot"),
    Peer("torch symmetric memory, two-shot", "exchange", "exchange_torch", "torch", "two_shot"),
    Peer("vLLM custom all-reduce", "exchange", "exchange_vllm", "vllm"),
)
NOT_DRIVEN = {  # peers that this benchmark has no driver for
    "exchange": {"FlashInfer all-reduce": "this benchmark has no driver for it"},
    "decode": {},
}


def run_peers(bench: str, placement: Placement, job: dict) -> list[dict]:
    """[{"name", "rows": […]} or {"name", "why_not"}] of every peer of a bench. `job` is what the peers' modules take."""
    out = [_run(peer, placement, {**job, "mode": peer.mode}) for peer in PEERS if peer.bench == bench]
    return out + [{"name": name, "why_not": why} for name, why in NOT_DRIVEN[bench].items()]


def _run(peer: Peer, placement: Placement, job: dict) -> dict:
    if importlib.util.find_spec(peer.package) is None:
        return {"name": peer.name, "why_not": f"{peer.package} is not installed"}
    if placement.kind != "cuda":
        return {"name": peer.name, "why_not": "it needs a GPU"}
    if peer.bench == "exchange" and len(placement.places) < 2:
        return {"name": peer.name, "why_not": "it needs a GPU for every rank"}
    if peer.module == "decode_torch" and job["tensor_parallel_size"] > 1:
        return {"name": peer.name, "why_not": "it is written for one GPU"}
    visible = ",".join(place.uuid for place in placement.places)
    with tempfile.TemporaryDirectory(prefix="imex-peer-") as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-P", "-m", f"imex_persist.bench.peers.{peer.module}", json.dumps(job), str(answer)]
        why = run_limited(command, {**environment(), "CUDA_VISIBLE_DEVICES": visible, "CUDA_MODULE_LOADING": "LAZY"}, LIMIT_S)
        if answer.exists():
            return {"name": peer.name, **json.loads(answer.read_text())}
        return {"name": peer.name, "why_not": why or "it left no answer"}


def run_limited(command: list[str], env: dict[str, str], limit_s: float) -> str | None:
    """Runs a command to its end, and ends it with all its children after `limit_s`. Returns why it failed, or None."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # its own group: it has a session of its own
            except ProcessLookupError:
                pass
            process.wait(20)
        if code == 0:
            return None
        log.seek(0)
        words = " ".join(log.read().split())[-WORDS:]
        return f"it did not end in {limit_s:.0f} s" if code is None else f"it ended with exit code {code}: {words}"
