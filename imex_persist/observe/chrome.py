"""The trace as Chrome's JSON, which Perfetto (ui.perfetto.dev) and chrome://tracing open: rank = process, block = thread, phase = span."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np

from imex_persist.abi import Phase
from imex_persist.observe.hops import words_left
from imex_persist.observe.path import critical_path
from imex_persist.observe.spans import Trace, order_of

MAX_SPANS = 200_000
PATH_THREAD = 100_000  # the critical paths' own rows, in turn: a step may begin in one block before it ends in another


def chrome_trace(trace: Trace, steps: list[int] | None = None, *, flows: bool = True) -> dict:
    """{"traceEvents": […], …} of `steps` (all); times in µs. Flow arrows go from the last word sent to every block that waited for it."""
    steps = trace.steps if steps is None else steps
    events = [*_names(trace), *_spans(trace, steps)]
    for number, step in enumerate(steps):
        path = critical_path(trace, step)
        for s in path.segments:
            args = {"step": step, "layer": s.layer, "rank": s.rank, "block": s.block}
            events.append(_span(f"{s.phase.name.lower()} {s.kind}", "path", 0, PATH_THREAD + number % 2, s.begin_us, s.us, args))
        if flows:
            events += _flows(trace, step, number)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {"axis": trace.axis, "clock_error_us": asdict(trace.errors)},
    }


def steps_around(trace: Trace, step: int, spans: int = MAX_SPANS) -> list[int]:
    """`step` and as many beside it as keep a file below so many spans, which viewers can still open."""
    each = max(1, len(trace.of_step(step)))
    at, count = trace.steps.index(step), max(1, spans // each)
    first = max(0, min(at - count // 2, len(trace.steps) - count))
    return trace.steps[first : first + count]


def write_chrome(trace: Trace, path: str | Path, steps: list[int] | None = None) -> None:
    Path(path).write_text(json.dumps(chrome_trace(trace, steps), separators=(",", ":"), allow_nan=False))


def _names(trace: Trace) -> Iterator[dict]:
    for rank in range(int(trace.shape["world_size"])):
        yield {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}}
        for block in range(int(trace.shape["num_blocks"])):
            yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": block, "args": {"name": f"block {block}"}}
    for turn in range(2):
        yield {"ph": "M", "name": "thread_name", "pid": 0, "tid": PATH_THREAD + turn, "args": {"name": "critical path"}}


def _span(name: str, category: str, pid: int, tid: int, begin: float, us: float, args: dict) -> dict:
    start = round(begin, 3)  # both ends to the ns, so that what follows each other does not overlap
    times = {"ts": start, "dur": round(max(round(begin + us, 3) - start, 0.0), 3)}
    return {"ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid, **times, "args": args}


def _spans(trace: Trace, steps: list[int]) -> Iterator[dict]:
    for s in trace.spans[np.isin(trace.spans["step"], steps)]:
        begin, args = float(s["begin"]), {"layer": int(s["layer"]), "step": int(s["step"])}
        for name in ("met", "sum", "input", "ready", "first", "sent"):
            if not np.isnan(s[name]):
                args[f"{name}_us"] = round(float(s[name]) - begin, 4)
        for name in ("tiles", "words", "peers"):
            if s[name] > 0:
                args[f"wait_{name}_us"] = round(float(s[name]), 4)
        yield _span(
            Phase(int(s["phase"])).name.lower(), "phase", int(s["rank"]), int(s["block"]), begin, float(s["end"]) - begin, args
        )


def _flows(trace: Trace, step: int, number: int) -> Iterator[dict]:
    """An arrow from each rank's last word of an exchange to every block that took it in later than it was ready."""
    table, layers = trace.table(step), int(trace.shape["num_layers"])
    out = words_left(table, trace.shape)
    for index, (source, target) in enumerate(_pairs(layers)):
        for rank in range(table.shape[0]):
            block = int(np.argmax(out[rank, :, source]))
            left = float(out[rank, block, source])
            if not np.isfinite(left):
                continue
            own_rank_only = table["phase"][0, 0, target] in (Phase.ATTENTION, Phase.O_PROJ, Phase.DOWN_PROJ)
            for to_rank in (rank,) if own_rank_only else range(table.shape[0]):
                for to_block in range(table.shape[1]):
                    span = table[to_rank, to_block, target]
                    seen = float(span["input"])
                    if np.isnan(seen) or not float(span["begin"]) < left <= seen:
                        continue
                    key = ((number * len(table) + rank) * 8 * layers + index) * 4096 + to_rank * 512 + to_block
                    common = {"name": "words", "cat": "words", "id": key}
                    at = min(left, float(table["end"][rank, block, source]))  # inside the span, where viewers want it
                    yield {"ph": "s", "pid": rank, "tid": block, "ts": round(at, 3), **common}
                    yield {"ph": "f", "bp": "e", "pid": to_rank, "tid": to_block, "ts": round(seen, 3), **common}


def _pairs(layers: int) -> list[tuple[int, int]]:
    """(sending, receiving) places of a step."""
    chain = [Phase.QKV, Phase.ATTENTION, Phase.O_PROJ, Phase.GATE_UP, Phase.DOWN_PROJ]
    places = [int(order_of(phase, layer, layers)) for layer in range(layers) for phase in chain]
    places += [int(order_of(phase, layers, layers)) for phase in (Phase.LM_HEAD, Phase.SAMPLE)]
    return list(pairwise(places))
