"""The console: tables of a report. This file and live.py alone use rich."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from imex_persist.observe.path import KIND_TEXT, KINDS

WIDTH = 80
BLOCKS = " ▁▂▃▄▅▆▇█"


def make_console(file=None) -> Console:
    """Plain text of 80 columns in a pipe; colours on a terminal unless NO_COLOR is set."""
    file = file or sys.stdout
    terminal = file.isatty()
    return Console(
        file=file, width=None if terminal else WIDTH, no_color=bool(os.environ.get("NO_COLOR")) or not terminal, highlight=False,
        force_terminal=terminal, soft_wrap=False,
    )  # fmt: skip


def us(value: float | None) -> str:
    """Three digits: "0.42 µs", "87.3 µs", "1.20 ms"."""
    if value is None:
        return "unknown"
    for limit, scale, unit in ((1e3, 1.0, "µs"), (1e6, 1e3, "ms"), (float("inf"), 1e6, "s")):
        if abs(value) < limit:
            number = value / scale
            return f"{number:.{2 if abs(number) < 10 else 1 if abs(number) < 100 else 0}f} {unit}"
    return "unknown"


def size(count: float) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e5 else f"{count / 1e3:.3g} kB" if count else "-"


def histogram(values: list[float], bins: int = 40) -> str:
    """One line of block characters from the smallest to the largest value."""
    if not values:
        return ""
    low, high = min(values), max(values)
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / max(high - low, 1e-9) * bins))] += 1
    top = max(counts)
    return "".join(BLOCKS[0 if not count else max(1, round(count / top * 8))] for count in counts)


def table(title: str, *columns: str, left: int = 1) -> Table:
    out = Table(
        title=Text(title, style="bold", no_wrap=True),
        title_justify="left",
        min_width=len(title) + 2,
        box=None,
        pad_edge=False,
        header_style="dim",
        padding=(0, 1),
    )
    for i, column in enumerate(columns):
        out.add_column(column, justify="left" if i < left else "right", no_wrap=True)
    return out


def show(r: dict, title: str, console: Console | None = None) -> None:
    """The whole report, in the order in which one asks: how long, where, who, why."""
    console = console or make_console()
    s, gap = r["step_us"], r["gap_us"]
    console.print(Text(f"Trace of {title}", style="bold"))
    console.print(f"Times are {r['axis']}.")
    console.print(f"{r['steps']} decode steps, {r['lost_steps']} lost.")
    _clocks(console, r)
    console.print(f"step   p50 {us(s['p50'])}   p90 {us(s['p90'])}   p99 {us(s['p99'])}   max {us(s['max'])}")
    each = r["step_us_each"]
    if each:
        console.print(f"       {us(min(each))} |{histogram(each)}| {us(max(each))}")
    console.print(f"gap    p50 {us(gap['p50'])} from a step's tokens to the begin of the next\n")
    _phases(console, r)
    _exchanges(console, r)
    _requests(console, r)
    _path(console, r)


def _clocks(console: Console, r: dict) -> None:
    """How far to believe the axis: bounds, and whether any word contradicts it."""
    e, h = r["clock_error_us"], r["hops"]
    if e["blocks"]:
        ranks = f", between ranks to {us(e['ranks'])}" if e["ranks"] else ""
        drift = f"; drift between alignments {us(e['drift'])}" if e["drift"] is not None else ""
        console.print(f"Clocks are known to {us(e['blocks'])} inside a rank{ranks}{drift}.")
    if h["checked"]:
        seen = " and ".join(
            f"{us(h[f'shortest_{kind}_us'])} {text}"
            for kind, text in (("local", "inside a rank"), ("peers", "between ranks"))
            if h[f"shortest_{kind}_us"] is not None
        )
        console.print(f"Shortest hops {seen}; {h['contradictions']} of {h['checked']} seen before they left.")
    console.print()


def _phases(console: Console, r: dict) -> None:
    out = table(
        "Phases: a mean step, on its critical path",
        "phase",
        "time",
        "share",
        "bytes",
        "GB/s",
        "ceiling",
        "tiles",
        "words",
        "peers",
    )
    for p in r["phases"]:
        ceiling = "unknown" if p["ceiling_gbs"] is None else f"{p['gbs'] / p['ceiling_gbs']:.0%}"
        out.add_row(
            p["phase"], us(p["path_us"]), f"{p['share']:.1%}", size(p["bytes"]), f"{p['gbs']:.3g}" if p["bytes"] else "-",
            ceiling if p["bytes"] else "-", us(p["wait_tiles_us"]), us(p["wait_words_us"]), us(p["wait_peers_us"]),
        )  # fmt: skip
    console.print(out)
    given = r["phases"][0]["ceiling_gbs"]
    where = "--ceiling GB/s sets one" if given is None else f"of {given:.0f} GB/s"
    console.print(
        Text(
            f"bytes: one rank's. ceiling: {where}. tiles, words, peers: what\n"
            "an average block waited for: memory, its own rank, other ranks.\n",
            style="dim",
        )
    )


def _exchanges(console: Console, r: dict) -> None:
    if not r["exchanges"]:
        return
    out = table(
        "Exchanges: whose words left last, and how long until seen",
        "rank",
        "last",
        "late by p50",
        "max",
        "seen p50",
        "p90",
        "max",
    )
    for e in r["exchanges"]:
        share = e["arrived_last"] / max(1, e["exchanges"])
        late, seen = e["late_by_us"], e["export_to_visible_us"]
        values = [us(late["p50"]), us(late["max"]), us(seen["p50"]), us(seen["p90"]), us(seen["max"])]
        out.add_row(str(e["rank"]), f"{e['arrived_last']} ({share:.0%})", *(values if e["arrived_last"] else ["-"] * 5))
    console.print(out)
    console.print()


def _requests(console: Console, r: dict) -> None:
    if not r["requests"]:
        return
    out = table("Requests", "id", "prompt", "tokens", "TTFT", "in kernel", "ITL p50", "p99", "max", "tok/s")
    for q in r["requests"]:
        i = q["itl_us"]
        out.add_row(
            q["request_id"], str(q["prompt_tokens"]), str(q["tokens"]), us(q["ttft_us"]), us(q["device_ttft_us"]),
            us(i["p50"]), us(i["p99"]), us(i["max"]), f"{q['tokens_per_s']:.1f}",
        )  # fmt: skip
    console.print(out)
    console.print()


def _path(console: Console, r: dict) -> None:
    c = r["critical_path"]
    if not c:
        return
    total = sum(c["kinds_us"].values()) or 1.0
    out = table("Critical path: what the mean step is made of", "kind", "time", "share")
    for kind in KINDS:
        out.add_row(KIND_TEXT[kind], us(c["kinds_us"][kind]), f"{c['kinds_us'][kind] / total:.1%}")
    console.print(out)
    slow, typical = c["slowest"], c["typical"]
    more = slow["us"] - typical["us"]
    console.print()
    console.print(
        Text(
            f"Why was step {slow['step']} {us(slow['us'])} and not {us(typical['us'])} like step {typical['step']}?",
            style="bold",
        )
    )
    for row in [w for w in c["why_slower"] if w["more_us"] > 0.05 * max(more, 1e-9)][:3]:
        text = f"  +{us(row['more_us'])} in {row['phase']}, {KIND_TEXT[row['kind']]} ({us(row['us'])} instead of {us(row['typical_us'])})"
        console.print(text, soft_wrap=True)
    console.print()
    console.print(Text("Longer than usual on the path, a mean step:", style="bold"))
    for s in c["suspects"]:
        console.print(
            f"  rank {s['rank']} block {s['block']}, {s['phase']} {KIND_TEXT[s['kind']]}: +{us(s['excess_us'])}\n"
            f"    worst in layer {s['worst_layer']}: {us(s['worst_us'])}, median of all blocks {us(s['usual_us'])}"
        )
