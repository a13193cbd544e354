"""Timelines: valid for the viewers they are for. The HTML page is run in headless Chromium where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from imex_persist.abi import Phase
from imex_persist.observe import chrome, picture
from imex_persist.observe.clocks import Errors
from imex_persist.observe.path import critical_path

from .traced import run, trace_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEADLESS = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--window-size=1200,500")


@lru_cache
def trace():
    return trace_of(run())


@lru_cache
def events() -> list[dict]:
    return json.loads(json.dumps(chrome.chrome_trace(trace()), allow_nan=False))["traceEvents"]


def test_a_span_is_a_phase():
    spans = [e for e in events() if e["ph"] == "X" and e["cat"] == "phase"]
    assert len(spans) == len(trace().spans)
    assert {e["name"] for e in spans} == {p.name.lower() for p in Phase}
    assert {e["args"]["layer"] for e in spans} == set(range(4))
    assert {e["pid"] for e in spans} == {0, 1} and {e["tid"] for e in spans} == {0, 1, 2, 3}
    names = {(e["name"], e["args"]["name"]) for e in events() if e["ph"] == "M"}
    assert {("process_name", "rank 1"), ("thread_name", "block 3"), ("thread_name", "critical path")} <= names


def test_spans_of_a_thread_do_not_overlap():
    threads = defaultdict(list)
    for e in events():
        if e["ph"] == "X":
            threads[e["pid"], e["tid"]].append((e["ts"], round(e["ts"] + e["dur"], 3)))
    assert len(threads) == 2 * 4 + 2
    for spans in threads.values():
        spans.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(spans))


def test_arrows_begin_and_end_in_spans():
    """Viewers drop what is bound to nothing. Every exchange has arrows, between ranks and inside them."""
    spans = defaultdict(list)
    for e in events():
        if e["ph"] == "X":
            spans[e["pid"], e["tid"]].append((e["ts"], e["ts"] + e["dur"], e["name"]))

    def inside(e: dict) -> set[str]:
        return {name for begin, end, name in spans[e["pid"], e["tid"]] if begin - 2e-3 <= e["ts"] <= end + 2e-3}

    starts, ends = ({e["id"]: e for e in events() if e["ph"] == kind} for kind in "sf")
    assert starts.keys() == ends.keys() and len(starts) == sum(e["ph"] == "s" for e in events())
    found = set()
    for key, start in starts.items():
        assert start["ts"] <= ends[key]["ts"] and inside(start) and inside(ends[key])
        found |= {(a, b, start["pid"] != ends[key]["pid"]) for a in inside(start) for b in inside(ends[key])}
    own = (("qkv", "attention"), ("attention", "o_proj"), ("o_proj", "gate_up"), ("gate_up", "down_proj"))
    peers = (("o_proj", "gate_up"), ("down_proj", "qkv"), ("down_proj", "lm_head"), ("lm_head", "sample"))
    for link in [(*pair, False) for pair in own] + [(*pair, True) for pair in peers]:
        assert link in found


def test_a_large_trace_is_cut_to_what_viewers_open():
    each = len(trace().of_step(trace().steps[0]))
    assert chrome.steps_around(trace(), 4, 3 * each) == [3, 4, 5]
    assert chrome.steps_around(trace(), trace().steps[0], 3 * each) == trace().steps[:3]
    assert chrome.steps_around(trace(), trace().steps[-1], 3 * each) == trace().steps[-3:]
    assert chrome.steps_around(trace(), 4) == trace().steps
    some = chrome.chrome_trace(trace(), [3])["traceEvents"]
    assert {e["args"]["step"] for e in some if e["ph"] == "X"} == {3}


@pytest.mark.parametrize("layers", (None, (1, 1), (0, 2)))
def test_svg(layers):
    tree = ElementTree.fromstring(picture.svg(trace(), 3, layers))
    texts = [t.text for t in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert "critical path" in texts and "rank 1 block 3" in texts
    shown = {t.text.split()[0] for t in tree.iter("{http://www.w3.org/2000/svg}title")}
    assert ("lm_head" in texts) == (layers is None) and "gate_up" in shown
    titles = [t.text for t in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert not any("lm_head layer" in t or "sample layer" in t or "embed layer" in t for t in titles)
    arrows = [a for a in tree.iter("{http://www.w3.org/2000/svg}line") if a.get("marker-end")]
    assert any("arrows" in t for t in texts) == bool(arrows) and (layers is None or arrows)
    width = float(tree.get("viewBox").split()[2])
    for bar in tree.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(bar.get("x", 0)) >= 0 and float(bar.get("x", 0)) + float(bar.get("width")) <= width + 0.5


def test_layers_that_are_not_there_are_named():
    with pytest.raises(ValueError, match="layers 7 to 9 are not in step 3"):
        picture.svg(trace(), 3, (7, 9))


def test_ticks_are_round():
    assert picture.ticks(0, 1000) == [0, 200, 400, 600, 800, 1000]
    assert picture.ticks(3.1, 3.9)[0] == pytest.approx(3.2)


def test_rows_of_many_blocks_hold_the_path():
    path = critical_path(trace(), 3)
    rows = picture.rows_of(trace(), 3, 6, path)
    assert len(rows) < 8 and (path.segments[-1].rank, path.segments[-1].block) in rows


def test_rows_are_of_all_ranks():
    """Of a path through a hundred blocks: as many rows of each rank, and of each those in which the path stays longest."""
    path = picture.Path(
        0,
        tuple(
            picture.Segment("compute", Phase.QKV, 0, n % 2, n // 2, 10.0 * n, 10.0 * n + n, n % 2, n // 2) for n in range(100)
        ),
    )
    two = SimpleNamespace(shape={"world_size": 2, "num_blocks": 132})
    rows = picture.rows_of(two, 0, picture.MAX_ROWS, path)
    each = [[block for rank, block in rows if rank == of] for of in range(2)]
    assert len(rows) == picture.MAX_ROWS and each[0] == each[1] == [0, *range(36, 50), 131]
    assert picture.rows_of(two, 0) == [(rank, block) for rank in range(2) for block in range(132)]


def test_arrows_are_promised_where_they_are_drawn():
    """Of some layers always, all of them; none of a path of many hops, or through blocks that have no row."""
    hops = lambda segments: sum((s.source_rank, s.source_block) != (s.rank, s.block) for s in segments)  # noqa: E731
    path, rows = critical_path(trace(), 3), picture.rows_of(trace(), 3)
    for layers in ((1, 1), (0, 2)):
        text = picture.svg(trace(), 3, layers)
        assert text.count("marker-end") == hops(picture.in_layers(path, layers)) > 0 and "arrows" in text
    assert len(picture._arrows(list(path.segments), rows)) == hops(path.segments)
    assert not picture._arrows(list(path.segments) * (picture.MAX_ARROWS // hops(path.segments) + 1), rows)
    assert not picture._arrows(list(path.segments), rows[:1])


@lru_cache
def idle():
    """A trace in which half of the blocks have no item of attention, and take 0.1 µs to see it."""
    found = trace_of(run(blocks=8, requests=[{"prompt": [5], "max_tokens": 4}], max_rows=1))
    spans = found.spans.copy()
    none = (spans["phase"] == Phase.ATTENTION) & (spans["value"] == 0)
    spans["end"][none] = spans["begin"][none] + 0.1
    return replace(found, spans=spans, _tables={})


def test_attention_without_an_item_is_drawn_as_none():
    thin = rf'height="{picture.NARROW}"[^>]*><title>attention layer \d: 0.10 µs, no item<'
    spans = idle().of_step(2)
    attention = spans[spans["phase"] == Phase.ATTENTION]
    begun = attention["end"] > critical_path(idle(), 2).begin_us + 0.1  # the picture begins with the path
    count = int(np.count_nonzero((attention["value"] == 0) & begun))
    text = picture.svg(idle(), 2)
    assert 0 < len(re.findall(thin, text)) == count < len(attention) and "thin: no attention item" in text
    rows = picture.page_data(idle(), 2)["rows"]
    nothing = {(row["name"], span[1]) for row in rows for span in row["spans"] if span[8]}
    assert nothing == {
        (f"rank {s['rank']} block {s['block']}", int(s["layer"])) for s in attention[attention["value"] == 0]
    }  # fmt: skip


def test_the_page_says_how_far_clocks_agree():
    errors = Errors(0.6, 0.72, 0.1, 0.41)
    assert picture.page_data(replace(trace(), errors=errors, _tables={}), 3)["error"] == errors.text


def page(tmp_path, script: str = "") -> str:
    """The page's DOM after it ran in Chromium, with a script of the test's own behind it."""
    picture.write_html(trace(), 3, tmp_path / "step.html")
    text = (tmp_path / "step.html").read_text()
    assert "http" not in text and "src=" not in text  # nothing from elsewhere
    guard = "<script>window.onerror = m => { document.documentElement.dataset.error = m; };</script>"
    (tmp_path / "test.html").write_text(
        text.replace("<meta", guard + "<meta", 1).replace("</html>", f"<script>{script}</script></html>")
    )
    run = subprocess.run(
        [CHROMIUM, *HEADLESS, f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"file://{tmp_path}/test.html"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-500:]
    assert "data-error" not in run.stdout
    return run.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium was found on PATH")
def test_the_page_draws_and_zooms(tmp_path):
    script = """
      const pixels = () => [...draw2d.getImageData(0, 0, canvas.width, canvas.height).data];
      const painted = () => pixels().filter((v, i) => i % 4 < 3 && v > 0 && v < 250).length;
      const before = [from, to, painted()];
      canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: -1, clientX: 600, clientY: 300, cancelable: true }));
      const zoomed = [from, to];
      window.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
      const moved = [from, to];
      const tipped = describe({ offsetX: LEFT + 200, offsetY: BLOCKS + 5 });
      canvas.dispatchEvent(new MouseEvent("dblclick"));
      const labels = [], fillText = draw2d.fillText, lines = [], lineTo = draw2d.lineTo;
      draw2d.fillText = (text, x, y) => { labels.push([text, x + draw2d.measureText(text).width]); fillText.call(draw2d, text, x, y); };
      draw2d.lineTo = (x, y) => { lines.push(x); lineTo.call(draw2d, x, y); };
      draw();
      const right = Math.max(...labels.filter(l => l[0].endsWith("µs")).map(l => l[1])) - width(), whole = lines.length;
      data.max_arrows = 0;
      draw();
      const hidden = lines.length - whole;
      const wide = data.rows[0].spans.find(s => data.phases[s[0]] === "gate_up");
      [from, to] = [wide[2], wide[4]];
      draw();
      all();
      const head = data.rows[0].spans.find(s => data.phases[s[0]] === "lm_head");
      const last = describe({ offsetX: x(head[4] - 0.01), offsetY: BLOCKS + 5 });
      document.documentElement.dataset.result =
        JSON.stringify({ right, whole, hidden, last, labels, before, zoomed, moved, tipped, after: [from, to], us: data.us });
    """
    found = re.search(r'data-result="([^"]*)"', page(tmp_path, script))
    r = json.loads(found[1].replace("&quot;", '"'))
    assert r["us"] == pytest.approx(critical_path(trace(), 3).us)
    assert r["before"][:2] == [0, r["us"]] and r["before"][2] > 10_000  # coloured
    assert r["zoomed"][1] - r["zoomed"][0] == pytest.approx(0.8 * r["us"])
    assert r["moved"][0] > r["zoomed"][0] and r["after"] == [0, r["us"]]
    assert re.match(r"rank 0 block 0: \w+ layer \d", r["tipped"])
    assert r["right"] <= 0 and r["whole"] > 0 and r["hidden"] == 0  # the axis' labels; arrows, while they are few
    assert r["last"].startswith("rank 0 block 0: lm_head, ")
    assert {"gate_up 0", "lm_head"} <= {label for label, _ in r["labels"]}
