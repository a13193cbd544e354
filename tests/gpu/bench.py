"""What the GPU tests share: which GPUs there are, a small Shape, and launching single kernels of primitives.cu."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from imex_persist import abi
from imex_persist.runtime.discover import MIN_CAPABILITY, find_gpus, missing_packages

KERNELS = Path(__file__).with_name("primitives.cu")


def capable_gpus() -> tuple[list[int], str]:
    """(ordinals, why there are none)."""
    gpus = find_gpus()
    capable = [gpu.ordinal for gpu in gpus if gpu.capability >= MIN_CAPABILITY]
    if not gpus:
        return [], "no GPU was found"
    if not capable:
        return [], f"{gpus[0].name} has compute capability {gpus[0].capability}, 9.0 or later is needed"
    if why := missing_packages():
        return [], why
    return capable, ""


def make_shape(**fields: int) -> np.void:
    """A Shape for kernels that use only some of its fields."""
    shape = np.zeros((), abi.Shape)
    given = {
        "max_rows": 1,
        "head_dim": 64,
        "world_size": 1,
        "num_blocks": 2,
        "ring_stages": 4,
        "num_layers": 1,
        "hidden_size": 256,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 256,
        "down_slices": 1,
        "num_slots": 1,
        "smem_x": abi.SHARED_HEADER_BYTES,
        "smem_bytes": 96 * 1024,
    } | fields
    for name, value in given.items():
        shape[name] = value
    return shape[()]


class Bench:
    """Launches single kernels of primitives.cu through CuPy, and keeps what a wait needs: RankParams, abort word, fault record."""

    def __init__(self, device):
        self.device = device
        self.xp = device.xp
        self.symmetric = self.xp.zeros(64, np.uint64)
        self.fault = self.xp.zeros(abi.FaultRecord.itemsize, np.uint8)
        self.params = self.xp.zeros(abi.RankParams.itemsize, np.uint8)
        self.set_deadline(2_000_000)

    def set_deadline(self, deadline_us: int) -> None:
        record = np.zeros((), abi.RankParams)
        record["peers"][0] = self.symmetric.data.ptr
        record["fault"] = self.fault.data.ptr
        record["deadline_us"] = deadline_us
        self.params.set(np.frombuffer(record.tobytes(), np.uint8))
        self.symmetric[:] = 0
        self.fault[:] = 0

    def run(self, kernel: str, *args, blocks: int = 1, **shape: int) -> None:
        from imex_persist.device.cuda import THREADS

        loaded = self.device.load(make_shape(**shape), source=KERNELS, entry=kernel)
        function = loaded.module.get_function(kernel)
        function.max_dynamic_shared_size_bytes = int(loaded.shape["smem_bytes"])
        function((blocks,), (THREADS,), args, shared_mem=int(loaded.shape["smem_bytes"]))
        self.xp.cuda.runtime.deviceSynchronize()

    def fault_record(self) -> np.void:
        return self.fault.get().view(abi.FaultRecord)[0]


def to_bf16(array: np.ndarray) -> np.ndarray:
    """float32 -> bf16 bit patterns, nearest even."""
    import ml_dtypes

    return array.astype(ml_dtypes.bfloat16).view(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)
