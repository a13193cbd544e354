"""EngineConfig: every setting of an engine, once. `LLM(**settings)` and the command line both make one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from numbers import Integral, Real

from imex_persist import abi

LOAD_FORMATS = ("auto", "dummy")  # model/load.py
DEFAULT_MAX_NUM_SEQS = 8
DEFAULT_MAX_ROWS = 8  # as many as fit, at most so many
DEFAULT_MAX_MODEL_LEN = {"cuda": 8192, "sim": 2048}
DEFAULT_DEADLINE_S = {"cuda": 2.0, "sim": 20.0}  # the simulator's ranks share few cores with everything else
STRATEGIES = tuple(member.name for member in abi.Strategy)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine; None means that a value is chosen from model and machine.

    `model` is a Hugging Face folder, a GGUF file or "smollm2". `device` is "auto", "cuda", "sim", or either with ordinals ("cuda:0"
    puts all ranks on one GPU). `kv_cache_memory_bytes` is per rank. `max_rows` are rows of a step, decode and prompt rows together.
    `deadline_s` bounds every wait of the kernel. Raises ValueError for values that are not allowed; nothing is read or started here.
    """

    model: str
    tensor_parallel_size: int = 1
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_rows: int | None = None
    kv_cache_memory_bytes: int | None = None
    load_format: str = "auto"
    seed: int = 0
    exchange: str | None = None
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, (str, os.PathLike)) or not str(self.model):
            raise ValueError(f"model is {self.model!r}: a folder, a GGUF file or a name such as 'smollm2' is allowed")
        object.__setattr__(self, "model", str(self.model))
        _integer("tensor_parallel_size", self.tensor_parallel_size, 1, abi.MAX_RANKS)
        _optional("max_model_len", self.max_model_len, 2, 1 << 24)
        _optional("max_num_seqs", self.max_num_seqs, 1, abi.MAX_SLOTS)
        _optional("max_rows", self.max_rows, 1, abi.MAX_ROWS)
        _optional("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1, 1 << 48)
        _integer("seed", self.seed, 0, 2**64 - 1)
        _one_of("load_format", self.load_format, LOAD_FORMATS)
        if self.exchange is not None:
            _one_of("exchange", self.exchange, STRATEGIES)
        given = self.deadline_s
        if given is not None and (not isinstance(given, Real) or isinstance(given, bool) or not 0.001 <= given <= 3600):
            raise ValueError(f"deadline_s is {given!r}: a number of seconds from 0.001 to 3600 is allowed")


def _integer(name: str, value, low: int, high: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}: an integer of {low} to {high} is allowed")


def _optional(name: str, value, low: int, high: int) -> None:
    if value is not None:
        _integer(name, value, low, high)


def _one_of(name: str, value, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: one of {', '.join(map(repr, allowed))} is allowed")
