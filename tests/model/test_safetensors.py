"""Hugging Face folders: single and sharded files, three dtypes, and every way in which they can be broken."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from imex_persist.model.bf16 import to_bits
from imex_persist.model.safetensors import SafetensorsWeights
from tests.model.helpers import random_tensors, tiny

CONFIG = tiny()
TENSORS = random_tensors(CONFIG)
UP = "model.layers.1.mlp.up_proj.weight"


def sharded(folder, tensors, parts=3):
    names = sorted(tensors)
    files = {f"model-{i + 1:05}-of-{parts:05}.safetensors": names[i::parts] for i in range(parts)}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, members in files.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtypes(tmp_path, dtype):
    save_file({name: array.astype(dtype) for name, array in TENSORS.items()}, tmp_path / "model.safetensors")
    source = SafetensorsWeights(tmp_path, CONFIG)
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(source.read(name), to_bits(array.astype(dtype)))
    np.testing.assert_array_equal(source.read(UP, (3, 9), (5, 20)), to_bits(TENSORS[UP].astype(dtype))[3:9, 5:20])
    np.testing.assert_array_equal(source.read(UP, None, (5, 20)), to_bits(TENSORS[UP].astype(dtype))[:, 5:20])
    assert not source.rope_adjacent


def test_sharded(tmp_path):
    sharded(tmp_path, TENSORS)
    source = SafetensorsWeights(tmp_path, CONFIG)
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(source.read(name), to_bits(array))


def test_tied_embeddings_ignore_a_written_head(tmp_path):
    save_file(
        TENSORS | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}, tmp_path / "model.safetensors"
    )
    SafetensorsWeights(tmp_path, tiny(tie_word_embeddings=True))


def refused(folder, match, config=CONFIG):
    with pytest.raises(ValueError, match=match) as caught:
        SafetensorsWeights(folder, config)
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path):
    refused(tmp_path, "neither model.safetensors nor model.safetensors.index.json")
    files = sharded(tmp_path, TENSORS)
    (tmp_path / next(iter(files))).unlink()
    refused(tmp_path, "model-00001-of-00003.safetensors is missing")


def test_truncated_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    data = path.read_bytes()
    for size in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        refused(tmp_path, r"model\.safetensors \(\d+ bytes\) is no complete safetensors file")


def test_tensors_that_do_not_fit(tmp_path):
    path = tmp_path / "model.safetensors"

    def written(changes, match, config=CONFIG):
        save_file({k: v for k, v in (TENSORS | changes).items() if v is not None}, path)
        refused(tmp_path, match, config)

    written({UP: None}, f"no tensor {UP}")
    written({UP: TENSORS[UP].T.copy()}, r"has shape \[40, 70\], and the configuration needs \[70, 40\]")
    written({UP: TENSORS[UP].astype(np.float64)}, "stored as F64")
    written({UP: np.zeros((70, 40), np.int8)}, "stored as I8")
    written({"model.layers.0.self_attn.q_proj.bias": np.zeros(204, np.float32)}, "q_proj.bias, which no supported Llama")
    written({}, "has a tensor model.layers.1", tiny(num_hidden_layers=1))
    written({}, "has shape", tiny(vocab_size=102))


def test_broken_index(tmp_path):
    sharded(tmp_path, TENSORS)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for data, match in (
        ("{", "is not valid JSON"),
        ("[]", "holds a list"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
        (json.dumps({"weight_map": {"a": "../model.safetensors"}}), "must name files of its own folder"),
        (json.dumps({"weight_map": good["weight_map"] | {"extra": "model-00001-of-00003.safetensors"}}), "has no tensor extra"),
    ):
        index.write_text(data)
        refused(tmp_path, match)
