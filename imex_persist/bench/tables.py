"""The benchmarks' tables on stdout, from their JSON objects."""

from __future__ import annotations

from collections.abc import Callable

from imex_persist.bench.facts import is_virtual
from imex_persist.front.tables import print_table


def print_peers(peers: list[dict], columns: tuple[str, ...], line: Callable[[dict], tuple]) -> None:
    """What others take, and why the ones that were not run were not."""
    lines = [(peer["name"], *line(row)) for peer in peers for row in peer.get("rows", ())]
    if lines:
        print_table("peers, in the same run", ("peer", *columns), lines)
    for peer in peers:
        if "why_not" in peer:
            print(f"{peer['name']} was not run: {peer['why_not']}")


def print_decode(r: dict) -> None:
    columns = ("test", "rows", "ms/step", "floor ms", "ratio", "host ms", "p99 ms", "GB", "TB/s", "tok/s")
    print_table(_title(r), columns, [_step(row, compared=not is_virtual(r)) for row in r["rows"]])
    _print_ceiling(r)
    columns = ("what", "rows", "context", "ms", "to the floor")
    names = {"decode": "step", "prompt": "prompt to first token"}
    print_peers(
        r.get("peers", []),
        columns,
        lambda row: (names[row["kind"]], row["rows"], row["context"], f"{row['us'] / 1e3:.4f}", f"{row['ratio']:.3f}"),
    )


def _step(row: dict, *, compared: bool) -> tuple:
    return (
        row["test"],
        row["rows"],
        f"{row['us'] / 1e3:.4f}",
        f"{row['bound_us'] / 1e3:.4f}",
        f"{row['ratio']:.3f}" if compared else None,
        f"{row['host_us'] / 1e3:.4f}",
        f"{row['p99_us'] / 1e3:.4f}" if "p99_us" in row else None,
        f"{row['bytes'] / 1e9:.3f}",
        f"{row['bytes'] / row['us'] / 1e6:.3f}",
        f"{row['tokens_per_s']:.1f}",
    )


def print_latency(r: dict) -> None:
    what = f"{r['batch_size']} x ({r['input_len']} in, {r['output_len']} out), {r['num_iters']} rounds"
    names = ("average", "floor", "ratio", *(f"{p} %" for p in r["percentiles"]), "median step")
    values = [f"{1e3 * r['avg_latency']:.3f} ms", f"{1e3 * r['bound']:.3f} ms", f"{r['ratio']:.3f}"]
    values += [f"{1e3 * s:.3f} ms" for s in r["percentiles"].values()]
    values.append(None if r["step_us"] is None else f"{r['step_us'] / 1e3:.4f} ms")
    print_table(f"{_title(r)}: {what}", ("latency", "value"), zip(names, values, strict=True))
    _print_ceiling(r)


def print_doorbell(r: dict) -> None:
    columns = ("CPU -> kernel -> CPU", "median µs", "p99 µs", "min µs")
    rows = [
        (name, *(f"{r[key][field]:.2f}" for field in ("median_us", "p99_us", "min_us")))
        for name, key in (
            ("no-op descriptor", "noop"),
            ("after 10 ms without any", "noop_after_idle"),
            ("after 10 ms of the host's sleep", "noop_after_sleep"),
        )
    ]
    print_table(_title(r), columns, rows)
    print(
        f"floor: a word in mapped memory, there and back, {r['bound_us']:.2f} µs in this run, {r['bound_after_idle_us']:.2f} after 10 ms "
        f"without any; ratio {r['ratio']:.2f}"
    )
    print(
        f"first token of an idle kernel: {r['first_token_us']:.1f} µs, a step takes {r['step_us']:.1f} µs, "
        f"so {r['first_token_beyond_us']:.1f} µs beyond it ({r['first_token_after_sleep_beyond_us']:.1f} µs if the host slept): "
        f"its descriptor is acknowledged after {r['first_token_ack_us']:.1f} µs, and from there to its record the device takes "
        f"{r['first_token_device_beyond_us']:.1f} µs beyond a step"
    )


def print_exchange(r: dict) -> None:
    sizes = sorted({row["values"] for row in r["rows"]})
    by_variant: dict[str, dict[int, dict]] = {}
    for row in r["rows"]:
        by_variant.setdefault(row["variant"], {})[row["values"]] = row
    lines = [
        (name, *(f"{found[size]['us']:.2f}" if "us" in found.get(size, {}) else None for size in sizes), _error(found))
        for name, found in by_variant.items()
    ]
    bounds = {row["values"]: row["bound_us"] for row in r["rows"] if "us" in row}
    lines.append(("floor", *(f"{bounds[size]:.2f}" if size in bounds else None for size in sizes), None))
    title = (
        f"µs until every block of {r['tensor_parallel_size']} ranks has the whole sum, by fp32 values ({r['where']['device']})"
    )
    print_table(title, ("strategy", *map(str, sizes), "largest error"), lines)
    for name, found in by_variant.items():
        for size, row in found.items():
            if "why_not" in row:
                print(f"{name} of {size} values was not run: {row['why_not']}")
    print(
        f"floor: a tagged word one way, {r['one_way_us']:.2f} µs, and every block's read of the sums from L2 at {r['l2_gb_s']:.0f} GB/s, "
        "measured in this run; errors are of fractions, in standard deviations of the sums"
    )
    print_peers(r.get("peers", []), ("bf16 values", "µs"), lambda row: (row["values"], f"{row['us']:.2f}"))


def _error(found: dict[int, dict]) -> str | None:
    errors = [row["error"] for row in found.values() if "error" in row]
    return f"{max(errors):.1e}" if errors else None


def print_floor(r: dict) -> None:
    ranks = sorted(r["read"]["tb_s"], key=int)
    rows = [(f"{w} tiles", *(f"{r['read']['by_window'][w][k]:.3f}" for k in ranks)) for w in r["read"]["by_window"]]
    print_table("read, bulk copies of 16 KB through the ring, TB/s", ("in flight an SM", *(f"rank {k}" for k in ranks)), rows)
    if sheet := r["read"]["datasheet_tb_s"]:
        best = max(r["read"]["tb_s"].values())
        print(f"bound: the datasheet's {sheet} TB/s for the whole card, ratio {best / sheet:.3f}")
    rows = [(row["words"], f"{row['us']:.2f}", f"{row['gb_s']:.0f}") for row in r["gather"]]
    print_table(f"every block of {r['num_blocks']} reads all words of L2", ("words", "µs", "GB/s in all"), rows)
    rows = [(f"barrier of {r['num_blocks']} blocks, a word of each to each", f"{r['barrier_us']:.2f}")]
    rows.append(("CPU -> GPU -> CPU, a word in mapped memory", f"{r['doorbell']['median_us']:.2f}"))
    rows += [
        (f"one way by a tagged word, ranks {p['pair'][0]} and {p['pair'][1]}", f"{p['us']:.2f}") for p in r["peers_one_way"]
    ]
    print_table("latencies", ("what", "µs"), rows)


def _title(r: dict) -> str:
    kernel, tp = r["kernel"], r["tensor_parallel_size"]
    made = f"{kernel['num_blocks']} blocks, up to {kernel['max_rows']} rows a step"
    exchange = f", {kernel['strategy']}" if tp > 1 else ""
    return f"{r['model']} ({r['load_format']}), {r['where']['device']}, TP {tp}, {made}{exchange}"


def _print_ceiling(r: dict) -> None:
    rates = r["read"]["tb_s"].values()
    print(f"floor: bytes of a rank / read ceiling, {min(rates):.3f} TB/s, measured in this run on the same card")
