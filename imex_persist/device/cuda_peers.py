"""What travels between ranks so that one may map the other's memory, and why a mapping may be refused."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from imex_persist.errors import DeviceError

_TEXT = re.compile(r"cuda-ipc/1 (GPU-[0-9a-f-]{36}) (\d{1,10}) (\d{1,15}) ([0-9a-f]{128})")


@dataclass(frozen=True)
class PeerHandle:
    """A CUDA IPC handle. The GPU is named by UUID: CUDA_VISIBLE_DEVICES makes ordinals differ between processes."""

    uuid: str
    pid: int
    nbytes: int
    handle: bytes  # cudaIpcMemHandle_t

    def to_text(self) -> str:
        return f"cuda-ipc/1 {self.uuid} {self.pid} {self.nbytes} {self.handle.hex()}"

    @classmethod
    def from_text(cls, text: str) -> PeerHandle:
        match = _TEXT.fullmatch(text)
        if not match:
            raise DeviceError(f"{text[:60]!r} is no handle of a GPU's memory: all ranks must run the same version and device")
        return cls(match[1], int(match[2]), int(match[3]), bytes.fromhex(match[4]))

    def check(self, own_uuid: str, nbytes: int) -> None:
        """Refuses what cannot work, or what CUDA would accept and hang on later."""
        if self.pid == os.getpid():
            raise DeviceError("a process cannot open its own handle: ranks of one process use each other's addresses")
        if self.uuid == own_uuid:
            raise DeviceError(
                f"processes {self.pid} and {os.getpid()} share the GPU {own_uuid}: separate launches have no promise of running "
                "together; give each its own GPU, or run these ranks in one process (device='cuda:0')"
            )
        if nbytes > self.nbytes:
            raise DeviceError(f"a peer's memory has {self.nbytes} bytes and {nbytes} are needed: the ranks' plans differ")


def why_not_opened(error: str, own_uuid: str, peer: PeerHandle) -> str:
    """The likely cause of a failed cudaIpcOpenMemHandle, in a sentence."""
    if "PeerAccess" in error or "InvalidDevice" in error:
        cause = (
            "the GPUs have no peer access to each other (nvidia-smi topo -p2p w shows it), or one is hidden from the other's "
            "process by CUDA_VISIBLE_DEVICES"
        )
    else:
        cause = (
            "the processes probably run in different containers or namespaces (share them: --ipc=host --pid=host), the exporting "
            "process has ended, or the GPUs cannot reach each other"
        )
    return f"GPU {own_uuid} cannot map the memory of {peer.uuid} in process {peer.pid}, {error}: {cause}"
