"""Timelines: valid for the viewers they are for. The HTML page is run in headless Chromium where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from functools import lru_cache
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from imex_persist.abi import Phase
from imex_persist.observe import chrome, picture
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
      document.documentElement.dataset.result = JSON.stringify({ before, zoomed, moved, tipped, after: [from, to], us: data.us });
    """
    found = re.search(r'data-result="([^"]*)"', page(tmp_path, script))
    r = json.loads(found[1].replace("&quot;", '"'))
    assert r["us"] == pytest.approx(critical_path(trace(), 3).us)
    assert r["before"][:2] == [0, r["us"]] and r["before"][2] > 10_000  # coloured
    assert r["zoomed"][1] - r["zoomed"][0] == pytest.approx(0.8 * r["us"])
    assert r["moved"][0] > r["zoomed"][0] and r["after"] == [0, r["us"]]
    assert re.match(r"rank 0 block 0: \w+ layer \d", r["tipped"])
