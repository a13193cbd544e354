"""EngineConfig: every setting of an engine, once. `LLM(**settings)` and the command line both make one.

What a setting means is written beside it and nowhere else: flags, the configuration file, `IMEX_*` variables, the help texts and
README's table are all made from these fields (front/settings.py).
"""

from __future__ import annotations

import os
from dataclasses import MISSING, dataclass, field
from numbers import Integral, Real
from typing import Any

from imex_persist import abi

LOAD_FORMATS = ("auto", "dummy")  # model/load.py
DEFAULT_MAX_NUM_SEQS = 8
DEFAULT_MAX_ROWS = 8  # as many as fit, at most so many
DEFAULT_MAX_MODEL_LEN = {"cuda": 8192, "sim": 2048}
DEFAULT_DEADLINE_S = {"cuda": 2.0, "sim": 20.0}  # the simulator's ranks share few cores with everything else
STRATEGIES = tuple(member.name for member in abi.Strategy)
MEASURED, PLANNED = "MEASURED", "PLANNED"  # instead of a strategy: by whole steps at start (runtime/strategy.py), or by sizes
EXCHANGE_DTYPES = ("float24", "float32")
P2P_LEVELS = ("LOC", "NVL", "PIX", "PXB", "PHB", "SYS")  # NCCL's words, the strictest first
_P2P_NUMBERS = ("LOC", "PIX", "PXB", "PHB", "SYS")  # NCCL's older form of them


def _both(by_kind: dict[str, Any]) -> str:
    return f"{by_kind['cuda']} (sim: {by_kind['sim']})"


def setting(default: Any, text: str, *, flags: tuple[str, ...] = (), environment: tuple[str, ...] = ()) -> Any:
    """A field of a configuration: `text` says what it is; more `flags` and variables beside its own --name and IMEX_NAME."""
    return field(default=default, metadata={"text": text, "flags": flags, "environment": environment})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine; None means that a value is chosen from model and machine.

    Raises ValueError for values that are not allowed; nothing is read or started here.
    """

    model: str = setting(MISSING, "a Hugging Face folder, a GGUF file, a Hub name in the local cache, or smollm2")
    tensor_parallel_size: int = setting(1, "ranks", flags=("--tp",), environment=("NIM_TENSOR_PARALLEL_SIZE",))
    device: str = setting("auto", "auto, cuda, sim, or with ordinals: cuda:0 puts all ranks on one GPU")
    max_model_len: int | None = setting(
        None, f"positions of a sequence, prompt included; else the model's, at most {_both(DEFAULT_MAX_MODEL_LEN)}"
    )
    max_num_seqs: int | None = setting(None, f"sequences resident at once; else {DEFAULT_MAX_NUM_SEQS}")
    max_rows: int | None = setting(
        None, f"rows of a step, decode and prompt rows together; else what fits, at most {DEFAULT_MAX_ROWS}"
    )
    kv_cache_memory_bytes: int | None = setting(
        None, "KV cache of a rank, in bytes; else as much as the sequences can use, at most what is free (sim: 2 GiB)"
    )
    enable_prefix_caching: bool = setting(
        True, "KV pages of earlier requests stand for a prompt's beginning where tokens are equal"
    )
    load_format: str = setting("auto", "auto, or dummy for random weights")
    seed: int = setting(0, "seed of dummy weights; of drawn tokens too, where `generate` is given it")
    exchange: str | None = setting(
        None,
        f"all-reduce strategy of every step: {', '.join(STRATEGIES)}; {PLANNED}: by size; {MEASURED}: what takes least here, timed once "
        f"at start; else {MEASURED} on GPUs, {PLANNED} in the simulator",
    )
    exchange_dtype: str = setting(
        "float24",
        "what partial sums are exchanged as: float24, rounded to 16 significant bits, two in a word; or float32, twice the bytes",
    )
    deadline_s: float | None = setting(None, f"seconds that a wait of the kernel may take; else {_both(DEFAULT_DEADLINE_S)}")
    trace_events: int = setting(0, "events that each of a block's trace rings holds, a power of two; 0 compiles tracing out")
    trace_every: int = setting(1, "one step of so many is traced")
    p2p_level: str | None = setting(
        None,
        "how near GPUs must be to exchange, NCCL's words: NVL refuses pairs without NVLink, LOC every pair",
        environment=("NCCL_P2P_LEVEL",),
    )

    @property
    def strategy(self) -> abi.Strategy | None:
        """The strategy that was asked for by name."""
        return abi.Strategy[self.exchange] if self.exchange in STRATEGIES else None

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
        _integer("trace_events", self.trace_events, 0, 1 << 20)
        _integer("trace_every", self.trace_every, 1, 1 << 20)
        if not isinstance(self.enable_prefix_caching, bool):
            raise ValueError(f"enable_prefix_caching is {self.enable_prefix_caching!r}: True or False is allowed")
        if self.trace_events & (self.trace_events - 1):
            raise ValueError(f"trace_events is {self.trace_events}: 0 or a power of two is allowed")
        _one_of("load_format", self.load_format, LOAD_FORMATS)
        if self.exchange is not None:
            _one_of("exchange", self.exchange, (*STRATEGIES, PLANNED, MEASURED))
        _one_of("exchange_dtype", self.exchange_dtype, EXCHANGE_DTYPES)
        if self.p2p_level is not None:
            object.__setattr__(self, "p2p_level", _p2p_level(self.p2p_level))
            _one_of("p2p_level", self.p2p_level, P2P_LEVELS)
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


def _p2p_level(given: Any) -> Any:
    """NCCL's word for `given`: any case, or one of its older numbers."""
    text = str(given).strip().upper()
    return _P2P_NUMBERS[min(int(text), len(_P2P_NUMBERS) - 1)] if text.isascii() and text.isdigit() else text
