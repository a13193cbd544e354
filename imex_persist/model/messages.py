"""Helpers for error messages: one sentence that says what was given, what is allowed, what to do."""

from __future__ import annotations

import json
from typing import Any


def short(value: Any, limit: int = 60) -> str:
    """`value` as JSON would write it, cut to `limit` characters: a hostile file must not fill the terminal."""
    try:
        text = json.dumps(value, default=repr)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def one_line(error: Exception, limit: int = 200) -> str:
    """Another package's error text as part of a sentence: no line breaks, cut to `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
