"""A step as a picture: rows are blocks, coloured stretches are phases. Static SVG for documents, and the data of the HTML page."""

from __future__ import annotations

import html
import json
from collections import Counter
from itertools import islice, zip_longest
from pathlib import Path as File

import numpy as np

from imex_persist.abi import Phase
from imex_persist.observe.hops import without_item
from imex_persist.observe.path import KIND_TEXT, Path, Segment, critical_path
from imex_persist.observe.spans import OF_NO_LAYER, Trace

# Distinguishable with colour blindness; after Okabe and Ito.
COLOURS = {
    Phase.EMBED: "#999999", Phase.QKV: "#0072b2", Phase.ATTENTION: "#e69f00", Phase.O_PROJ: "#56b4e9", Phase.GATE_UP: "#009e73",
    Phase.DOWN_PROJ: "#d55e00", Phase.LM_HEAD: "#cc79a7", Phase.SAMPLE: "#555555",
}  # fmt: skip
OPACITY = {"compute": 1.0, "tiles": 0.55, "warps": 0.55, "local_hop": 0.22, "peer_hop": 0.22}
WIDTH, LEFT, RIGHT, ROW, TOP = 1000, 110, 14, 16, 58
MAX_ROWS = 32  # of a static picture: of more blocks, those of the path and an even choice
MAX_ARROWS = 24  # more would hide what they join
NARROW = 3  # height of what is nothing: a block's attention without an item


def rows_of(trace: Trace, step: int, limit: int | None = None, path: Path | None = None) -> list[tuple[int, int]]:
    """(rank, block) of the picture's rows: all, or about `limit` of them: of every rank alike, those in which the path stays longest."""
    world, blocks = int(trace.shape["world_size"]), int(trace.shape["num_blocks"])
    if limit is None or world * blocks <= limit:
        return [(rank, block) for rank in range(world) for block in range(blocks)]
    held: Counter = Counter()
    for s in path.segments if path else ():
        held[s.rank, s.block] += s.us
        held[s.source_rank, s.source_block] += 0.0
    longest = [[row for row, _ in held.most_common() if row[0] == rank] for rank in range(world)]
    in_turn = (row for turn in zip_longest(*longest) for row in turn if row)
    chosen = set(islice(in_turn, max(0, limit - 2 * world)))
    each = max(2, (limit - len(chosen)) // world)
    chosen |= {(rank, int(b)) for rank in range(world) for b in np.linspace(0, blocks - 1, each)}
    return sorted(chosen)


def in_layers(path: Path, layers: tuple[int, int] | None) -> list[Segment]:
    """The path's segments of layers first … last; all without."""
    if layers is None:
        return list(path.segments)
    found = [s for s in path.segments if layers[0] <= s.layer <= layers[1] and s.phase not in OF_NO_LAYER]
    if not found:
        raise ValueError(f"layers {layers[0]} to {layers[1]} are not in step {path.step}: the model's are counted from 0")
    return found


def name_of(phase: Phase, layer: int) -> str:
    return phase.name.lower() + ("" if phase in OF_NO_LAYER else f" layer {layer}")


def ticks(begin: float, end: float, count: int = 6) -> list[float]:
    """About `count` round numbers between two."""
    step = 10 ** np.floor(np.log10(max(end - begin, 1e-6) / count))
    step = next(step * factor for factor in (1, 2, 5, 10) if (end - begin) / (step * factor) <= count)
    return [float(v) for v in np.arange(np.ceil(begin / step), np.floor(end / step) + 1) * step]


def svg(trace: Trace, step: int, layers: tuple[int, int] | None = None) -> str:
    """A static picture of one step, or of some of its layers (first, last), with the critical path below.

    Full colour: a phase computes; pale: it waits for words; thin: attention without an item. The path's hops are arrows where there are
    few. Times are from the step's begin.
    """
    path, table = critical_path(trace, step), trace.table(step)
    shown = in_layers(path, layers)
    rows = rows_of(trace, step, MAX_ROWS, Path(step, tuple(shown)))
    arrows, nothing = _arrows(shown, rows), without_item(table)
    zero, begin, end = path.begin_us, shown[0].begin_us, shown[-1].end_us
    scale = (WIDTH - LEFT - RIGHT) / max(end - begin, 1e-9)
    x = lambda us: LEFT + (us - begin) * scale  # noqa: E731
    bottom = TOP + ROW * len(rows)
    height = bottom + ROW + 44
    what = f"step {step}" if layers is None else f"step {step}, layers {layers[0]} to {layers[1]}"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="11">',
        '<defs><marker id="tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="5" markerHeight="5" orient="auto">'
        '<path d="M0 0 6 3 0 6z"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="8" y="18" font-size="13" font-weight="bold">{html.escape(what)}: {end - begin:.1f} µs</text>',
        f'<text x="{WIDTH - RIGHT}" y="18" text-anchor="end" fill="#555555">{html.escape(trace.axis)}</text>',
    ]
    at = 8.0
    for phase in dict.fromkeys(s.phase for s in shown):
        out.append(f'<rect x="{at:.1f}" y="29" width="10" height="10" fill="{COLOURS[phase]}"/>')
        out.append(f'<text x="{at + 14:.1f}" y="38">{phase.name.lower()}</text>')
        at += 32 + 6.2 * len(phase.name)
    for us in ticks(begin - zero, end - zero):
        out.append(
            f'<line x1="{x(us + zero):.1f}" x2="{x(us + zero):.1f}" y1="{TOP - 4}" y2="{bottom + ROW + 14}" stroke="#dddddd"/>'
        )
        label = min(x(us + zero), WIDTH - 28.0)
        out.append(f'<text x="{label:.1f}" y="{bottom + ROW + 28}" text-anchor="middle" fill="#555555">{us:g} µs</text>')

    def bar(y: float, left: float, right: float, colour: str, opacity: float, title: str, height: int = ROW - 4) -> bool:
        left, right = max(x(left), LEFT), min(x(right), WIDTH - RIGHT)
        if seen := right - left > 0.02:
            out.append(
                f'<rect x="{left:.2f}" y="{y:.1f}" width="{max(right - left, 0.3):.2f}" height="{height}" fill="{colour}" '
                f'fill-opacity="{opacity}"><title>{html.escape(title)}</title></rect>'
            )
        return seen

    thin = False
    for i, (rank, block) in enumerate(rows):
        y = TOP + i * ROW
        out.append(f'<text x="8" y="{y + ROW - 6}" fill="#333333">rank {rank} block {block}</text>')
        for s, none in zip(table[rank, block], nothing[rank, block], strict=True):
            phase = Phase(int(s["phase"]))
            taken = float(s["begin"] if np.isnan(s["input"]) else s["input"])
            title = f"{name_of(phase, int(s['layer']))}: {float(s['end'] - s['begin']):.2f} µs"
            if none:
                middle = y + (ROW - 4 - NARROW) / 2
                thin |= bar(middle, float(s["begin"]), float(s["end"]), COLOURS[phase], 1.0, title + ", no item", NARROW)
                continue
            bar(y, float(s["begin"]), taken, COLOURS[phase], 0.22, title + ", waiting for words")
            bar(y, taken, float(s["end"]), COLOURS[phase], 1.0, title)
    y = bottom + 8
    out.append(f'<text x="8" y="{y + ROW - 6}" font-weight="bold">critical path</text>')
    for s in shown:
        title = f"{name_of(s.phase, s.layer)}, {KIND_TEXT[s.kind]}, rank {s.rank} block {s.block}: {s.us:.2f} µs"
        bar(y, s.begin_us, s.end_us, COLOURS[s.phase], OPACITY[s.kind], title)
    for begin_us, source, end_us, target in arrows:
        y1, y2 = (TOP + at * ROW + (ROW - 4) / 2 for at in (source, target))
        out.append(
            f'<line x1="{x(begin_us):.1f}" y1="{y1}" x2="{x(end_us):.1f}" y2="{y2}" stroke="#000000" stroke-width="1.2" '
            'marker-end="url(#tip)"/>'
        )
    legend = "pale: waits for words" + "; thin: no attention item" * thin + "; arrows: the path's hops" * bool(arrows)
    out.append(f'<text x="{at + 6:.1f}" y="38" fill="#555555">{legend}</text>')
    return "\n".join([*out, "</svg>", ""])


