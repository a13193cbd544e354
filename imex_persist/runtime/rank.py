"""One rank's memory on a device: weights, KV pages, symmetric memory, and the record the kernel gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from imex_persist import abi, planner
from imex_persist.device.base import Buffer, Device

WEIGHTS = ("qkv", "o_proj", "gate_up", "down_proj", "lm_head", "embed", "norms", "rope")
MARK_BYTES = 16  # that a rank writes into each peer's memory before launch: a pair of words


class RankMemory:
    """Everything one rank owns. The caller fills `weights`, connects peers, and asks for `params`."""

    def __init__(self, device: Device, shape: np.void, rank: int):
        self.device = device
        self.shape = shape
        self.rank = rank
        self.weights: dict[str, Buffer] = {}
        self.symmetric = device.symmetric(int(shape["symmetric_words"]) * 8)
        self.kv = device.zeros(planner.kv_bytes(shape))
        self.claims = device.zeros(planner.num_claims(shape) * 4)
        self.sampler = {name: device.zeros(size) for name, size in planner.sampler_bytes(shape).items()}
        self.peers: dict[int, Buffer] = {rank: self.symmetric}

    def connect(self, handles: Mapping[int, str], local: Mapping[int, RankMemory]) -> None:
        """Maps every peer's symmetric memory: directly where the peer lives in this process, else through its handle."""
        for rank, handle in handles.items():
            if rank in local:
                self.peers[rank] = local[rank].symmetric
            elif rank not in self.peers:
                self.peers[rank] = self.device.open(handle, self.symmetric.nbytes)

    def clear_marks(self) -> None:
        """Zeroes what runtime/marks.py left in the own memory. Call when all ranks have seen theirs."""
        self.device.upload(self.symmetric, 0, np.zeros(len(self.peers) * MARK_BYTES, np.uint8))

    def clear(self) -> None:
        """Zeroes what a kernel has left, but for KV pages, whose contents nobody trusts. Call when all ranks' kernels have returned."""
        # A copy may return before it has reached the GPU, and a peer's launch waits for its own GPU only. So symmetric memory comes
        # first: each copy waits for the one before.
        for buffer in (self.symmetric, self.claims, *self.sampler.values()):
            self.device.upload(buffer, 0, np.zeros(buffer.nbytes, np.uint8))

    def params(self, *, mailbox: int, fault: int, deadline_us: int, trace: int = 0) -> np.void:
        """The abi.RankParams of this rank; `mailbox` (0 beside rank 0), `fault` and `trace` are addresses as the kernel sees them."""
        out = np.zeros((), abi.RankParams)
        for name in WEIGHTS:
            out[name] = self.weights[name].address
        out["kv"], out["claims"] = self.kv.address, self.claims.address
        for name, buffer in self.sampler.items():
            out[name] = buffer.address
        for rank, peer in self.peers.items():
            out["peers"][rank] = peer.address
        out["mailbox"], out["fault"], out["trace"] = mailbox, fault, trace
        out["rank"], out["deadline_us"] = self.rank, deadline_us
        return out[()]


def launch_params(ranks: list[np.void]) -> np.void:
    """abi.LaunchParams of the ranks of one launch."""
    out: Any = np.zeros((), abi.LaunchParams)
    for i, rank in enumerate(ranks):
        out["ranks"][i] = rank
    out["num_ranks"] = len(ranks)
    return out[()]
