"""Where settings come from: flags, then one configuration file, then the environment, then defaults.

All three speak of the fields of config.EngineConfig: `max_rows` is --max-rows, `max_rows = 4` in the file (TOML, flat) and
IMEX_MAX_ROWS. Nothing else is taken: an unknown key or IMEX_ variable is an error that names what was probably meant.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imex_persist.config import EngineConfig

CONFIG_VARIABLE = "IMEX_CONFIG"
OTHER_VARIABLES = {  # read elsewhere, and no settings of an engine
    CONFIG_VARIABLE: "the configuration file, where --config names none",
    "IMEX_CACHE": "folder of compiled kernels and of models (default ~/.cache/imex_persist, below $XDG_CACHE_HOME if that is set)",
    "CUDA_VISIBLE_DEVICES": "the GPUs that are counted: indices in PCI bus order, or UUIDs",
    "HF_HOME": "where Hub names are looked up (also HF_HUB_CACHE); nothing is ever downloaded",
    "CXX": "compiler of the simulator (default: g++, c++, clang++, then the ziglang wheel)",
    "NO_COLOR": "tables without colours",
}
# what Kubernetes and Docker links put into every container beside a service named "imex"
_INJECTED = re.compile(r"IMEX_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP)(_\w+)?)?|NAME|ENV_\w+)")
_BOOLS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_METAVARS = {int: "N", float: "S", str: "NAME"}


@dataclass(frozen=True)
class Setting:
    """One field as its users know it."""

    name: str
    kind: type  # int, float, str or bool
    default: Any  # dataclasses.MISSING: must be given
    text: str
    flags: tuple[str, ...]  # none for the model, which is an argument
    variables: tuple[str, ...]  # the first that is set counts


@dataclass(frozen=True)
class Value:
    """A setting's value and where it is from."""

    value: Any
    source: str  # "flag", "default", the file's path, or "$NAME"


def settings(definition: type = EngineConfig) -> list[Setting]:
    """Every setting that a configuration dataclass defines."""
    hints = typing.get_type_hints(definition)
    out = []
    for field in dataclasses.fields(definition):
        kinds = [kind for kind in typing.get_args(hints[field.name]) or (hints[field.name],) if kind is not type(None)]
        flag = "--" + field.name.replace("_", "-")
        flags = () if field.name == "model" else (flag, *field.metadata.get("flags", ()))
        variables = (f"IMEX_{field.name.upper()}", *field.metadata.get("environment", ()))
        out.append(Setting(field.name, kinds[0], field.default, field.metadata.get("text", ""), flags, variables))
    return out


# -------------------------------------------------------------------------------------------------- the command line
def add_options(command: argparse.ArgumentParser, *, only: tuple[str, ...] | None = None, **defaults: Any) -> None:
    """A flag for every setting, or for `only` some, and --config. `defaults` are this command's own. `apply` does the rest."""
    for one in settings():
        if one.flags and (only is None or one.name in only):
            default = defaults.get(one.name, one.default)
            text = one.text + ("" if default is None else f" (default {default})")
            text = text.replace("%", "%%")
            if one.kind is bool:
                command.add_argument(*one.flags, action=argparse.BooleanOptionalAction, default=None, help=text)
            else:
                command.add_argument(*one.flags, type=one.kind, metavar=_METAVARS[one.kind], help=text)
    command.add_argument("--config", metavar="FILE", help=f"settings in TOML (default ${CONFIG_VARIABLE})")
    command.set_defaults(engine_defaults=defaults)


