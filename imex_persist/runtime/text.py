"""From token ids to text while they come: whole characters only, and nothing that might still turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """What is asked of model/detokenizer.py: whole characters, in order."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...

    def decode_one(self, token_id: int) -> str: ...


class TextStream:
    """The text of one completion. `push` returns what may be shown now; `stop_string` is set once one was found."""

    def __init__(self, detokenizer: Detokenizer, *, stop: Sequence[str] = (), include_stop: bool = False):
        self.text = ""  # shown so far
        self.stop_string: str | None = None
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._include = include_stop
        self._held = ""  # decoded, but perhaps the start of a stop string

    def push(self, token: int, *, look_for_stop: bool = True) -> str:
        """The new text after one more token."""
        return self._show(self._detokenizer.push(token), look_for_stop)

    def finish(self) -> str:
        """What was held back, at the end: also bytes that never became a character."""
        shown = self._show(self._detokenizer.flush(), look_for_stop=True)
        if self.stop_string is None:
            shown += self._held
            self.text += self._held
            self._held = ""
        return shown

    def _show(self, new: str, look_for_stop: bool) -> str:
        if self.stop_string is not None:
            return ""
        text = self._held + new
        self._held = ""
        if self._stop and look_for_stop:
            found = min(((at, s) for s in self._stop if (at := text.find(s)) >= 0), default=None)
            if found is not None:
                at, self.stop_string = found
                text = text[: at + len(self.stop_string)] if self._include else text[:at]
            elif keep := max(_overlap(text, s) for s in self._stop):
                text, self._held = text[:-keep], text[-keep:]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
