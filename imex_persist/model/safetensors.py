"""Weights from a folder of safetensors files: one `model.safetensors`, or several named by `model.safetensors.index.json`.

The `safetensors` package maps the files and checks their headers; slices are read as they are asked for.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from imex_persist.model.bf16 import to_bits
from imex_persist.model.config import ModelConfig, read_json
from imex_persist.model.messages import one_line, short
from imex_persist.model.weights import Range, check_tensors, tensor_shapes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


class SafetensorsWeights:
    """A WeightSource over a Hugging Face folder. Raises ValueError for files or tensors that are missing, broken, or of
    another model.
    """

    rope_adjacent = False

    def __init__(self, folder: str | Path, config: ModelConfig):
        self.folder = Path(folder)
        self._slices = {}
        shapes = {}
        needed = tensor_shapes(config)
        for path, listed in _files(self.folder).items():
            handle = _open(path)
            names = set(handle.keys())
            lost = sorted(set(listed) - names)
            if lost:
                raise ValueError(f"{path} has no tensor {lost[0][:100]}, which {INDEX} says it has; download the folder again")
            for name in names:
                view = handle.get_slice(name)
                if name in shapes:
                    raise ValueError(
                        f"{path} has {name[:100]}, which another file of the folder has too; remove one of the files"
                    )
                if name in needed and view.get_dtype() not in DTYPES:
                    raise ValueError(
                        f"{path}: {name} is stored as {view.get_dtype()}, and must be {', '.join(DTYPES.values())}; "
                        "choose a model that is not quantized"
                    )
                shapes[name] = tuple(view.get_shape())
                self._slices[name] = (path, view)
        check_tensors(config, shapes, str(self.folder))

    def read(self, name: str, rows: Range = None, columns: Range = None) -> np.ndarray:
        path, view = self._slices[name]
        start, stop = rows or (0, view.get_shape()[0])
        try:
            # whole rows are contiguous in the file; safetensors copies them out of the mapping once
            part = view[start:stop] if columns is None else view[start:stop, columns[0] : columns[1]]
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path}: {name} cannot be read ({one_line(error)}); download the file again") from None
        return to_bits(part)


def _files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files of `folder`, and the tensors that the index says each of them has."""
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise ValueError(
                f"{folder} has neither {SINGLE} nor {INDEX}; give a folder with safetensors weights, or use --load-format dummy"
            )
        return {folder / SINGLE: []}
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map of tensor names to file names; download it again")
    files: dict[Path, list[str]] = {}
    for name, file in index.items():
        if Path(file).name != file:  # a name, never a way out of the folder
            raise ValueError(f"{folder / INDEX} names the file {short(file)}, and must name files of its own folder")
        files.setdefault(folder / file, []).append(name)
    return files


def _open(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; download the folder again") from None
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise ValueError(
            f"{path} ({size} bytes) is no complete safetensors file ({one_line(error)}); download it again"
        ) from None
