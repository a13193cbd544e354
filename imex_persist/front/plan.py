"""`imex-persist plan`: what a model needs on a card and how fast it can be at best, from the functions that the runtime plans with.

Nothing is started and no weight is read: config.json or a GGUF file's header is enough.
"""

from __future__ import annotations

import argparse
import json
import math

import numpy as np

from imex_persist import abi, planner
from imex_persist.config import DEFAULT_MAX_NUM_SEQS, EngineConfig
from imex_persist.front import settings
from imex_persist.front.cards import CARDS, CONTEXT_BYTES, Card, choose_card, exchange_us
from imex_persist.model import packing
from imex_persist.model.config import ModelConfig
from imex_persist.model.load import load_model
from imex_persist.model.weights import tensor_shapes
from imex_persist.runtime import capacity
from imex_persist.runtime import strategy as strategies
from imex_persist.runtime.discover import find_gpus

CONTEXTS = (128, 2048)  # those of them that max_model_len allows
ROWS = (1, 2, 4, 8, 16)
STREAMED = ("qkv", "o_proj", "gate_up", "down_proj", "lm_head", "norms")  # read whole in every decode step


def run(args: argparse.Namespace) -> int:
    """The command."""
    card, why = choose_card(args.gpu, [] if args.gpu else find_gpus())
    plan = make_plan(settings.require_model(args), card, why, settings.chosen(args), args.context)
    if args.json:
        print(json.dumps(plan))
    else:
        from imex_persist.front.plan_text import print_plan

        print_plan(plan)
    return 0


def make_plan(model: str, card: Card, why: str, given: dict, contexts: list[int] | None = None) -> dict:
    """The plan as JSON. `given` are EngineConfig's settings; a tensor_parallel_size of None is the smallest that fits. `contexts` are
    positions before a step; None: usual ones.

    Raises ValueError for a model that cannot be read, settings that are not allowed, and a plan that does not fit.
    """
    opened = load_model(model, "dummy", tokenizer=False)
    settings_ = {name: value for name, value in given.items() if value is not None}
    sizes = [
        _size(EngineConfig(model=model, **{**settings_, "tensor_parallel_size": n}), opened.config, card) for n in _worlds()
    ]
    needed = next((size["tensor_parallel_size"] for size in sizes if size["possible"]), None)
    world = given.get("tensor_parallel_size") or needed
    if world is None:
        raise ValueError(f"{opened.name} does not fit {abi.MAX_RANKS} ranks of {card.name}: {sizes[-1]['why_not']}")
    config = EngineConfig(model=model, **{**settings_, "tensor_parallel_size": world})
    try:
        shape = _shape(config, opened.config, card)
    except ValueError as error:
        if needed is None or needed <= world:
            raise
        raise ValueError(f"{error}; use tensor_parallel_size {needed}") from None
    limit = capacity.choose_max_model_len(config, opened.config, "cuda")
    for context in (contexts := contexts or [c for c in CONTEXTS if c <= limit] or [limit]):
        if not 1 <= context <= limit:
            raise ValueError(f"context is {context}: 1 to max_model_len, {limit}, is allowed")
    return {
        "model": _model(opened.name, opened.config),
        "gpu": _card(card, why),
        "tensor_parallel_size": world,
        "tensor_parallel_size_needed": needed,
        "tensor_parallel_sizes": sizes,
        "memory": _memory(opened.config, shape, card, limit),
        "kernel": _kernel(config, opened.config, shape, card, limit),
        "exchange": _exchange(shape),
        "floor": [_floor(opened.config, shape, card, context) for context in contexts],
    }


def _worlds() -> range:
    return range(1, abi.MAX_RANKS + 1)


def bytes_per_token(config: ModelConfig, shape: np.void, context: int) -> int:
    """Bytes that one rank reads in a decode step of one row after `context` positions."""
    sizes = packing.rank_bytes(config, shape)
    return sum(sizes[name] for name in STREAMED) + context * kv_bytes_per_token(shape)


def kv_bytes_per_token(shape: np.void) -> int:
    """Bytes of one position's keys and values in one rank."""
    return planner.kv_bytes(shape) // (int(shape["num_pages"]) * int(shape["page_size"]))


def floor_ms(config: ModelConfig, shape: np.void, card: Card, context: int) -> float:
    """No version can be faster: bytes that must be read ÷ what the card's memory gives."""
    return bytes_per_token(config, shape, context) / card.bandwidth_tb_s / 1e9


# -------------------------------------------------------------------------------------------------- parts
def _model(name: str, config: ModelConfig) -> dict:
    shapes = tensor_shapes(config)
    names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size"
    return {
        "name": name,
        "architecture": config.architecture,
        **{field: getattr(config, field) for field in names.split()},
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "weight_bytes": 2 * sum(math.prod(shape) for shape in shapes.values()),
        "dtype": "bfloat16",
    }


def _card(card: Card, why: str) -> dict:
    return {
        "key": card.key,
        "name": card.name,
        "why": why,
        "compute_capability": ".".join(map(str, card.capability)),
        "num_blocks": card.machine.num_blocks,
        "shared_memory_bytes": card.machine.shared_memory_bytes,
        "memory_bytes": card.memory_bytes,
        "bandwidth_tb_s": card.bandwidth_tb_s,
        "bandwidth_source": card.bandwidth_source,
        "nvlink_gb_s_each_way": card.nvlink_gb_s,
    }


