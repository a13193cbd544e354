"""Flags over the file over the environment over defaults; whatever is unknown is named."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from imex_persist.cli import main
from imex_persist.config import EngineConfig
from imex_persist.front import settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "imex.toml"

    def write(text: str) -> str:
        path.write_text(text)
        return str(path)

    return write


def applied(arguments=(), environ=None, **defaults) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    settings.add_options(parser, **defaults)
    args = parser.parse_args(list(arguments))
    settings.apply(args, environ or {})
    return args


def test_the_order(file):
    path = file("max_rows = 4\nmax_num_seqs = 5\nmodel = 'm'\ndeadline_s = 3")
    environ = {"IMEX_MAX_ROWS": "2", "IMEX_MAX_NUM_SEQS": "2", "IMEX_SEED": "2", "IMEX_CONFIG": path}
    args = applied(["--max-rows", "6"], environ, device="sim")
    assert (args.max_rows, args.max_num_seqs, args.seed, args.device, args.model) == (6, 5, 2, "sim", "m")
    assert args.sources["max_rows"] == "flag" and args.sources["max_num_seqs"] == path
    assert args.sources["seed"] == "$IMEX_SEED" and args.sources["device"] == "default"
    EngineConfig(model=args.model, **settings.chosen(args))
    assert applied(["x", "--config", path]).model == "x"


def test_a_command_s_default_is_the_last_resort():
    assert applied(tensor_parallel_size=2).tensor_parallel_size == 2
    assert applied(environ={"NIM_TENSOR_PARALLEL_SIZE": "3"}, tensor_parallel_size=2).tensor_parallel_size == 3
    assert applied(environ={"IMEX_MAX_ROWS": " "}).max_rows is None  # empty is unset
    assert applied().model is None


def test_other_programs_words():
    both = {"IMEX_TENSOR_PARALLEL_SIZE": "2", "NIM_TENSOR_PARALLEL_SIZE": "4"}
    assert applied(environ=both).sources["tensor_parallel_size"] == "$IMEX_TENSOR_PARALLEL_SIZE"
    for given, meant in {"NVL": "NVL", "loc": "LOC", "0": "LOC", "2": "PXB", "9": "SYS"}.items():
        args = applied(environ={"NCCL_P2P_LEVEL": given})
        assert EngineConfig(model="x", **settings.chosen(args)).p2p_level == meant


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"IMEX_MAX_ROW": "2"}, "IMEX_MAX_ROW is no setting: did you mean IMEX_MAX_ROWS?"),
        ({"IMEX_ZZZ": "2"}, "known are"),
        ({"IMEX_MAX_ROWS": "two"}, "IMEX_MAX_ROWS is 'two': an integer"),
        ({"IMEX_MAX_ROWS": "99"}, "max_rows is 99: an integer of 1 to 16 is allowed (it is from $IMEX_MAX_ROWS)"),
        ({"NIM_TENSOR_PARALLEL_SIZE": "0"}, "it is from $NIM_TENSOR_PARALLEL_SIZE"),
        ({"NCCL_P2P_LEVEL": "FAR"}, "p2p_level is 'FAR': one of 'LOC', 'NVL'"),
        ({"IMEX_CONFIG": "/nowhere.toml"}, "/nowhere.toml cannot be read"),
    ],
)
def test_a_bad_environment_is_one_sentence(environ, words, monkeypatch, capsys):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(["config"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max-rows = 2", "max-rows is no setting: did you mean max_rows?"),
        ("[engine]\nmax_rows = 2", "engine is no setting"),
        ("max_rows = '2'", "max_rows is '2': an integer is allowed"),
        ("seed = true", "seed is True: an integer"),
        ("exchange = 3", "a string is allowed"),
        ("max_rows = ", "is no TOML"),
        ("max_rows = 99", "it is from"),
        ("device = 'sim'\nmodel = ''", "model is ''"),
    ],
)
def test_a_bad_file_is_one_sentence(file, capsys, text, words):
    assert main(["config", "--config", file(text)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and len(err.splitlines()) == 1


def test_what_kubernetes_injects_is_no_setting():
    names = "IMEX_SERVICE_HOST IMEX_SERVICE_PORT_HTTP IMEX_PORT IMEX_PORT_8000_TCP IMEX_PORT_8000_TCP_ADDR IMEX_GPU_SERVICE_HOST".split()
    assert settings.from_environment(dict.fromkeys(names, "tcp://10.0.0.1:8000")) == {}


def test_config_prints_values_and_sources(capsys, monkeypatch):
    monkeypatch.setenv("IMEX_SEED", "7")
    assert main(["config", "--json", "--tp", "2"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["seed"] == {"value": 7, "source": "$IMEX_SEED"} and shown["tensor_parallel_size"]["source"] == "flag"
    assert main(["config"]) == 0
    assert {"seed = 7  ($IMEX_SEED)", "model = not given  (default)"} <= set(capsys.readouterr().out.splitlines())


def test_every_setting_says_what_it_is():
    assert all(one.text for one in settings.settings())


def test_readme_has_the_table():
    readme = ROOT / "README.md"
    text = readme.read_text() if readme.is_file() else ""
    if settings.TABLE_BEGIN not in text:
        pytest.skip("README.md has no markers")
    table = text.split(settings.TABLE_BEGIN)[1].split(settings.TABLE_END)[0]
    assert table.strip() == settings.markdown().strip(), "README's table is out of date: imex-persist config --markdown"


def test_generate_needs_a_model_from_somewhere(capsys, monkeypatch):
    assert main(["generate", "--prompt", "x"]) == 2
    assert "no model was given" in capsys.readouterr().err
    monkeypatch.setenv("IMEX_MODEL", "/nowhere")
    assert main(["generate", "--prompt", "x", "--device", "sim"]) == 2
    assert "/nowhere" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, where nothing can be written")
def test_output_that_cannot_be_written_is_one_sentence():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "imex_persist", "config", "--markdown"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert re.fullmatch(r"imex-persist: error: .*No space left on device.*\n", done.stderr), done.stderr
