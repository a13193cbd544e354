"""The console: tables of a report. This file and live.py alone use rich."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from imex_persist.observe.clocks import Errors
from imex_persist.observe.path import KIND_TEXT, KINDS
from imex_persist.observe.spans import OF_NO_LAYER
from imex_persist.observe.units import rate, size, us

WIDTH = 80
BLOCKS = " ▁▂▃▄▅▆▇█"
HOPS = (("local", "inside a rank"), ("peers", "between ranks"))
NO_LAYER = {phase.name.lower() for phase in OF_NO_LAYER}
LEAST_EXCESS = 0.01  # of a step: a block that holds it less is not worth a line


def make_console(file=None) -> Console:
    """Plain text of 80 columns in a pipe; colours on a terminal unless NO_COLOR is set."""
    file = file or sys.stdout
    terminal = file.isatty()
    return Console(
        file=file, width=None if terminal else WIDTH, no_color=bool(os.environ.get("NO_COLOR")) or not terminal, highlight=False,
        force_terminal=terminal, soft_wrap=False,
    )  # fmt: skip


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


def table(*columns: str, left: int = 1) -> Table:
    """A table without a frame; the first `left` columns are text, the others numbers."""
    out = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    for i, column in enumerate(columns):
        out.add_column(column, justify="left" if i < left else "right", no_wrap=True)
    return out


def heading(console: Console, text: str) -> None:
    console.print(Text(text, style="bold"))


def show(r: dict, title: str, file=None) -> None:
    """The whole report, in the order in which one asks: how long, where, who, why."""
    file = file or sys.stdout
    console = make_console(file)
    with console.capture() as text:
        _all(console, r, title)
    file.write("".join(f"{line.rstrip()}\n" for line in text.get().splitlines()))


def write_picture(r: dict, title: str, path: str) -> None:
    """The same as `show` prints, as an SVG of a terminal."""
    console = Console(
        record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor", highlight=False
    )
    _all(console, r, title)
    text = console.export_svg(title="imex-persist trace")
    Path(path).write_text(
        re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.DOTALL)
    )  # fonts from the network: a picture needs none


def _all(console: Console, r: dict, title: str) -> None:
    _head(console, r, title)
    _where(console, r)
    _phases(console, r)
    _exchanges(console, r)
    _requests(console, r)
    _why(console, r)


def note(console: Console, text: str) -> None:
    console.print(Text(text, style="dim"))


def _head(console: Console, r: dict, title: str) -> None:
    s, gap, e, h = r["step_us"], r["gap_us"], Errors(**r["clock_error_us"]), r["hops"]
    heading(console, f"Trace of {title}")
    console.print(f"Times are {r['axis']}.")
    lost = f", {r['lost_steps']} lost (raise --trace-events or --trace-every)" if r["lost_steps"] else ""
    console.print(f"{r['steps']} decode steps{lost}.")
    if e.text:
        console.print(e.text)
    shortest = [f"{us(h[f'shortest_{k}_us'])} {text}" for k, text in HOPS if h[f"shortest_{k}_us"] is not None]
    if shortest:
        console.print(f"Shortest hop {', '.join(shortest)}.")
        console.print(f"{h['contradictions']} of {h['checked']} words seen before they left.")
    console.print(f"\nstep   p50 {us(s['p50'])}   p90 {us(s['p90'])}   p99 {us(s['p99'])}   max {us(s['max'])}")
    each = r["step_us_each"]
    if each:
        console.print(f"       {us(min(each))} |{histogram(each)}| {us(max(each))}")
    console.print(f"gap    p50 {us(gap['p50'])}   from a step's tokens to the begin of the next")
    if r["published_us"]:
        console.print(f"token  p50 {us(r['published_us']['p50'])}   from a step's end to the token's record for the host")
    if r["floor_us"]:
        p50 = s["p50"] + gap["p50"]
        console.print(
            f"floor  {us(r['floor_us'])}: {size(r['bytes'])} at {rate(r['ceiling_gbs'])} ({r['ceiling_source']}); "
            f"step and gap are {p50 / r['floor_us']:.2f} of it"
        )
    console.print()


def _where(console: Console, r: dict) -> None:
    """The critical path, by phase and kind."""
    c = r["critical_path"]
    if not c:
        return
    kinds = [kind for kind in KINDS if kind != "peer_hop" or r["ranks"] > 1]
    heading(console, "Where a mean step goes: its critical path")
    out = table("phase", "time", "share", *(KIND_TEXT[kind] for kind in kinds))
    for p in r["phases"]:
        out.add_row(p["phase"], us(p["path_us"]), f"{p['share']:.1%}", *(us(p["path_kinds_us"][kind]) for kind in kinds))
    total = sum(c["kinds_us"].values()) or 1.0
    out.add_row("all", us(total), "100.0%", *(us(c["kinds_us"][kind]) for kind in kinds), style="bold")
    out.add_row("", "", "", *(f"{c['kinds_us'][kind] / total:.1%}" for kind in kinds), style="bold")
    console.print(out)
    note(console, "tile wait: for memory. own warps: for the block's slowest warp.")
    note(console, "hop: from a word's leaving, or its reader's being ready, to its being read.\n")


def _phases(console: Console, r: dict) -> None:
    heading(console, "What the phases read in a step, and what an average block waits for in it")
    out = table("phase", "bytes", "rate", "of ceiling", "tiles", "words", "peers")
    for p in r["phases"]:
        ceiling = "unknown" if p["ceiling_gbs"] is None else f"{p['gbs'] / p['ceiling_gbs']:.0%}"
        out.add_row(
            p["phase"], size(p["bytes"]), rate(p["gbs"]) if p["bytes"] else "-", ceiling if p["bytes"] else "-",
            us(p["wait_tiles_us"]), us(p["wait_words_us"]), us(p["wait_peers_us"]),
        )  # fmt: skip
    console.print(out)
    known = "see --ceiling" if r["ceiling_gbs"] is None else f"{rate(r['ceiling_gbs'])}, {r['ceiling_source']}"
    note(console, f"bytes: one rank's. rate: by the time on the path. ceiling: {known}.")
    if any(p["ceiling_gbs"] and p["gbs"] >= 1.005 * p["ceiling_gbs"] for p in r["phases"]):
        note(console, "Above 100%: its tiles were fetched earlier, while blocks waited for words.")
    note(console, "Waits: for memory (tiles), words of the own rank, words of other ranks (peers).\n")


def _exchanges(console: Console, r: dict) -> None:
    if not r["exchanges"]:
        return
    heading(console, "Exchanges: whose words left last, and how long until the other ranks had them")
    out = table("rank", "last", "late by p50", "max", "seen p50", "p90", "max")
    for e in r["exchanges"]:
        share = e["arrived_last"] / max(1, e["exchanges"])
        late, seen = e["late_by_us"], e["export_to_visible_us"]
        values = [us(late["p50"]), us(late["max"]), us(seen["p50"]), us(seen["p90"]), us(seen["max"])]
        out.add_row(str(e["rank"]), f"{e['arrived_last']} ({share:.0%})", *(values if e["arrived_last"] else ["-"] * 5))
    console.print(out)
    note(console, "seen: of exchanges in which that rank was last; of others nobody waited for it.\n")


def _requests(console: Console, r: dict) -> None:
    if not r["requests"]:
        return
    heading(console, "Requests")
    out = table("id", "prompt", "tokens", "TTFT", "in kernel", "ITL p50", "p99", "max", "tok/s")
    for q in r["requests"]:
        i = q["itl_us"]
        out.add_row(
            q["request_id"], str(q["prompt_tokens"]), str(q["tokens"]), us(q["ttft_us"]), us(q["device_ttft_us"]),
            us(i["p50"]), us(i["p99"]), us(i["max"]), f"{q['tokens_per_s']:.1f}",
        )  # fmt: skip
    console.print(out)
    note(console, "in kernel: descriptor seen to first token's record. ITL: by the device's clock.\n")


def _why(console: Console, r: dict) -> None:
    c = r["critical_path"]
    if not c:
        return
    slow, typical = c["slowest"], c["typical"]
    more = slow["us"] - typical["us"]
    if more > 0:
        a, b = us(slow["us"]), us(typical["us"])
        both = f"both {a}" if a == b else f"{a}, not {b}"
        heading(console, f"Why was step {slow['step']} {us(more)} longer than step {typical['step']} ({both})?")
        for row in [w for w in c["why_slower"] if w["more_us"] > 0.05 * more][:3]:
            what = f"{row['phase']}, {KIND_TEXT[row['kind']]}"
            console.print(f"  +{us(row['more_us'])} in {what} ({us(row['us'])}, not {us(row['typical_us'])})")
            if at := row["longest"]:
                where = "" if row["phase"] in NO_LAYER else f" in layer {at['layer']}"
                console.print(f"    longest at rank {at['rank']} block {at['block']}{where}: {us(at['us'])}")
        note(console, "Rises only: what the longer step spent less on is not listed.\n")
    held = [s for s in c["suspects"] if s["excess_us"] >= LEAST_EXCESS * r["step_us"]["mean"]]
    if held:
        heading(console, "Blocks that hold a mean step longer than is usual:")
    else:
        heading(console, f"No block holds a mean step longer than is usual by {LEAST_EXCESS:.0%} of it.")
    for s in held:
        console.print(f"  {_suspect(s)}")
        where = "" if s["phase"] in NO_LAYER else f" in layer {s['worst_layer']}"
        console.print(f"    worst{where}: {us(s['worst_us'])}; median of all blocks {us(s['usual_us'])}")
    _chain(console, c["chain"])


def _suspect(s: dict) -> str:
    return f"rank {s['rank']} block {s['block']}, {s['phase']}, {KIND_TEXT[s['kind']]}: +{us(s['excess_us'])}"


def _chain(console: Console, chain: dict | None) -> None:
    if not chain:
        return
    console.print()
    heading(console, f"The path through layer {chain['layer']} of step {chain['step']}: {us(chain['us'])}")
    out = table("phase", "where", "what", "time", left=3)
    for link in chain["links"]:
        where, source = (f"rank {link[a]} block {link[b]}" for a, b in (("rank", "block"), ("source_rank", "source_block")))
        hop = link["kind"].endswith("hop")
        came = f" from {source}" if source != where else ", words that had come" if hop else ""
        out.add_row(link["phase"], where, f"{KIND_TEXT[link['kind']]}{came}", us(link["us"]))
    console.print(out)
