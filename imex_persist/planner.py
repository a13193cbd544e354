"""The plan: from a model, a number of ranks and a machine to the sizes every kernel is built with (abi.Shape).

What limits a plan is shared memory. A block holds the activations of all rows of a step beside the ring of weight tiles, so more
rows mean fewer tiles; down_proj, the widest, may be split along K into slices, each served by its own blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from imex_persist import abi

MAX_USEFUL_STAGES = 14  # more do not fit beside a model's activations
MIN_STAGES = 4  # that are looked at and given back at once: two groups of two tiles (take_ahead in cuda_src/stream.cuh)
ONE_SHOT_SUMS = 8192  # partial sums, a word each or two, that a block can add in one shot before a slice owner is faster
LONG_UNIT_TILES = 7  # a unit of down_proj that is longer should be cut (docs/performance.md)
SHORT_LAYER_US = 16.0  # of reading a layer's weights: below it two tiles in flight are better (docs/performance.md)
LATENCY_US = 1.1  # of a bulk copy from memory that others are using too
USUAL_WINDOW = 3  # tiles in flight where the memory is not known
QUERIES = 16  # of an item of attention: twice the tensor core's n = 8 (kMaxHeads in cuda_src/phases/attention.cuh)
PARTIAL_GROUP = 128  # partial sums that lie together, halves of quads apart (part_index in cuda_src/exchange.cuh)
MAX_OWN_TOKENS = 1 << 17  # tokens of a block are counted in 17 bits (kCountBits in cuda_src/search.cuh)
EXCHANGES_A_STEP = 127  # that `bench exchange` counts as layers of a step
EXCHANGE_STEPS = 256  # after which its epochs begin again, below 2**16
H100_SMS = 132
H100_SHARED_BYTES = 232_448


@dataclass(frozen=True)
class Machine:
    """One GPU, or the simulator's idea of one: blocks of a rank, the shared memory a block may take, in bytes, and the rank's share of the
    memory's bandwidth by its data sheet, in TB/s (0: not known). On a GPU the header of shared memory is as large as the shape needs; the
    simulator's kernel, built for all shapes, has the largest."""

    num_blocks: int = H100_SMS
    shared_memory_bytes: int = H100_SHARED_BYTES
    max_stages: int = MAX_USEFUL_STAGES
    memory_tb_s: float = 0.0
    exact_header: bool = False


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def heads_per_rank(config, world_size: int) -> tuple[int, int]:
    """(query heads, KV heads) of every rank: whole KV groups, padded with zero groups where they do not divide."""
    kv = -(-config.num_key_value_heads // world_size)
    return kv * (config.num_attention_heads // config.num_key_value_heads), kv


def page_size_of(head_dim: int) -> int:
    """Positions of a KV page: as many whole chunks of 32 as fit a ring stage, keys and values together."""
    return abi.CHUNK * max(1, abi.STAGE_BYTES // (abi.CHUNK * head_dim * 4))


def make_shape(
    config,
    *,
    world_size: int = 1,
    max_rows: int = 1,
    num_slots: int = 1,
    max_model_len: int = 4096,
    num_pages: int | None = None,
    machine: Machine = Machine(),
    strategy: abi.Strategy | None = None,
    down_slices: int | None = None,
    one_shot_rows: int | None = None,
    attention_rows: int = QUERIES,
    float24_partials: bool = False,
    tap: bool = False,
    only_phase: abi.Phase | None = None,
    only_layer: int = 0,
    trace: int = 0,
    trace_every: int = 1,
) -> np.void:
    """The Shape record for `config` (a model.config.ModelConfig) on `world_size` ranks.

    Raises ValueError, saying what was asked and what would fit, when shared memory or a limit of the kernel does not allow it.
    """
    if not 1 <= world_size <= abi.MAX_RANKS:
        raise ValueError(f"tensor_parallel_size {world_size} is not supported: 1 to {abi.MAX_RANKS} ranks are")
    if not 1 <= max_rows <= abi.MAX_ROWS:
        raise ValueError(f"{max_rows} rows a step are not supported: 1 to {abi.MAX_ROWS} are")
    if not 1 <= num_slots <= abi.MAX_SLOTS:
        raise ValueError(f"max_num_seqs {num_slots} is not supported: 1 to {abi.MAX_SLOTS} are")
    s = np.zeros((), abi.Shape)
    hidden = round_up(config.hidden_size, 32)
    head_dim = round_up(config.head_dim, 32)
    heads, kv_heads = heads_per_rank(config, world_size)
    num_blocks = min(machine.num_blocks, hidden // abi.UNIT_ROWS)  # every block publishes in o_proj and down_proj
    page = page_size_of(head_dim)
    pages_per_slot = -(-max_model_len // page)
    s["hidden_size"], s["norm_size"], s["num_layers"] = hidden, config.hidden_size, config.num_hidden_layers
    s["num_heads"], s["num_kv_heads"], s["head_dim"] = heads, kv_heads, head_dim
    s["vocab_rows"] = round_up(-(-config.vocab_size // world_size), abi.UNIT_ROWS)
    s["vocab_size"] = config.vocab_size
    s["rms_eps"], s["attn_scale"] = config.rms_norm_eps, config.head_dim**-0.5
    s["world_size"], s["num_blocks"] = world_size, num_blocks
    s["max_rows"], s["num_slots"] = max_rows, num_slots
    epochs_per_step = max(config.num_hidden_layers + 2, abi.SEARCH_ROUNDS)
    wide = float24_partials and strategy != abi.Strategy.SEMAPHORE
    epoch_bits = 16 if wide else 32  # what the narrowest word has of an epoch (cuda_src/words.cuh)
    s["renew_steps"] = 1 << epoch_bits - epochs_per_step.bit_length()  # most that leave every epoch below that
    s["page_size"], s["pages_per_slot"] = page, pages_per_slot
    s["num_pages"] = num_pages if num_pages is not None else pages_per_slot * num_slots
    s["max_splits"] = max(1, min(abi.MAX_SPLITS, num_blocks // kv_heads))
    s["float24_partials"] = float24_partials
    s["tap"] = tap
    s["only_phase"] = 0 if only_phase is None else 1 + only_phase
    s["only_layer"] = only_layer
    s["trace"], s["trace_every"] = trace, trace_every
    default = abi.Strategy.TWO_SHOT if world_size > 2 else abi.Strategy.ONE_SHOT_LOCAL
    s["strategy"] = default if strategy is None else strategy

    choices = (1, 2, 4, 8) if down_slices is None else (down_slices,)
    best = None
    for slices in choices:
        if slices > num_blocks:
            continue
        candidate = s.copy()
        _place_shared_memory(candidate, config.intermediate_size, slices, one_shot_rows, strategy, machine, attention_rows)
        if best is None or candidate["ring_stages"] > best["ring_stages"] or _finer_slices_help(best):
            best = candidate
        if candidate["ring_stages"] >= min(8, machine.max_stages) and not _finer_slices_help(candidate):
            break
    if best is None or best["ring_stages"] < MIN_STAGES:
        fits = [r for r in range(max_rows - 1, 0, -1) if _rows_fit(config, world_size, r, machine, strategy)]
        advice = f"at most {fits[0]} fit" if fits else "not even one fits; use more ranks"
        raise ValueError(
            f"{max_rows} rows a step of hidden size {config.hidden_size} and intermediate size {config.intermediate_size} on "
            f"{world_size} rank(s) leave no room for the weight ring in {machine.shared_memory_bytes} bytes of shared memory: {advice}"
        )
    if own_tokens(best) >= MAX_OWN_TOKENS:
        raise ValueError(
            f"a vocabulary of {config.vocab_size} on {world_size} rank(s) of {num_blocks} blocks is not supported: a block looks after "
            f"{own_tokens(best)} tokens and at most {MAX_OWN_TOKENS - 1} are allowed; use more ranks"
        )
    best["window"] = _window(best, machine)
    assert world_size * num_blocks <= abi.DRAW_ROW_BYTES - 256, "merge_parts in cuda_src/logprobs.cuh keeps a byte for each"
    _place_symmetric_memory(best)
    return best


def _window(s, machine: Machine) -> int:
    """Tiles in flight a block that keep the memory busy, within a tenth; more would only queue in front of everybody's words. Two at
    least: a group of two tiles waits for both. Two where a layer has so few weights that it is the words that are waited for."""
    hidden, heads = int(s["hidden_size"]), int(s["head_dim"]) * (2 * int(s["num_heads"]) + 2 * int(s["num_kv_heads"]))
    tile = min(abi.STAGE_BYTES, 2 * abi.UNIT_ROWS * hidden)
    needed = machine.memory_tb_s * 1e6 * LATENCY_US / int(s["num_blocks"]) / tile if machine.memory_tb_s else USUAL_WINDOW
    layer_bytes = 2 * hidden * (heads + 3 * int(s["intermediate_size"]))
    if layer_bytes < machine.memory_tb_s * 1e6 * SHORT_LAYER_US:
        needed = 2
    return min(max(2, math.ceil(needed - 0.1)), int(s["ring_stages"]) - 1)


def _finer_slices_help(s) -> bool:
    """Whether twice the slices of down_proj are better. Blocks should end together, which they do not where units are long; and with many
    rows, with blocks enough to be dealt evenly, each gathers half of the activations then. Not if it costs a step of one row
    the single hop of its exchange, and not where every block adds all sources in every step."""
    slices, world, rows = int(s["down_slices"]), int(s["world_size"]), int(s["max_rows"])
    tiles, words = int(s["intermediate_size"]) / slices / abi.TILE_K, int(s["hidden_size"]) * world * slices
    if words <= ONE_SHOT_SUMS < 2 * words:
        return False
    whole = s["strategy"] == abi.Strategy.SEMAPHORE or s["one_shot_rows"] == rows
    crosses = world > 1 and 2 * words > ONE_SHOT_SUMS  # a slice's partial sums cost the links as much as a rank's
    gathers_less = rows > abi.FEW_ROWS and not whole and not crosses and s["num_blocks"] >= 16 * slices and tiles >= 2
    return tiles > LONG_UNIT_TILES or gathers_less


def exchange_shape(
    hidden_size: int,
    *,
    world_size: int,
    max_rows: int,
    machine: Machine,
    strategy: abi.Strategy,
    down_slices: int = 1,
    float24_partials: bool = False,
) -> np.void:
    """As much of a Shape as cuda_src/bench/exchange.cu uses: every step exchanges by `strategy`, and nothing is streamed.

    Raises ValueError when a block's shared memory does not hold that many rows.
    """
    s = np.zeros((), abi.Shape)
    s["hidden_size"], s["norm_size"], s["num_layers"], s["head_dim"] = hidden_size, hidden_size, EXCHANGES_A_STEP, 32
    s["renew_steps"] = EXCHANGE_STEPS
    s["num_heads"] = s["num_kv_heads"] = s["ring_stages"] = s["window"] = s["num_slots"] = s["max_splits"] = 1
    # every block sends something, also where ranks gather parts of a vector
    s["num_blocks"] = min(machine.num_blocks, hidden_size // max(abi.UNIT_ROWS, 2 * world_size))
    s["world_size"], s["max_rows"] = world_size, max_rows
    s["strategy"], s["float24_partials"] = strategy, float24_partials
    _place_shared_memory(s, 32 * world_size, down_slices, None, strategy, machine)
    s["smem_bytes"] = s["smem_ring"]
    if s["smem_bytes"] > machine.shared_memory_bytes:
        raise ValueError(
            f"{max_rows} rows of hidden size {hidden_size} need {s['smem_bytes']} bytes of shared memory to exchange {strategy.name}, "
            f"and a block has {machine.shared_memory_bytes}: use fewer rows or another strategy"
        )
    s["ring_stages"] = 1
    _place_symmetric_memory(s)
    return s[()]


def _rows_fit(config, world_size: int, rows: int, machine: Machine, strategy: abi.Strategy | None) -> bool:
    try:
        make_shape(config, world_size=world_size, max_rows=rows, machine=machine, strategy=strategy)
    except ValueError:
        return False
    return True


def _place_shared_memory(
    s,
    intermediate_size: int,
    slices: int,
    one_shot_rows: int | None,
    strategy: abi.Strategy | None,
    machine: Machine,
    attention_rows: int = QUERIES,
) -> None:
    rows, hidden, world, blocks = (int(s[k]) for k in ("max_rows", "hidden_size", "world_size", "num_blocks"))
    heads, kv_heads, head_dim = (int(s[k]) for k in ("num_heads", "num_kv_heads", "head_dim"))
    s["down_slices"] = slices
    s["intermediate_size"] = round_up(-(-intermediate_size // world), 32 * slices)
    semaphore = strategy == abi.Strategy.SEMAPHORE  # its plain values lie where words would: never both
    if (one_shot_rows is None or semaphore) and strategy is not None:  # asked for by name
        one_shot_rows = rows if strategy == abi.Strategy.ONE_SHOT else 0
    if one_shot_rows is None:
        one_shot_rows = min(rows, ONE_SHOT_SUMS // (hidden * world * slices))
    s["one_shot_rows"] = min(rows, one_shot_rows)
    owned = 4 * -(-(hidden // 4) // blocks)  # values of the residual that a slice owner keeps, at most
    replicated = rows if semaphore else int(s["one_shot_rows"])
    widest = max(hidden, heads * head_dim, int(s["intermediate_size"]) // slices)
    group = min(heads // kv_heads, QUERIES)
    header = header_bytes(rows, int(s["num_slots"]), machine.max_stages) if machine.exact_header else abi.SHARED_HEADER_BYTES
    needed = max(rows * widest * 2, rows * abi.DRAW_ROW_BYTES)

    def place(together: int) -> int:
        """Offsets, if attention takes so many rows of a sequence together. Returns the stages that are left for the ring."""
        s["attention_rows"], s["scratch_warps"] = together, 0
        queries = together * group
        if _attention_bytes(head_dim, queries) > needed:
            s["scratch_warps"] = min(abi.CONSUMER_WARPS, abi.STAGE_BYTES // (queries * (head_dim + abi.MERGE_EXTRA) * 4))
        offset = header
        for field, size in (
            ("smem_x", max(needed, _attention_bytes(head_dim, queries, int(s["scratch_warps"])))),
            ("smem_part", abi.PART_SLOTS * abi.CONSUMER_WARPS * rows * abi.UNIT_ROWS * 4),
            ("smem_residual", max(replicated * hidden, rows * owned) * 4),
            ("smem_rope", rows * head_dim * 4),
            ("smem_ring", 0),
        ):
            s[field] = offset
            offset = round_up(offset + size, 128)
        stages = max(0, min(machine.shared_memory_bytes - offset, machine.max_stages * abi.STAGE_BYTES)) // abi.STAGE_BYTES
        s["ring_stages"] = min(stages, abi.MAX_STAGES)
        s["smem_bytes"] = offset + int(s["ring_stages"]) * abi.STAGE_BYTES
        return int(s["ring_stages"])

    most = place(1)
    for together in range(min(rows, QUERIES // group, attention_rows), 0, -1):  # as many as cost no stage
        if place(together) == most:
            break


def _attention_bytes(head_dim: int, queries: int, scratch_warps: int = 0) -> int:
    """Of what attention keeps in place of the activations: q, and the results of warps that have no place elsewhere."""
    return 2 * head_dim * queries + (abi.CONSUMER_WARPS - scratch_warps) * queries * (head_dim + abi.MERGE_EXTRA) * 4


def header_bytes(rows: int, slots: int, stages: int) -> int:
    """What struct Shared takes in a kernel of that many rows, slots and, at most, stages (cuda_src/block.cuh checks it)."""
    return round_up(520 + 20 * stages + 216 * rows + 512 * -(-rows // 8) + 144 * slots, 128)


def _place_symmetric_memory(s) -> None:
    rows, hidden, world, blocks = (int(s[k]) for k in ("max_rows", "hidden_size", "world_size", "num_blocks"))
    heads, kv_heads, head_dim = (int(s[k]) for k in ("num_heads", "num_kv_heads", "head_dim"))
    offset = 0
    for field, words in (
        ("off_plan", 2 * plan_words(rows)),
        ("off_sampling", 2 * rows * abi.SAMPLING_WORDS),
        ("off_qkv", rows * (heads + 2 * kv_heads) * head_dim // 2),
        ("off_split", rows * heads * int(s["max_splits"]) * (head_dim + 2)),
        ("off_o_part", world * rows * partial_width(hidden)),
        ("off_down_part", world * int(s["down_slices"]) * rows * partial_width(hidden)),
        ("off_best", world * blocks * rows * 2),
        ("off_logits", rows * int(s["vocab_rows"])),
        ("off_search", 2 * world * blocks * rows * abi.SEARCH_PIVOTS * 2),
        ("off_logprob", world * blocks * rows * (2 + abi.MAX_LOGPROBS) * 2),
        ("off_align", align_words(s)),
        ("off_renew", 2 * world * blocks * 2),
        ("off_page_table", -(-int(s["num_slots"]) * int(s["pages_per_slot"]) // 2)),
        ("off_abort", 16),
    ):
        s[field] = offset
        offset = round_up(offset + words, 16)
    first = offset  # of a row of bare words, two in 8 bytes
    for field, values in (
        ("off_attn", heads * head_dim),
        ("off_o_sum", hidden),
        ("off_gate", int(s["intermediate_size"])),
        ("off_down_sum", hidden),
    ):
        s[field] = offset
        offset += values // 4
    s["row_words"] = round_up(offset - first, 16)
    s["symmetric_words"] = first + (int(s["num_layers"]) + 1) * rows * int(s["row_words"])


def partial_width(hidden: int) -> int:
    """Words of a source's partial sums of one row: the hidden size, in whole groups."""
    return round_up(hidden, PARTIAL_GROUP)


def plan_words(rows: int) -> int:
    """Words of one step's plan, even so that they are read in pairs."""
    return abi.PLAN_HEADER_WORDS + abi.PLAN_ROW_WORDS * rows


def num_claims(s) -> int:
    """u32 counters of RankParams.claims."""
    return 2 * (int(s["num_layers"]) * (3 + int(s["down_slices"])) + 1)


def num_partners(s) -> int:
    """Numbers of those whose clocks a rank's block 0 compares with its own: blocks of the rank, then, for rank 0, ranks."""
    return int(s["num_blocks"]) + int(s["world_size"])


def align_words(s) -> int:
    """Words of the alignment of clocks: a question and an answer for each partner, each in 32 bytes of its own."""
    return 2 * num_partners(s) * 4 if s["trace"] else 0


def own_tokens(s) -> int:
    """Tokens of a rank's vocabulary that one block looks after when rows are drawn (cuda_src/sampling.cuh)."""
    return abi.UNIT_ROWS * -(-int(s["vocab_rows"]) // (abi.UNIT_ROWS * int(s["num_blocks"])))


def sampler_bytes(s) -> dict[str, int]:
    """Bytes of the fields of RankParams that only drawing needs."""
    own = 4 * int(s["num_blocks"]) * own_tokens(s)
    return {
        "counts": own * int(s["num_slots"]),
        "scaled": own * int(s["max_rows"]),
        "logprobs": 4 * 2 * int(s["max_rows"]) * (1 + abi.MAX_LOGPROBS) * 4,
    }


def trace_bytes(s) -> int:
    """Bytes of one rank's trace, a whole number of pages: rings, then alignments of clocks; 0 when tracing is compiled out."""
    if not s["trace"]:
        return 0
    events = int(s["num_blocks"]) * abi.TRACE_WRITERS * int(s["trace"]) + abi.ALIGN_SLOTS * num_partners(s)
    return round_up(events * abi.TraceEvent.itemsize, 4096)


def page_bytes(s) -> int:
    """Bytes of one KV page of one KV head: keys and values."""
    return int(s["page_size"]) * int(s["head_dim"]) * 4


def kv_bytes(s) -> int:
    """Bytes of all KV pages of one rank."""
    return int(s["num_layers"]) * int(s["num_pages"]) * int(s["num_kv_heads"]) * page_bytes(s)