def _size(config: EngineConfig, model: ModelConfig, card: Card) -> dict:
    """One row of the table of tensor-parallel sizes."""
    world = config.tensor_parallel_size
    out: dict = {"tensor_parallel_size": world, "possible": False, "why_not": None}
    try:
        shape = _shape(config, model, card)
    except ValueError as error:
        return {**out, "why_not": str(error)}
    _, kv_heads = planner.heads_per_rank(model, world)
    return {
        **out,
        "possible": True,
        "weight_bytes": sum(packing.rank_bytes(model, shape).values()),
        "padded_kv_heads": kv_heads * world - model.num_key_value_heads,
        "max_rows": int(shape["max_rows"]),
        "floor_ms": floor_ms(model, shape, card, 0),
    }


def _shape(config: EngineConfig, model: ModelConfig, card: Card) -> np.void:
    """The runtime's, on a card that nobody else uses."""
    return capacity.choose_shape(config, model, card.machine, "cuda", card.memory_bytes - CONTEXT_BYTES)


def _memory(config: ModelConfig, shape: np.void, card: Card, max_model_len: int) -> dict:
    spared = {"context_bytes": CONTEXT_BYTES, "reserve_bytes": capacity.RESERVE_BYTES}
    fixed, per_token = capacity.fixed_bytes(config, shape) | spared, kv_bytes_per_token(shape)
    page = planner.kv_bytes(shape) // int(shape["num_pages"])
    room = card.memory_bytes - sum(fixed.values())
    return {
        **fixed,
        "weights": packing.rank_bytes(config, shape),
        "kv_bytes_per_token": per_token,
        "max_model_len": max_model_len,
        "max_num_seqs": int(shape["num_slots"]),
        "kv_bytes_wanted": page * int(shape["pages_per_slot"]) * int(shape["num_slots"]),  # every sequence at its longest
        "kv_bytes_planned": planner.kv_bytes(shape),
        "kv_tokens_planned": int(shape["num_pages"]) * int(shape["page_size"]),
        "kv_bytes_room": room,
        "kv_tokens_room": room // page * int(shape["page_size"]),
    }


def _kernel(config: EngineConfig, model: ModelConfig, shape: np.void, card: Card, max_model_len: int) -> dict:
    names = "num_blocks max_rows ring_stages window down_slices one_shot_rows max_splits page_size num_pages smem_bytes"
    return {
        **{name: int(shape[name]) for name in names.split()},
        "strategy": abi.Strategy(int(shape["strategy"])).name,
        "by_rows": [_rows(config, model, card, rows, max_model_len) for rows in ROWS],
    }


def _rows(config: EngineConfig, model: ModelConfig, card: Card, rows: int, max_model_len: int) -> dict:
    slots = config.max_num_seqs or DEFAULT_MAX_NUM_SEQS
    sizes = {"world_size": config.tensor_parallel_size, "max_rows": rows, "num_slots": slots, "max_model_len": max_model_len}
    try:
        shape = planner.make_shape(
            model, **sizes, machine=card.machine, strategy=config.strategy, float24_partials=config.exchange_dtype == "float24"
        )
    except ValueError as error:
        return {"rows": rows, "fits": False, "why_not": str(error)}
    exchanged = config.tensor_parallel_size > 1
    return {
        "rows": rows,
        "fits": True,
        "ring_stages": int(shape["ring_stages"]),
        "down_slices": int(shape["down_slices"]),
        "smem_bytes": int(shape["smem_bytes"]),
        "strategy": strategies.strategy_of(shape, rows) if exchanged else None,
    }


def _exchange(shape: np.void) -> dict | None:
    """What crosses NVLink in a step of one row, and what that took where it was measured; None on one rank."""
    world, layers, slices = (int(shape[name]) for name in ("world_size", "num_layers", "down_slices"))
    if world == 1:
        return None
    strategy = strategies.strategy_of(shape, 1)
    sums = int(shape["hidden_size"]) * 4
    times = [exchange_us(strategy, nbytes, world) for nbytes in (sums, sums * slices)]
    if not shape["float24_partials"]:
        times = [None, None]
    known = None not in times
    of = "" if shape["float24_partials"] else " and float32"
    # a wide word carries two sums in 8 bytes, a tagged one one, and SEMAPHORE's values are plain, with a signal for each eight of them; a
    # slice owner in another rank (TWO_SHOT) takes less, by its own rule
    each = 1.25 if strategy == "SEMAPHORE" else 1 if shape["float24_partials"] else 2
    words = round((world - 1) * (sums + sums * slices) * layers * each)
    return {
        "strategy": strategies.describe(shape, "planned"),
        "decode_strategy": strategy,
        "exchanges_per_token": 2 * layers,
        "o_proj_bytes": sums,
        "down_proj_bytes": sums * slices,
        "nvlink_bytes_per_token": None if strategy == "TWO_SHOT" else words,
        "o_proj_us": times[0],
        "down_proj_us": times[1],
        "ms_per_token": layers * sum(times) / 1e3 if known else None,
        "source": f"measured alone on two {CARDS['h200'].name}s" if known else f"not measured for {world} ranks{of}",
    }


def _floor(config: ModelConfig, shape: np.void, card: Card, context: int) -> dict:
    return {
        "context": context,
        "bytes_per_token": bytes_per_token(config, shape, context),
        "ms_per_token": floor_ms(config, shape, card, context),
        "tokens_per_second": 1e3 / floor_ms(config, shape, card, context),
        "bandwidth": f"{card.bandwidth_tb_s} TB/s {card.bandwidth_source}",
    }
