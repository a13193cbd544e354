"""Helpers for error messages: one sentence that says what was given, what is allowed, what to do."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any


def short(value: Any, limit: int = 60) -> str:
    """`value` as JSON would write it, cut to `limit` characters: a hostile file must not fill the terminal."""
    try:
        text = json.dumps(value, default=repr)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def one_line(error: BaseException, limit: int = 200) -> str:
    """Another package's error text as part of a sentence: no line breaks, cut to `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextlib.contextmanager
def native_errors(begin: str, end: str) -> Iterator[None]:
    """Whatever native code raises becomes a ValueError, "begin (its words) end"; a panic of Rust's is no Exception in Python."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{begin} ({one_line(error)}){end}") from None
