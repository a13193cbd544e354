"""A step as a picture: rows are blocks, coloured stretches are phases. Static SVG for documents, and the data of the HTML page."""

from __future__ import annotations

import html
import json
from pathlib import Path as File

import numpy as np

from imex_persist.abi import Phase
from imex_persist.observe.path import KIND_TEXT, critical_path
from imex_persist.observe.spans import Trace

# Of one lightness, distinguishable with colour blindness; after Okabe and Ito.
COLOURS = {
    Phase.EMBED: "#999999", Phase.QKV: "#0072b2", Phase.ATTENTION: "#e69f00", Phase.O_PROJ: "#56b4e9", Phase.GATE_UP: "#009e73",
    Phase.DOWN_PROJ: "#d55e00", Phase.LM_HEAD: "#cc79a7", Phase.SAMPLE: "#555555",
}  # fmt: skip
WIDTH, LEFT, ROW, TOP = 1000, 96, 14, 44
MAX_ROWS = 64  # of a static picture: of more blocks, an even choice


def rows_of(trace: Trace, step: int, limit: int | None = None) -> list[tuple[int, int]]:
    """(rank, block) of the picture's rows, at most about `limit`."""
    world, blocks = int(trace.shape["world_size"]), int(trace.shape["num_blocks"])
    each = blocks if limit is None else max(1, min(blocks, limit // world))
    chosen = sorted({int(b) for b in np.linspace(0, blocks - 1, each)})
    return [(rank, block) for rank in range(world) for block in chosen]


def svg(trace: Trace, step: int) -> str:
    """A static picture of one step: pale while a phase waits for words, full while it computes, and the critical path below."""
    path = critical_path(trace, step)
    rows, table = rows_of(trace, step, MAX_ROWS), trace.table(step)
    begin, end = path.begin_us, path.end_us
    scale = (WIDTH - LEFT - 10) / max(end - begin, 1e-9)
    height = TOP + ROW * (len(rows) + 2) + 40
    x = lambda us: LEFT + (us - begin) * scale  # noqa: E731
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="8" y="16" font-size="13">Step {step}: {end - begin:.2f} µs ({html.escape(trace.axis)})</text>',
    ]
    at = LEFT
    for phase, colour in COLOURS.items():
        out.append(f'<rect x="{at}" y="24" width="10" height="10" fill="{colour}"/>')
        out.append(f'<text x="{at + 13}" y="33">{phase.name.lower()}</text>')
        at += 30 + 7 * len(phase.name)

    def bar(y: float, left: float, right: float, colour: str, opacity: float, title: str) -> None:
        left, right = max(x(left), LEFT), min(x(right), WIDTH - 10)
        if right > left:
            out.append(
                f'<rect x="{left:.2f}" y="{y}" width="{max(right - left, 0.15):.2f}" height="{ROW - 3}" fill="{colour}" '
                f'fill-opacity="{opacity}"><title>{html.escape(title)}</title></rect>'
            )

    for i, (rank, block) in enumerate(rows):
        y = TOP + i * ROW
        out.append(f'<text x="8" y="{y + ROW - 4}" fill="#333333">rank {rank} block {block}</text>')
        for s in table[rank, block]:
            phase = Phase(int(s["phase"]))
            taken = float(s["begin"] if np.isnan(s["input"]) else s["input"])
            title = f"{phase.name.lower()} layer {int(s['layer'])}: {float(s['end'] - s['begin']):.2f} µs"
            bar(y, float(s["begin"]), taken, COLOURS[phase], 0.25, title + ", waiting for words")
            bar(y, taken, float(s["end"]), COLOURS[phase], 1.0, title)
    y = TOP + (len(rows) + 0.6) * ROW
    out.append(f'<text x="8" y="{y + ROW - 4}" font-weight="bold">critical path</text>')
    for s in path.segments:
        title = f"{s.phase.name.lower()} layer {s.layer}, {KIND_TEXT[s.kind]}, rank {s.rank} block {s.block}: {s.us:.2f} µs"
        bar(
            y, s.begin_us, s.end_us, COLOURS[s.phase], 1.0 if s.kind == "compute" else 0.5 if s.kind == "tiles" else 0.25, title
        )
    y += ROW + 6
    for i in range(6):
        us = (end - begin) * i / 5
        anchor = "end" if i == 5 else "middle"
        out.append(f'<text x="{x(begin + us):.1f}" y="{y + 12}" text-anchor="{anchor}">{us:.1f} µs</text>')
        out.append(f'<line x1="{x(begin + us):.1f}" x2="{x(begin + us):.1f}" y1="{TOP}" y2="{y}" stroke="#00000022"/>')
    return "\n".join([*out, "</svg>", ""])


def write_svg(trace: Trace, step: int, path: str | File) -> None:
    File(path).write_text(svg(trace, step))


def page_data(trace: Trace, step: int) -> dict:
    """What the HTML page draws: rows of spans [phase, layer, begin, input, end, tiles, words, peers], µs from the step's begin."""
    path, table, rows = critical_path(trace, step), trace.table(step), rows_of(trace, step)
    zero = path.begin_us
    number = lambda v: round(float(v) - zero, 3)  # noqa: E731
    return {
        "step": step,
        "axis": trace.axis,
        "error": trace.errors.blocks,
        "us": path.us,
        "phases": [p.name.lower() for p in Phase],
        "colours": [COLOURS[p] for p in Phase],
        "rows": [
            {
                "name": f"rank {rank} block {block}",
                "spans": [
                    [
                        int(s["phase"]), int(s["layer"]), number(s["begin"]),
                        number(s["begin"] if np.isnan(s["input"]) else s["input"]), number(s["end"]),
                        *(round(float(s[name]), 3) for name in ("tiles", "words", "peers")),
                    ]
                    for s in table[rank, block]
                ],
            }
            for rank, block in rows
        ],
        "path": [
            [
                int(s.phase), s.layer, number(s.begin_us), number(s.end_us), KIND_TEXT[s.kind], f"rank {s.rank} block {s.block}",
                f"rank {s.source_rank} block {s.source_block}",
            ]
            for s in path.segments
        ],
    }  # fmt: skip


def write_html(trace: Trace, step: int, path: str | File) -> None:
    """One file that needs nothing else: the page's own script draws and zooms."""
    template = (File(__file__).parent / "page.html").read_text()
    data = json.dumps(page_data(trace, step), separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    File(path).write_text(template.replace("/*DATA*/null", data))
