"""From settings, model and machine to the Shape: how many rows, slots and pages."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np

from imex_persist import abi, planner
from imex_persist.config import DEFAULT_MAX_MODEL_LEN, DEFAULT_MAX_NUM_SEQS, DEFAULT_MAX_ROWS, EngineConfig

KV_DEFAULT_BYTES = {"cuda": 16 << 30, "sim": 2 << 30}  # per rank, where kv_cache_memory_bytes is not given


def shared_machine(machines: list[planner.Machine], ranks_each: int) -> planner.Machine:
    """What every rank can count on: the smallest of the machines, its blocks divided among its ranks."""
    least = planner.Machine(**{name: min(asdict(m)[name] for m in machines) for name in asdict(machines[0])})
    return replace(least, num_blocks=least.num_blocks // ranks_each)


def choose_shape(
    config: EngineConfig, model, machine: planner.Machine, kind: str, exchange: tuple[int, abi.Strategy] | None = None
) -> np.void:
    """The Shape for `model` (a ModelConfig) on `machine`; `exchange` is (one_shot_rows, strategy) where that was measured.

    Raises ValueError for settings that do not fit, saying what would.
    """
    max_model_len = choose_max_model_len(config, model, kind)
    num_slots = config.max_num_seqs or DEFAULT_MAX_NUM_SEQS
    options = {
        "world_size": config.tensor_parallel_size,
        "num_slots": num_slots,
        "max_model_len": max_model_len,
        "machine": machine,
        "strategy": None if config.exchange is None else abi.Strategy[config.exchange],
        "bf16_partials": config.exchange_dtype == "bfloat16" and config.tensor_parallel_size > 1,
        "trace": config.trace_events,
        "trace_every": config.trace_every,
    }
    if exchange is not None:
        options["one_shot_rows"], options["strategy"] = exchange
    shape = _fit_rows(config, model, options)
    page_total = planner.kv_bytes(shape) // int(shape["num_pages"])  # one page of every layer and KV head
    budget = config.kv_cache_memory_bytes or KV_DEFAULT_BYTES[kind]
    pages = min(int(shape["num_pages"]), budget // page_total)
    need = int(shape["pages_per_slot"])
    if pages < need and config.kv_cache_memory_bytes is None and config.max_model_len is not None:
        pages = need  # asked for, so it is worth more than the default budget
    if pages < need:
        fits = pages * int(shape["page_size"])
        raise ValueError(
            f"a sequence of max_model_len {max_model_len} needs {need * page_total} bytes of KV cache a rank but only {budget} are "
            f"allowed: set max_model_len to at most {fits}, or raise kv_cache_memory_bytes"
        )
    shape["num_pages"] = pages
    return shape


def choose_max_model_len(config: EngineConfig, model, kind: str) -> int:
    """Raises ValueError when more positions are asked for than the model was made for."""
    limit = int(model.max_position_embeddings)
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ValueError(f"max_model_len is {config.max_model_len} but the model has {limit} positions: use at most {limit}")
    return config.max_model_len or min(limit, DEFAULT_MAX_MODEL_LEN[kind])


def _fit_rows(config: EngineConfig, model, options: dict) -> np.void:
    if config.max_rows is not None:
        return planner.make_shape(model, max_rows=config.max_rows, **options)
    for rows in range(DEFAULT_MAX_ROWS, 0, -1):
        try:
            return planner.make_shape(model, max_rows=rows, **options)
        except ValueError:
            if rows == 1:
                raise
    raise AssertionError("unreachable")


def to_fields(shape: np.void) -> dict[str, int | float]:
    """A Shape as JSON fields."""
    return {name: shape[name].item() for name in shape.dtype.names}


def from_fields(fields: dict[str, int | float]) -> np.void:
    """The Shape from `to_fields`. Raises ValueError when the names differ: the two sides are of different versions."""
    if set(fields) != set(abi.Shape.names):
        raise ValueError(f"a shape with fields {sorted(set(fields) ^ set(abi.Shape.names))} missing or unknown was sent")
    shape = np.zeros((), abi.Shape)
    for name, value in fields.items():
        shape[name] = value
    return shape[()]
