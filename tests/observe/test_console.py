"""What people read: plain in a pipe, 80 columns, --json's numbers, and the answer to "why was this step longer?"."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as xml
from dataclasses import replace
from functools import lru_cache

import pytest

from imex_persist.observe import console, live
from imex_persist.observe.report import report, request_rows
from imex_persist.outputs import CompletionOutput, RequestMetrics, RequestOutput

from .traced import run, trace_of

NAMES = ("embed", "qkv", "attention", "o_proj", "gate_up", "down_proj", "lm_head", "sample")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@lru_cache
def numbers(world: int = 2, ceiling: float | None = None) -> dict:
    metrics = RequestMetrics(0.0, 0.5, 1.0, [1_000, 2_000, 4_000])
    output = RequestOutput("7", "hi", [1, 2, 3], [CompletionOutput(0, "", [4, 5, 6], "length")], metrics=metrics)
    source = "--ceiling" if ceiling else None
    return report(
        trace_of(run(world=world)), requests=request_rows([output], [400]), ceiling_gbs=ceiling, ceiling_source=source,
        published_us=[1.0, 2.0],
    )  # fmt: skip


def shown(r: dict, file: io.StringIO) -> str:
    console.show(r, "a model", file)
    return file.getvalue()


@pytest.mark.parametrize("world", (1, 2))
@pytest.mark.parametrize("ceiling", (None, 4560.0))
def test_a_pipe_gets_plain_text_of_80_columns(world, ceiling):
    text = shown(numbers(world, ceiling), io.StringIO())
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert not any(line != line.rstrip() for line in text.splitlines())
    assert all(re.search(rf"^{name} ", text, re.MULTILINE) for name in NAMES)
    assert ("rank hop" in text) == (world > 1) and ("floor  " in text) == (ceiling is not None)


def test_a_terminal_gets_colours_unless_no_color(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in shown(numbers(), Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", shown(numbers(), Terminal()))


def test_the_picture_says_what_a_pipe_gets_and_needs_no_network(tmp_path):
    r = numbers()
    console.write_picture(r, "a model", str(tmp_path / "console.svg"))
    root = xml.fromstring((tmp_path / "console.svg").read_text())
    drawn = "".join(root.itertext()).replace("\N{NO-BREAK SPACE}", " ")
    lines = [line.strip() for line in shown(r, io.StringIO()).splitlines() if line.strip()]
    assert all(line in re.sub(r"\s*\n\s*", "\n", drawn) for line in lines if line.isascii() and "  " not in line)
    assert "url(" not in root.find(".//{http://www.w3.org/2000/svg}style").text


def test_the_tables_say_what_json_says():
    r = json.loads(json.dumps(numbers(), allow_nan=False))
    text = shown(r, io.StringIO())
    for phase in r["phases"]:
        assert console.us(phase["path_us"]) in text and console.us(phase["wait_tiles_us"]) in text
    for kind, total in r["critical_path"]["kinds_us"].items():
        parts = sum(phase["path_kinds_us"][kind] for phase in r["phases"])
        assert parts == pytest.approx(total) and console.us(total) in text
    assert sum(r["critical_path"]["kinds_us"].values()) == pytest.approx(r["step_us"]["mean"])
    assert sum(phase["path_us"] for phase in r["phases"]) == pytest.approx(r["step_us"]["mean"])
    (request,) = r["requests"]
    assert request["device_ttft_us"] == pytest.approx(0.6) and request["itl_us"]["max"] == pytest.approx(2.0)
    links = r["critical_path"]["chain"]["links"]
    assert sum(link["us"] for link in links) == pytest.approx(r["critical_path"]["chain"]["us"])
    assert list(dict.fromkeys(link["phase"] for link in links)) == list(NAMES[1:6])


def test_why_a_step_was_longer_is_answered():
    """A block is late in one step of eight: the console names step, phase, rank and block."""
    kernel = run(delay="{1, 2, 3, 1, 60000}")
    r = report(trace_of(kernel))
    text = shown(r, io.StringIO())
    assert "rank 1 block 2, o_proj, compute" in text
    assert "worst in layer 1" in text


def test_the_live_view():
    file = Terminal()
    view = live.LiveView(8, console=console.make_console(file))
    trace = trace_of(run())
    with view:
        view.update(None, 0)
        view.update(trace, 5)
    text = view.render(5).plain
    for wanted in ("token 5 of 8", "tokens/s", "step now", "p50", "p99", "critical path", "holds"):
        assert wanted in text
    assert len(view.steps_us) == len(trace.steps) and max(map(len, text.splitlines())) <= 80


def test_what_the_slow_step_did_differently():
    """One block late in one step only: the question and its answer stand in the console."""
    kernel = run()
    trace = trace_of(kernel)
    spans = trace.spans.copy()
    late = (spans["step"] == 4) & (spans["rank"] == 0) & (spans["block"] == 0) & (spans["phase"] == 7)
    spans["end"][late] += 25.0  # of `sample`, which ends the step
    r = report(replace(trace, spans=spans, _tables={}))
    assert r["critical_path"]["slowest"]["step"] == 4
    first = r["critical_path"]["why_slower"][0]
    assert (first["phase"], first["kind"]) == ("sample", "compute") and first["more_us"] == pytest.approx(25.0, abs=0.5)
    text = shown(r, io.StringIO())
    assert "Why was step 4 " in text and "in sample, compute" in text and "longest at rank 0 block 0" in text
