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
    """The text of one completion. `push` returns what may be shown now; `stop_string` is set once one was found.

    Of several stop strings the one that is complete first counts, as if characters came one by one: how the text is cut into tokens
    changes nothing. One that ends in text for which nobody looks (min_tokens) does not count, one that only begins there does.
    """

    def __init__(self, detokenizer: Detokenizer, *, stop: Sequence[str] = (), include_stop: bool = False):
        self.text = ""  # shown so far
        self.stop_string: str | None = None
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._include = include_stop
        self._held = ""  # decoded, but perhaps the start of a stop string
        self._look = True

    def push(self, token: int, *, look_for_stop: bool = True) -> str:
        """The new text after one more token."""
        self._look = look_for_stop
        return self._show(self._detokenizer.push(token))

    def finish(self) -> str:
        """What was held back, at the end: also bytes that never became a character."""
        shown = self._show(self._detokenizer.flush())
        if self.stop_string is None:
            shown += self._held
            self.text += self._held
            self._held = ""
        return shown

    def _show(self, new: str) -> str:
        if self.stop_string is not None:
            return ""
        text, old = self._held + new, len(self._held)
        self._held = ""
        found = self._first_stop(text, old) if self._look else None
        if found is not None:
            at, self.stop_string = found
            text = text[: at + len(self.stop_string)] if self._include else text[:at]
        elif keep := max((_overlap(text, s) for s in self._stop), default=0):
            text, self._held = text[:-keep], text[-keep:]
        self.text += text
        return text

    def _first_stop(self, text: str, old: int) -> tuple[int, str] | None:
        """(place, stop string) of the one that ends first, behind the `old` characters that were there before."""
        places = ((text.find(s, max(0, old - len(s) + 1)), s) for s in self._stop)
        return min(((at, s) for at, s in places if at >= 0), key=lambda each: (each[0] + len(each[1]), each[0]), default=None)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
