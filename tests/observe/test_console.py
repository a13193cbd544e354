"""What people read: plain in a pipe, 80 columns, --json's numbers, and the answer to "why was this step longer?"."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as xml
from dataclasses import replace
from functools import lru_cache

import pytest

from imex_persist.cli import main
from imex_persist.observe import command, console, live, units
from imex_persist.observe.clocks import Errors
from imex_persist.observe.report import report, request_rows
from imex_persist.outputs import CompletionOutput, RequestMetrics, RequestOutput
from imex_persist.runtime.placement import Place, Placement

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


def test_large_numbers_have_large_units():
    assert [units.size(n) for n in (0, 512, 8192, 806e6, 3.76e9)] == ["-", "512 B", "8.19 kB", "806 MB", "3.76 GB"]
    assert [units.rate(n) for n in (4.23, 17.9, 4688.0)] == ["4.23 GB/s", "17.9 GB/s", "4.69 TB/s"]
    assert [units.us(t) for t in (None, 0.42, 87.3, 1200.0, 2.5e6)] == ["unknown", "0.42 µs", "87.3 µs", "1.20 ms", "2.50 s"]


def longer_by(r: dict, more_us: float) -> dict:
    """The same report with steps of 1.85 ms, the slowest of which is longer by so much."""
    c = r["critical_path"]
    steps = {"typical": {**c["typical"], "us": 1852.0}, "slowest": {**c["slowest"], "us": 1852.0 + more_us}}
    return {**r, "step_us": {**r["step_us"], "mean": 1852.0}, "critical_path": {**c, **steps}}


def test_two_gpus_as_they_were_read():
    """Sizes, rates and clocks of a large model: in 80 columns, with nothing that a person would have to convert."""
    r = longer_by(numbers(2, 4560.0), 8.3)
    large = dict(bytes=3.76e9, gbs=5560.0, path_us=863.0, wait_tiles_us=403.0, wait_words_us=164.0, wait_peers_us=45.3)
    r |= {
        "phases": [{**p, **large} for p in r["phases"]], "bytes": 7.51e9, "ceiling_source": "measured, NVIDIA H200",
        "clock_error_us": {"blocks": 0.6, "ranks": 0.72, "drift": 0.1, "timer": 0.41},
        "hops": {"checked": 7760, "contradictions": 0, "shortest_local_us": 0.04, "shortest_peers_us": 0.93},
    }  # fmt: skip
    lines = shown(r, io.StringIO()).splitlines()
    assert max(map(len, lines)) <= 80 and not any("e+0" in line for line in lines)
    for wanted in (
        "0 of 7760 words seen before they left.",
        "What the phases read in a step, and what an average block waits for in it",
        "Above 100%: its tiles were fetched earlier, while blocks waited for words.",
    ):
        assert wanted in lines
    text = " ".join(lines)
    for wanted in (
        "7.51 GB at 4.56 TB/s (measured, NVIDIA H200)",
        Errors(**r["clock_error_us"]).text,
        "3.76 GB  5.56 TB/s        122%",
    ):
        assert wanted in text
    assert "Above 100%" not in shown(numbers(2, 4560.0), io.StringIO())


def test_the_difference_of_two_steps_is_said_in_its_own_unit():
    slow, typical = (numbers()["critical_path"][name]["step"] for name in ("slowest", "typical"))
    for more, both in ((2.0, "both 1.85 ms"), (8.3, "1.86 ms, not 1.85 ms")):
        text = shown(longer_by(numbers(), more), io.StringIO())
        assert f"Why was step {slow} {console.us(more)} longer than step {typical} ({both})?" in text
        assert "Rises only" in text


def test_blocks_that_hold_next_to_nothing_are_not_named():
    assert "Blocks that hold" in shown(numbers(), io.StringIO())
    r = longer_by(numbers(), 8.3)
    few = [{**s, "excess_us": us} for s, us in zip(r["critical_path"]["suspects"], (18.6, 18.4, 0.9), strict=True)]
    r["critical_path"]["suspects"] = few
    assert shown(r, io.StringIO()).count("worst") == 1
    r["critical_path"]["suspects"] = few[1:]
    text = shown(r, io.StringIO())
    assert "No block holds a mean step longer than is usual by 1% of it." in text and "worst" not in text


@pytest.mark.parametrize("option", ["out", "html", "svg", "console"])
def test_a_picture_that_cannot_be_written_is_refused_before_anything_runs(capsys, option):
    assert main(["trace", "no-model", f"--{option}", "/nowhere/x"]) == 2
    assert f"--{option} is '/nowhere/x': /nowhere is no folder" in capsys.readouterr().err


def test_a_ceiling_is_of_the_card_that_is_used():
    def ceiling(*names, given=None):
        return command._ceiling(given, Placement(tuple(Place("cuda", i, (i,), name=name) for i, name in enumerate(names))))

    assert ceiling("NVIDIA H200", "NVIDIA H100 80GB HBM3") == (pytest.approx(4560), "measured, NVIDIA H200")
    for name in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA RTX PRO 6000"):
        assert ceiling(name) == (None, None) and ceiling(name, given=1000.0) == (1000.0, "--ceiling")
    assert command._ceiling(None, Placement((Place("sim", 0, (0,)),))) == (None, None)


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
    assert "Why was step 4 " in text and "in sample, compute" in text and "longest at rank 0 block 0: " in text
