"""From settings, model and machine to the Shape: how many rows, slots and pages."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np

from imex_persist import abi, planner
from imex_persist.config import DEFAULT_MAX_MODEL_LEN, DEFAULT_MAX_NUM_SEQS, DEFAULT_MAX_ROWS, EngineConfig
from imex_persist.model import packing

SIM_KV_BYTES = 2 << 30  # of a simulated rank's KV cache, where kv_cache_memory_bytes is not given
MIN_MODEL_LEN = 2  # that EngineConfig allows
RESERVE_BYTES = 1 << 30  # of a GPU's free memory, left for the kernel's module and for pieces of weights while they are loaded


def shared_machine(machines: list[planner.Machine], ranks_each: int) -> planner.Machine:
    """What every rank can count on: the smallest of the machines, its blocks and its memory's bandwidth divided among its ranks."""
    least = planner.Machine(**{name: min(asdict(m)[name] for m in machines) for name in asdict(machines[0])})
    return replace(least, num_blocks=least.num_blocks // ranks_each, memory_tb_s=least.memory_tb_s / ranks_each)


def choose_shape(
    config: EngineConfig,
    model,
    machine: planner.Machine,
    kind: str,
    free_bytes: int | None = None,
    **fixed,
) -> np.void:
    """The Shape for `model` (a ModelConfig) on `machine`, of whose memory a rank may take `free_bytes` (None: nobody has looked);
    `fixed` is for planner.make_shape, where the plan's own is not wanted.

    The KV cache is what all sequences can use at their longest, at most what `kv_cache_memory_bytes` or the memory allows; it holds at
    least one sequence of max_model_len. Raises ValueError for settings that do not fit, saying what would.
    """
    max_model_len = choose_max_model_len(config, model, kind)
    num_slots = config.max_num_seqs or DEFAULT_MAX_NUM_SEQS
    options = {
        "world_size": config.tensor_parallel_size,
        "num_slots": num_slots,
        "max_model_len": max_model_len,
        "machine": machine,
        "strategy": config.strategy,
        "float24_partials": config.exchange_dtype == "float24",
        "trace": config.trace_events,
        "trace_every": config.trace_every,
    }
    shape = _fit_rows(config, model, options | fixed)
    page_total = planner.kv_bytes(shape) // int(shape["num_pages"])  # one page of every layer and KV head
    budget = config.kv_cache_memory_bytes or (SIM_KV_BYTES if kind == "sim" else None)
    need = int(shape["pages_per_slot"])
    if kind == "sim" and config.kv_cache_memory_bytes is None and config.max_model_len is not None:
        budget = max(budget, need * page_total)  # asked for, so it is worth more than the default budget
    advice = "raise kv_cache_memory_bytes"
    if free_bytes is not None:
        room = free_bytes - RESERVE_BYTES - sum(fixed_bytes(model, shape).values())
        if room < (config.kv_cache_memory_bytes or page_total):
            raise ValueError(_too_large(config, model, shape, free_bytes))
        if budget is None:
            budget, advice = room, "use more ranks"
    pages = int(shape["num_pages"]) if budget is None else min(int(shape["num_pages"]), budget // page_total)
    if pages < need:
        fits = pages * int(shape["page_size"])
        shorter = f"set max_model_len to at most {fits}, or " if fits >= MIN_MODEL_LEN else ""
        raise ValueError(
            f"a sequence of max_model_len {max_model_len} needs {need * page_total} bytes of KV cache a rank but only {budget} are "
            f"{'free' if advice == 'use more ranks' else 'allowed'}: {shorter}{advice}"
        )
    shape["num_pages"] = pages
    return shape


def fixed_bytes(model, shape: np.void) -> dict[str, int]:
    """What a rank allocates (runtime/rank.py) beside KV pages."""
    return {
        "weight_bytes": sum(packing.rank_bytes(model, shape).values()),
        "symmetric_bytes": int(shape["symmetric_words"]) * 8,
        "table_bytes": 4 * planner.num_claims(shape) + sum(planner.sampler_bytes(shape).values()),
    }


def _too_large(config: EngineConfig, model, shape: np.void, free_bytes: int) -> str:
    fixed, kv = sum(fixed_bytes(model, shape).values()), config.kv_cache_memory_bytes
    more = f" and {kv / 2**30:.1f} GiB for KV pages" if kv else ""
    return (
        f"a rank of {int(shape['world_size'])} needs {fixed / 2**30:.1f} GiB for weights and words{more}, with {RESERVE_BYTES / 2**30:g} "
        f"to spare, but may have {free_bytes / 2**30:.1f} GiB of its GPU: use more ranks"
        + (", or lower kv_cache_memory_bytes" if kv else "")
    )


def choose_max_model_len(config: EngineConfig, model, kind: str) -> int:
    """Raises ValueError when more positions are asked for than the model was made for."""
    limit = int(model.max_position_embeddings)
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ValueError(f"max_model_len is {config.max_model_len} but the model has {limit} positions: use at most {limit}")
    return config.max_model_len or min(limit, DEFAULT_MAX_MODEL_LEN[kind])


def _fit_rows(config: EngineConfig, model, options: dict) -> np.void:
    if config.max_rows is not None:
        options = {"max_rows": config.max_rows, **options}
    if "max_rows" in options:
        return planner.make_shape(model, **options)
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