def apply(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> None:
    """Completes the namespace of a command that has `add_options`: what no flag gave comes from file, environment or default.

    `args.sources` says where each value is from. Raises ValueError in one sentence for whatever is wrong with any of them.
    """
    if not hasattr(args, "engine_defaults"):
        return
    flags = {one.name: getattr(args, one.name, None) for one in settings()}
    values = resolve(flags, args.config or environ.get(CONFIG_VARIABLE) or None, environ, args.engine_defaults)
    for name, value in values.items():
        setattr(args, name, value.value)
    args.sources = {name: value.source for name, value in values.items()}


def require_model(args: argparse.Namespace) -> str:
    """Raises ValueError if no model was named anywhere."""
    if args.model is None:
        raise ValueError(
            "no model was given: name one on the command line, as IMEX_MODEL, or as model in the configuration file"
        )
    return args.model


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of `args` after `apply`, as EngineConfig and LLM take them; without `model`."""
    return {one.name: getattr(args, one.name) for one in settings() if one.flags}


def resolve(
    flags: Mapping[str, Any],
    file: str | os.PathLike | None,
    environ: Mapping[str, str],
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Value]:
    """Every setting's value by name, and its source; `model` is None where nobody names one. Raises ValueError."""
    defaults = defaults or {}
    layers = [
        {name: Value(value, "flag") for name, value in flags.items() if value is not None},
        {} if file is None else read_file(file),
        from_environment(environ),
        {name: Value(value, "default") for name, value in defaults.items()},
        {one.name: Value(None if one.default is dataclasses.MISSING else one.default, "default") for one in settings()},
    ]
    values = {one.name: next(layer[one.name] for layer in layers if one.name in layer) for one in settings()}
    _validate(values)
    return values


def _validate(values: Mapping[str, Value]) -> None:
    given = {name: value.value for name, value in values.items() if value.value is not None}
    try:
        EngineConfig(**{"model": "any", **given})
    except ValueError as error:
        source = values.get(str(error).partition(" ")[0], Value(None, "default")).source
        raise ValueError(str(error) if source in ("flag", "default") else f"{error} (it is from {source})") from None


# -------------------------------------------------------------------------------------------------- the file
def read_file(path: str | os.PathLike) -> dict[str, Value]:
    """The settings in a TOML file. Raises ValueError for a file that cannot be read, is no TOML, or has a key that is no setting."""
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"the configuration file {path} cannot be read ({error.strerror}): name another with --config"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the configuration file {path} is no TOML: {error}") from None
    known = {one.name: one for one in settings()}
    for name, value in data.items():
        if name not in known:
            raise ValueError(f"{path}: {name} is no setting{_meant(name, known)}")
        kinds = (int, float) if known[name].kind is float else (known[name].kind,)
        if name != "p2p_level" and (not isinstance(value, kinds) or isinstance(value, bool) != (known[name].kind is bool)):
            raise ValueError(f"{path}: {name} is {value!r}: {_kind_text(known[name].kind)} is allowed")
    return {name: Value(value, str(path)) for name, value in data.items()}


# -------------------------------------------------------------------------------------------------- the environment
def from_environment(environ: Mapping[str, str]) -> dict[str, Value]:
    """The settings in environment variables; an empty one counts as unset. Raises ValueError for one that is no setting or no number."""
    known = {name for one in settings() for name in one.variables} | set(OTHER_VARIABLES)
    for name in sorted(environ):
        if name.startswith("IMEX_") and name not in known and not _INJECTED.fullmatch(name):
            raise ValueError(f"the environment variable {name} is no setting{_meant(name, known)}")
    out = {}
    for one in settings():
        for name in one.variables:
            if text := environ.get(name, "").strip():
                out[one.name] = Value(_parse(name, text, one.kind), f"${name}")
                break
    return out


def _parse(name: str, text: str, kind: type) -> Any:
    try:
        return _BOOLS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"the environment variable {name} is {text!r}: {_kind_text(kind)} is allowed") from None


def _kind_text(kind: type) -> str:
    return {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[kind]


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), known, 1)
    return f": did you mean {close[0]}?" if close else f": known are {', '.join(sorted(known))}"


# -------------------------------------------------------------------------------------------------- the table
TABLE_BEGIN, TABLE_END = "<!-- settings: imex-persist config --markdown -->", "<!-- settings end -->"


def markdown() -> str:
    """README's table of settings and variables."""
    lines = ["| setting | flag | environment | default | what it is |", "|---|---|---|---|---|"]
    for one in settings():
        default = "" if one.default in (None, dataclasses.MISSING) else f"`{one.default}`"
        flags = " ".join(f"`{flag}`" for flag in one.flags) or "`MODEL`"
        variables = " ".join(f"`{name}`" for name in one.variables)
        lines.append(f"| `{one.name}` | {flags} | {variables} | {default} | {one.text} |")
    lines += ["", "| variable | what it is |", "|---|---|"]
    lines += [f"| `{name}` | {text} |" for name, text in OTHER_VARIABLES.items()]
    return "\n".join(lines) + "\n"
