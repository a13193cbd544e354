"""Text out of a stream of token ids, one at a time, never half a character.

A token may end inside a UTF-8 character, and some decoders look at the token before. So each step decodes the tokens since
the last clean end together with a few before them, and holds back a tail of replacement characters that the next token may
complete.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

_REPLACEMENT = "\ufffd"
_MAX_HELD = 3  # a UTF-8 character has at most three bytes before its last
_MAX_PENDING = 64  # tokens without a clean end, which no text has: from there on bytes are shown as they decode


class Detokenizer:
    """Incremental decoder over `decode(ids) -> str`; ids in `skipped` (special tokens) give no text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], skipped: Collection[int] = ()):
        self._decode, self._skipped = decode, skipped
        self._context: list[int] = []  # tokens whose text is out, kept because decoders look back
        self._pending: list[int] = []  # tokens since then
        self._sent = 0  # characters of the pending tokens' text that are out already

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a character is incomplete."""
        if token_id in self._skipped:
            return self.flush()  # nothing after it can complete a character before it
        self._pending.append(token_id)
        text = self._text()
        whole = text.rstrip(_REPLACEMENT)
        held = min(len(text) - len(whole), _MAX_HELD) if len(self._pending) < _MAX_PENDING else 0
        ready = text[self._sent : len(text) - held]
        if held == 0 and text:
            self._context, self._pending, self._sent = self._pending, [], 0
        else:
            self._sent += len(ready)
        return ready

    def flush(self) -> str:
        """Whatever is held back, at the end of a stream: replacement characters for a character that never became whole."""
        rest = self._text()[self._sent :] if self._pending else ""
        self._context, self._pending, self._sent = self._pending or self._context, [], 0
        return rest

    def decode_one(self, token_id: int) -> str:
        """The text of a token on its own, special or not; replacement characters where it is part of a character."""
        return self._decode([token_id])

    def _text(self) -> str:
        before = self._decode(self._context) if self._context else ""
        return self._decode(self._context + self._pending)[len(before) :]
