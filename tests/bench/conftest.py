"""What the benchmark's tests share: a model small enough for the simulator, and the command run in this process."""

from __future__ import annotations

import json
import sys

import pytest

from imex_persist.cli import main

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
}

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="worker processes share memory through /proc")


@pytest.fixture
def model(tmp_path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


@pytest.fixture
def bench(capsys):
    """bench("decode", …) runs `imex-persist bench decode … --json` and returns the object."""

    def run(*words: str) -> dict:
        assert main(["bench", *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run
