"""A plan as a person reads it."""

from __future__ import annotations

from imex_persist.front.tables import print_table


def print_plan(plan: dict) -> None:
    """Prints what plan.make_plan returned."""
    for name, text in facts(plan):
        print(f"{name:<14}{text}")
    print()
    print_table(
        "tensor-parallel sizes",
        "tp, fits, weights a rank, rows, floor ms/token without context, note".split(", "),
        map(_size, plan["tensor_parallel_sizes"]),
    )
    title = f"rows of a step, on {_ranks(plan['tensor_parallel_size'])}"
    print_table(
        title,
        ("rows", "fits", "ring stages", "down_proj slices", "shared memory", "all-reduce"),
        map(_row, plan["kernel"]["by_rows"]),
    )
    floor = plan["floor"]
    print_table(
        f"floor of one decode step: bytes a rank ÷ {floor[0]['bandwidth']}",
        ("context", "bytes a rank", "ms/token", "tok/s"),
        [
            (f["context"], _size_text(f["bytes_per_token"]), f"{f['ms_per_token']:.3f}", f"{f['tokens_per_second']:.0f}")
            for f in floor
        ],
    )


def facts(plan: dict) -> list[tuple[str, str]]:
    """(name, sentence) of everything that is no table."""
    m, g, mem, k = plan["model"], plan["gpu"], plan["memory"], plan["kernel"]
    needed = plan["tensor_parallel_size_needed"]
    return [
        (
            "model",
            f"{m['name']}: {m['architecture']}, {m['num_hidden_layers']} layers, hidden {m['hidden_size']}, heads "
            f"{m['num_attention_heads']}/{m['num_key_value_heads']} x {m['head_dim']}, FFN {m['intermediate_size']}, vocabulary "
            f"{m['vocab_size']}{', tied' if m['tie_word_embeddings'] else ''}",
        ),
        ("parameters", f"{m['parameters'] / 1e9:.3f} billion, {_size_text(m['weight_bytes'])} in {m['dtype']}"),
        (
            "gpu",
            f"{g['name']}, {g['num_blocks']} SMs, {g['memory_bytes'] / 2**30:.0f} GiB, {g['bandwidth_tb_s']} TB/s "
            f"({_source(g['bandwidth_source'])}) — {g['why']}",
        ),
        ("ranks", f"{plan['tensor_parallel_size']}; {'none fits' if needed is None else f'{needed} needed'}"),
        (
            "memory a rank",
            f"weights {_size_text(mem['weight_bytes'])}, symmetric {_size_text(mem['symmetric_bytes'])}, KV "
            f"{_size_text(mem['kv_bytes_planned'])} planned of {_size_text(mem['kv_bytes_room'])} left",
        ),
        (
            "KV cache",
            f"{mem['kv_bytes_per_token']} bytes a token and rank; {mem['max_num_seqs']} sequences x {mem['max_model_len']} positions want "
            f"{_size_text(mem['kv_bytes_wanted'])}, planned are {mem['kv_tokens_planned']} positions, room is for {mem['kv_tokens_room']}",
        ),
        (
            "kernel",
            f"{k['num_blocks']} blocks, up to {k['max_rows']} rows a step, {k['ring_stages']} ring stages ({k['window']} in flight), "
            f"{k['down_slices']} slice(s) of down_proj, {k['smem_bytes']} bytes of shared memory",
        ),
        ("exchange", _exchange(plan["exchange"], g)),
    ]


def _source(source: str) -> str:
    return source if source == "measured" else f"{source}: nobody has measured this card here"


def _exchange(e: dict | None, gpu: dict) -> str:
    if e is None:
        return "none on one rank"
    text = f"{e['strategy']}; {e['exchanges_per_token']} a token of {e['o_proj_bytes'] / 1024:.4g} and {e['down_proj_bytes'] / 1024:.4g} KB"
    if e["ms_per_token"] is None:
        return f"{text}; their time was {e['source']}"
    return (
        f"{text}: {e['o_proj_us']:.2f} and {e['down_proj_us']:.2f} µs, {e['ms_per_token']:.3f} ms a token if nothing hides them "
        f"({e['source']}; NVLink {gpu['nvlink_gb_s_each_way']:.0f} GB/s each way, datasheet); the floor below is without"
    )


def _size(s: dict) -> tuple:
    if "weight_bytes" not in s:
        return s["tensor_parallel_size"], False, None, None, None, s["why_not"]
    note = s["why_not"] or (f"{s['padded_kv_heads']} KV head(s) of zeros pad the ranks" if s["padded_kv_heads"] else "")
    return s["tensor_parallel_size"], s["possible"], _size_text(s["weight_bytes"]), s["max_rows"], f"{s['floor_ms']:.3f}", note


def _row(r: dict) -> tuple:
    if not r["fits"]:
        return r["rows"], False, None, None, None, r["why_not"]
    return r["rows"], True, r["ring_stages"], r["down_slices"], r["smem_bytes"], r["strategy"]


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count != 1)}"


def _size_text(nbytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes} B"
