"""The header of a GGUF file: metadata, and where each tensor lies. Layout: github.com/ggml-org/ggml, docs/gguf.md.

Read here because the `gguf` package's reader makes an array view of every string (2.7 s for 49,000 tokens, against 0.1 s)
and loops without end on some broken files. The formats of quantized blocks stay the package's (gguf.py).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imex_persist.model.messages import one_line

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
MAX_ITEMS = 1 << 24  # entries of an array, tensors, keys: what a real file has is far below


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` as NumPy orders it (rows first), its ggml type number, and its first byte in the file."""

    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by key, tensors by name, and the file's size in bytes."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    nbytes: int


def read_header(path: str | Path) -> GgufHeader:
    """The header of the GGUF file (version 2 or 3, little-endian) at `path`. Raises ValueError if it is not sound."""
    try:
        with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data).header()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give an existing .gguf file") from None
    except (ValueError, struct.error, OverflowError) as error:  # ValueError: also an empty file, and text that is not UTF-8
        raise ValueError(f"{path} is no complete GGUF file ({one_line(error)}); download it again") from None


class _Cursor:
    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def scalar(self, code: str):
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def count(self, what: str) -> int:
        value = self.scalar("Q")
        if value > MAX_ITEMS:
            raise ValueError(f"{what} is {value}")
        return value

    def string(self) -> str:
        size = self.scalar("Q")
        end = self.at + size
        if end > len(self.data):
            raise ValueError("a string runs past the end of the file")
        text = self.data[self.at : end].decode("utf-8")
        self.at = end
        return text

    def value(self, kind: int):
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"metadata of type {kind}")
        item, size = self.scalar("I"), self.count("the length of an array")
        if item == _STRING:
            return [self.string() for _ in range(size)]
        if item not in _SCALARS:
            raise ValueError(f"an array of type {item}")
        values = struct.unpack_from(f"<{size}{_SCALARS[item]}", self.data, self.at)
        self.at += struct.calcsize(f"<{size}{_SCALARS[item]}")
        return list(values)

    def header(self) -> GgufHeader:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        version = self.scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, and 2 and 3 are known")
        num_tensors, num_keys = self.count("the number of tensors"), self.count("the number of metadata keys")
        metadata = {}
        for _ in range(num_keys):
            key = self.string()
            metadata[key] = self.value(self.scalar("I"))
        placed = {}
        for _ in range(num_tensors):
            name = self.string()
            dims = self.scalar("I")
            if not 1 <= dims <= 4:
                raise ValueError(f"a tensor of {dims} dimensions")
            shape = tuple(self.scalar("Q") for _ in range(dims))[::-1]
            if math.prod(shape) >= 1 << 48:
                raise ValueError(f"a tensor of shape {list(shape)}")
            if name in placed:
                raise ValueError("two tensors of one name")
            placed[name] = (shape, self.scalar("I"), self.scalar("Q"))
        align = metadata.get("general.alignment", 32)
        if not isinstance(align, int) or not 1 <= align <= 1 << 20:
            raise ValueError(f"alignment {align!r:.40}")
        base = -(-self.at // align) * align
        tensors = {name: GgufTensor(shape, kind, base + offset) for name, (shape, kind, offset) in placed.items()}
        return GgufHeader(metadata, tensors, len(self.data))
