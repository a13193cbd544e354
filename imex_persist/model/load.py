"""A model by name: its configuration, a source of weights, and a tokenizer if it has one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from imex_persist.config import LOAD_FORMATS
from imex_persist.model.config import ModelConfig, read_json, token_ids
from imex_persist.model.dummy import DummyWeights
from imex_persist.model.locate import locate
from imex_persist.model.tokenizer import Tokenizer
from imex_persist.model.weights import WeightSource


@dataclass(frozen=True)
class Model:
    """What `load_model` found. `weights` reads the files as it is asked; `tokenizer` is None where there is none."""

    name: str
    path: Path
    config: ModelConfig
    weights: WeightSource
    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...]

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ValueError, for a prompt given as text, if the model has none."""
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer that can be used, so text cannot be read; give lists of token ids")
        return self.tokenizer


def load_model(model: str | os.PathLike, load_format: str = "auto", *, seed: int = 0, xp=None, tokenizer: bool = True) -> Model:
    """Finds `model` (locate.py) and opens it; no weight is read yet.

    `load_format` "dummy" needs a config.json only (or a GGUF header) and makes random weights from `seed`, with the array
    module `xp` (numpy, or cupy to make them on the GPU). `tokenizer=False` skips it, for ranks. Raises ValueError for
    whatever is missing, broken or not supported.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format {load_format!r} is not supported; it must be {' or '.join(LOAD_FORMATS)}")
    path = locate(model)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return _from_gguf(str(model), path, load_format, seed, xp, tokenizer)
    config = ModelConfig.from_folder(path)
    if load_format == "dummy":
        weights: WeightSource = _dummy(config, seed, xp)
    else:
        from imex_persist.model.safetensors import SafetensorsWeights

        weights = SafetensorsWeights(path, config)
    text = Tokenizer.from_folder(path) if tokenizer else None
    return Model(_name(model), path, config, weights, text, _stop_ids(path, config))


def _from_gguf(name: str, path: Path, load_format: str, seed: int, xp, tokenizer: bool) -> Model:
    from imex_persist.model.gguf import GgufWeights
    from imex_persist.model.gguf_tokenizer import gguf_tokenizer

    source = GgufWeights(path)
    weights = _dummy(source.config, seed, xp) if load_format == "dummy" else source
    text = gguf_tokenizer(source.metadata, str(path)) if tokenizer else None
    return Model(_name(name), path, source.config, weights, text, source.config.eos_token_id)


def _dummy(config: ModelConfig, seed: int, xp) -> DummyWeights:
    return DummyWeights(config, seed) if xp is None else DummyWeights(config, seed, xp)


def _name(model: str | os.PathLike) -> str:
    name = Path(os.path.normpath(os.fspath(model))).name or Path(model).resolve().name
    return name.removesuffix(".gguf")


def _stop_ids(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    """generation_config.json's end tokens, which chat models extend, and config.json's."""
    path = folder / "generation_config.json"
    if not path.exists():
        return config.eos_token_id
    extra = read_json(path).get("eos_token_id")
    try:
        return tuple(dict.fromkeys(token_ids("eos_token_id", extra) + config.eos_token_id))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
