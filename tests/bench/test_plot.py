"""Plots from a bench's JSON: what is in them, and that the same file gives the same bytes."""

from __future__ import annotations

import json
import xml.etree.ElementTree as xml

import pytest

from imex_persist.bench.plot import exchange_series, step_series
from imex_persist.cli import main

WHERE = {"device": "cuda", "cards": [{"name": "NVIDIA H200"}], "driver": "580", "commit": "abc", "version": "0", "packages": {}}
DECODE = {
    "bench": "decode",
    "where": WHERE,
    "model": "llama-3.2-1b",
    "tensor_parallel_size": 1,
    "rows": [
        {"kind": "prompt", "rows": 1, "context": 512, "us": 9e4, "bound_us": 5e4},
        *(
            {"kind": "decode", "rows": r, "context": c, "us": 600 + c / 50, "bound_us": 542.0}
            for r in (1, 8)
            for c in (128, 2048)
        ),
    ],
    "peers": [
        {"name": "torch.compile, CUDA graphs", "rows": [{"kind": "decode", "rows": 1, "context": 128, "us": 1329.0}]},
        {"name": "vLLM", "why_not": "vllm is not installed"},
    ],
}
EXCHANGE = {
    "bench": "exchange",
    "where": WHERE,
    "tensor_parallel_size": 2,
    "rows": [
        {"variant": "ONE_SHOT", "values": 2048, "us": 1.66, "bound_us": 1.1},
        {"variant": "ONE_SHOT", "values": 4096, "us": 2.46, "bound_us": 1.3},
        {"variant": "TWO_SHOT", "values": 2048, "why_not": "no room"},
    ],
    "peers": [{"name": "NCCL in a CUDA graph", "rows": [{"values": 2048, "us": 14.0}]}],
}


def test_the_series():
    assert dict(step_series(DECODE, 1)) == {
        "floor: bytes ÷ read ceiling": [(128, 0.542), (2048, 0.542)],
        "imex-persist": [(128, pytest.approx(0.60256)), (2048, pytest.approx(0.64096))],
        "torch.compile, CUDA graphs": [(128, 1.329)],
    }
    assert dict(exchange_series(EXCHANGE)) == {
        "floor": [(2048, 1.1), (4096, 1.3)],
        "imex-persist ONE_SHOT": [(2048, 1.66), (4096, 2.46)],
        "NCCL in a CUDA graph (bf16)": [(2048, 14.0)],
    }


@pytest.mark.parametrize("record", [DECODE, EXCHANGE], ids=lambda r: r["bench"])
def test_a_picture(tmp_path, record):
    pytest.importorskip("matplotlib", reason="plots need the extra 'plot'")
    source, out = tmp_path / "bench.json", tmp_path / "picture.svg"
    source.write_text(json.dumps(record))
    assert main(["bench", "plot", str(source), "--out", str(out)]) == 0
    first = out.read_bytes()
    text = " ".join(xml.fromstring(first).itertext())
    for words in ("NVIDIA H200", "floor", "imex-persist", "torch.compile" if record is DECODE else "NCCL in a CUDA graph"):
        assert words in text
    assert main(["bench", "plot", str(source), "--out", str(out)]) == 0 and out.read_bytes() == first


@pytest.mark.parametrize(
    ("content", "words", "says"),
    [
        ("{", ["--out", "x.svg"], "cannot be read as a bench's JSON"),
        ('{"bench": "floor"}', ["--out", "x.svg"], "is no JSON of 'bench decode' or 'bench exchange'"),
        (json.dumps(DECODE), ["--out", "x.gif"], "ends in .svg or .png"),
        (json.dumps(DECODE), ["--out", "/nowhere/x.svg"], "--out is '/nowhere/x.svg': /nowhere is no folder"),
        ('{"bench": "decode"}', ["--out", "x.svg"], "is not all that a bench writes (KeyError('rows'))"),
        ('{"bench": "exchange", "rows": 1}', ["--out", "x.svg"], "is not all that a bench writes (TypeError"),
        (json.dumps(DECODE | {"rows": DECODE["rows"][:1]}), ["--out", "x.svg"], "no step was measured, only prompts"),
        (json.dumps(EXCHANGE | {"rows": EXCHANGE["rows"][2:]}), ["--out", "x.svg"], "no exchange was measured"),
        (json.dumps(DECODE), ["--out", "x.svg", "--rows", "3"], "nothing was measured with 3 rows"),
    ],
)
def test_bad_input_is_a_sentence(capsys, tmp_path, content, words, says):
    source = tmp_path / "bench.json"
    source.write_text(content)
    assert main(["bench", "plot", str(source), *words]) == 2
    assert says in capsys.readouterr().err