def _arrows(shown: list[Segment], rows: list[tuple[int, int]]) -> list[tuple[float, int, float, int]]:
    """(begin, its row, end, its row) of every hop between blocks; none if they are many, or have ends that no row shows."""
    hops = [((s.source_rank, s.source_block), (s.rank, s.block), s) for s in shown]
    hops = [hop for hop in hops if hop[0] != hop[1]]
    if len(hops) > MAX_ARROWS or not all(source in rows and target in rows for source, target, _ in hops):
        return []
    return [(s.begin_us, rows.index(source), s.end_us, rows.index(target)) for source, target, s in hops]


def write_svg(trace: Trace, step: int, path: str | File, layers: tuple[int, int] | None = None) -> None:
    File(path).write_text(svg(trace, step, layers))


def page_data(trace: Trace, step: int) -> dict:
    """What the HTML page draws: rows of spans [phase, layer or null, begin, input, end, tiles, words, peers, 1 for attention without an
    item], µs from the step's begin.
    """
    path, table, rows = critical_path(trace, step), trace.table(step), rows_of(trace, step)
    nothing, zero = without_item(table), path.begin_us
    number = lambda v: round(float(v) - zero, 3)  # noqa: E731
    layer = lambda phase, layer: None if phase in OF_NO_LAYER else int(layer)  # noqa: E731
    return {
        "step": step,
        "axis": trace.axis,
        "error": trace.errors.text,
        "max_arrows": MAX_ARROWS,
        "narrow": NARROW,
        "us": path.us,
        "phases": [p.name.lower() for p in Phase],
        "colours": [COLOURS[p] for p in Phase],
        "opacity": {KIND_TEXT[kind]: value for kind, value in OPACITY.items()},
        "rows": [
            {
                "name": f"rank {rank} block {block}",
                "spans": [
                    [
                        int(s["phase"]), layer(s["phase"], s["layer"]), number(s["begin"]),
                        number(s["begin"] if np.isnan(s["input"]) else s["input"]), number(s["end"]),
                        *(round(float(s[name]), 3) for name in ("tiles", "words", "peers")), int(none),
                    ]
                    for s, none in zip(table[rank, block], nothing[rank, block], strict=True)
                ],
            }
            for rank, block in rows
        ],
        "path": [
            [
                int(s.phase), layer(s.phase, s.layer), number(s.begin_us), number(s.end_us), KIND_TEXT[s.kind],
                rows.index((s.rank, s.block)), rows.index((s.source_rank, s.source_block)),
            ]
            for s in path.segments
        ],
    }  # fmt: skip


def write_html(trace: Trace, step: int, path: str | File) -> None:
    """One file that needs nothing else: the page's own script draws and zooms."""
    template = (File(__file__).parent / "page.html").read_text()
    data = json.dumps(page_data(trace, step), separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    File(path).write_text(template.replace("/*DATA*/null", data))
