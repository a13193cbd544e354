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
from imex_persist.observe.spans import EXCHANGED, Trace, order_of

INSIDE = ("met", "sum", "input", "ready", "first", "sent")  # moments of a span, from its begin
WAITS = ("tiles", "words", "peers")
MAX_SPANS = 100_000
PATH_THREAD = 100_000  # the critical paths' own rows, in turn: a step may begin in one block before it ends in another


def chrome_trace(trace: Trace, steps: list[int] | None = None, *, flows: bool = True) -> dict:
    """{"traceEvents": […], …} of `steps` (all); times in µs. Flow arrows go from the last word sent to every block that waited for it."""
    steps = trace.steps if steps is None else steps
    events = [*_names(trace), *_spans(trace, steps)]
    for number, step in enumerate(steps):
        path = critical_path(trace, step)
        for s in path.segments:
            args = {"step": step, "layer": s.layer, "rank": s.rank, "block": s.block}
            events.append(
                _span(f"{s.phase.name.lower()} {s.kind}", "path", 0, PATH_THREAD + number % 2, s.begin_us, s.us, args)
            )
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
    chosen = trace.spans[np.isin(trace.spans["step"], steps)]
    for values in chosen.tolist():
        s = dict(zip(chosen.dtype.names, values, strict=True))
        begin, args = s["begin"], {"layer": s["layer"], "step": s["step"]}
        args |= {f"{name}_us": round(s[name] - begin, 3) for name in INSIDE if s[name] == s[name]}  # those that are not NaN
        args |= {f"wait_{name}_us": round(s[name], 3) for name in WAITS if s[name] > 0}
        yield _span(Phase(s["phase"]).name.lower(), "phase", s["rank"], s["block"], begin, s["end"] - begin, args)


def _flows(trace: Trace, step: int, number: int) -> Iterator[dict]:
    """An arrow from each rank's last word of a phase to every block that took it in later than it was ready."""
    table, layers = trace.table(step), int(trace.shape["num_layers"])
    out, ready = words_left(table), np.where(np.isnan(table["met"]), table["begin"], table["met"])
    for index, (source, target) in enumerate(_pairs(layers)):
        for rank in range(table.shape[0]):
            block = int(np.argmax(out[rank, :, source]))
            left = float(out[rank, block, source])
            at = min(left, float(table["end"][rank, block, source]))  # inside the span, where viewers want it
            waited = (ready[..., target] < left) & (left <= table["input"][..., target])
            if Phase(int(table["phase"][0, 0, target])) not in EXCHANGED:
                waited[np.arange(table.shape[0]) != rank] = False
            for to_rank, to_block in np.argwhere(waited).tolist():
                key = ((number * len(table) + rank) * 8 * (layers + 1) + index) * 4096 + to_rank * 512 + to_block
                common = {"name": "words", "cat": "words", "id": key}
                seen = float(table["input"][to_rank, to_block, target])
                yield {"ph": "s", "pid": rank, "tid": block, "ts": round(at, 3), **common}
                yield {"ph": "f", "bp": "e", "pid": to_rank, "tid": to_block, "ts": round(seen, 3), **common}


def _pairs(layers: int) -> list[tuple[int, int]]:
    """(sending, receiving) places of a step."""
    chain = [Phase.QKV, Phase.ATTENTION, Phase.O_PROJ, Phase.GATE_UP, Phase.DOWN_PROJ]
    places = [int(order_of(phase, layer, layers)) for layer in range(layers) for phase in chain]
    places += [int(order_of(phase, layers, layers)) for phase in (Phase.LM_HEAD, Phase.SAMPLE)]
    return list(pairwise(places))
