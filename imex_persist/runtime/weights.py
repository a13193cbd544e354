"""A rank's weights: from the model's files, packed, into the device's memory. Runs in the workers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from imex_persist.config import EngineConfig
from imex_persist.device.base import Buffer, Device
from imex_persist.model import packing
from imex_persist.model.load import load_model


def spec(config: EngineConfig) -> dict:
    """What a worker must know to open the model itself, as JSON."""
    return {"model": config.model, "load_format": config.load_format, "seed": int(config.seed)}


def load_rank(
    device: Device, model: dict, shape: np.void, rank: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, Buffer]:
    """The weight buffers of one rank by their field of abi.RankParams. `model` is `spec`'s; `progress` gets bytes done and in all.

    Raises ValueError when the files cannot be read, DeviceError when memory runs out.
    """
    xp = getattr(device, "xp", np)  # CuPy on a GPU: weights are packed, and dummy ones made, where they are needed
    opened = load_model(model["model"], model["load_format"], seed=model["seed"], xp=xp, tokenizer=False)
    sizes = packing.rank_bytes(opened.config, shape)
    buffers = {name: device.zeros(nbytes) for name, nbytes in sizes.items()}
    buffers.setdefault("embed", buffers["lm_head"])  # tied, one rank: the same bytes
    done, total = 0, sum(sizes.values())

    def put(field: str, offset: int, array: np.ndarray) -> None:
        nonlocal done
        device.upload(buffers[field], offset, array)
        done += array.nbytes
        if progress is not None:
            progress(done, total)

    packing.load_rank(opened.weights, opened.config, shape, rank, put, xp=xp)
    return buffers
