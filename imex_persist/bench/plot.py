"""`imex-persist bench plot FILE.json --out X.svg`: step time against context, or exchange time against size, from a bench's JSON."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imex_persist.bench import facts
from imex_persist.observe.command import check_outputs

FORMATS = (".svg", ".png")
OURS, FLOOR = "imex-persist", "floor: bytes ÷ read ceiling"
PAYLOADS = {"float24": ":"}  # lines of what is not sent as fp32
IN_THE_PICTURE = 6  # series whose legend still finds room there
Series = tuple[str, list[tuple[float, float]]]  # a name, its points


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if out.suffix not in FORMATS:
        raise ValueError(f"--out is {args.out!r}: a name that ends in {' or '.join(FORMATS)} is allowed")
    check_outputs(args, "out")
    record = _read(Path(args.file))
    try:
        series, labels = _steps(record, args.rows) if record["bench"] == "decode" else _exchanges(record)
        foot = " · ".join(facts.describe(record))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{args.file} is not all that a bench writes ({error!r}): make one with --output-json") from None
    _draw(series, labels, foot, out, logarithmic=record["bench"] == "exchange")
    return 0


def _steps(record: dict, rows: int | None) -> tuple[list[Series], tuple[str, str, str]]:
    """The series and labels of decode's plot."""
    rows = rows or min((row["rows"] for row in record["rows"] if row["kind"] == "decode"), default=None)
    if rows is None:
        raise ValueError("no step was measured, only prompts: run 'bench decode' with --context")
    series = list(step_series(record, rows))
    return series, ("context, positions", "ms a step", f"{record['model']}, {rows} row{'s' * (rows != 1)}, TP {_tp(record)}")


def _exchanges(record: dict) -> tuple[list[Series], tuple[str, str, str]]:
    """The series and labels of exchange's plot."""
    if not any("us" in row for row in record["rows"]):
        raise ValueError("no exchange was measured: run 'bench exchange' with other --sizes")
    title = f"all-reduce of {_tp(record)} ranks; ours ends in every SM"
    return list(exchange_series(record)), ("fp32 values to sum", "µs", title)


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a bench's JSON ({error}): make one with --output-json") from None
    if not isinstance(record, dict) or record.get("bench") not in ("decode", "exchange"):
        raise ValueError(f"{path} is no JSON of 'bench decode' or 'bench exchange': make one with --output-json")
    return record


def _tp(record: dict) -> int:
    return record["tensor_parallel_size"]


def step_series(record: dict, rows: int) -> Iterator[Series]:
    """ms by context: the floor, ours, each peer. Raises ValueError where nothing was measured with so many rows."""
    mine = [row for row in record["rows"] if row["kind"] == "decode" and row["rows"] == rows]
    if not mine:
        raise ValueError(f"nothing was measured with {rows} rows: choose one of the file's with --rows")
    yield FLOOR, [(row["context"], row["bound_us"] / 1e3) for row in mine]
    yield OURS, [(row["context"], row["us"] / 1e3) for row in mine]
    for peer in record.get("peers", []):
        points = [
            (row["context"], row["us"] / 1e3) for row in peer.get("rows", []) if row["kind"] == "decode" and row["rows"] == rows
        ]
        if points:
            yield peer["name"], points


def exchange_series(record: dict) -> Iterator[Series]:
    """µs by number of values: the floor, every strategy, each peer."""
    names = dict.fromkeys(row["variant"] for row in record["rows"])
    measured = [row for row in record["rows"] if "us" in row]
    yield "floor", sorted({row["values"]: row["bound_us"] for row in measured}.items())
    for name in names:
        if points := [(row["values"], row["us"]) for row in measured if row["variant"] == name]:
            yield f"{OURS} {name}", points
    for peer in record.get("peers", []):
        if peer.get("rows"):
            yield f"{peer['name']} (bf16)", [(row["values"], row["us"]) for row in peer["rows"]]


def _styles(names: list[str]) -> dict[str, dict[str, Any]]:
    """How each series is drawn: the floor dashed and black; ours in colours, one for each strategy whatever its payload; peers grey."""
    styles: dict[str, dict[str, Any]] = {}
    colours: dict[str, str] = {}
    peers = itertools.count()
    for name in names:
        words = name.split()
        if name.startswith("floor"):
            styles[name] = dict(color="black", linestyle="--", marker="")
        elif words[0] == OURS:
            colour = colours.setdefault(" ".join(words[:2]), f"C{len(colours)}")
            styles[name] = dict(color=colour, linestyle=PAYLOADS.get(words[-1], "-"), marker="o", markersize=3.5)
        else:
            n = next(peers)
            styles[name] = dict(color=f"{0.3 + 0.1 * (n % 6):.1f}", linestyle="-", marker="s^vDPX"[n % 6], markersize=4)
    return styles


def _draw(series: list[Series], labels: tuple[str, str, str], foot: str, out: Path, *, logarithmic: bool) -> None:
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'imex-persist[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "imex-persist", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        styles = _styles([name for name, _ in series])
        for name, points in series:
            style = {"label": name, "linewidth": 2 if name == OURS else 1.2, **styles[name]}
            axes.plot(*zip(*points, strict=True), **style)
        axes.set_xscale("log", base=2)
        ticks = sorted({x for _, points in series for x, _ in points})
        axes.set_xticks(ticks, [f"{int(x)}" for x in ticks])
        axes.minorticks_off()
        if logarithmic:
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(bottom=0)
        axes.set(xlabel=labels[0], ylabel=labels[1], title=labels[2])
        axes.grid(alpha=0.3)
        beside = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} if len(series) > IN_THE_PICTURE else {}
        axes.legend(fontsize=8, frameon=False, **beside)
        figure.text(0.01, -0.02, foot, fontsize=6.5, color="gray", va="top")
        metadata = {"Date": None} if out.suffix == ".svg" else None  # the same bytes from the same JSON
        figure.savefig(out, bbox_inches="tight", metadata=metadata, dpi=150)
        pyplot.close(figure)
