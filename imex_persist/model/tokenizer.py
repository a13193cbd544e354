"""Text to token ids and back: a Hugging Face folder's `tokenizer.json`, or the vocabulary inside a GGUF file
(gguf_tokenizer.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from imex_persist.model.chat import ChatTemplate
from imex_persist.model.config import read_json
from imex_persist.model.detokenizer import Detokenizer
from imex_persist.model.messages import native_errors

MAX_TEMPLATE_BYTES = 1 << 20


class Tokenizer:
    """A `tokenizers.Tokenizer` with the model's chat template."""

    def __init__(
        self, backend: tokenizers.Tokenizer, chat_template: str | None = None, special: Mapping[str, str] | None = None
    ):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.chat_template = None if chat_template is None else ChatTemplate(chat_template, special)
        self._special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer | None:
        """The tokenizer of a Hugging Face folder, or None where it has no tokenizer.json. Raises ValueError for a broken
        one.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        with native_errors(f"{path} is no valid tokenizer", "; download it again"):
            backend = tokenizers.Tokenizer.from_file(str(path))
        settings_path = folder / "tokenizer_config.json"
        settings = read_json(settings_path) if settings_path.exists() else {}
        return cls(backend, _template_of(folder, settings), _special_tokens(settings))

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` adds what the tokenizer puts around a plain prompt, such as BOS."""
        if not isinstance(text, str):
            raise ValueError(f"a prompt must be text or a list of token ids, and this is a {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the prompt has characters that UTF-8 cannot encode (lone surrogates); remove them") from None
        with native_errors("the model's tokenizer cannot read this prompt", "; download tokenizer.json again"):
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of all of `token_ids` at once."""
        with native_errors("the model's tokenizer cannot decode these tokens", "; download tokenizer.json again"):
            return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        """A decoder for one stream of generated tokens."""
        skipped = self._special_ids if skip_special_tokens else ()
        return Detokenizer(lambda ids: self.backend.decode(ids, skip_special_tokens=False), skipped)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any
    ) -> str:
        """The prompt text of a conversation. Raises ValueError if the model has no chat template or it refuses the messages."""
        if self.chat_template is None:
            raise ValueError("this model has no chat template; give a plain prompt or token ids")
        return self.chat_template.render(messages, add_generation_prompt, **extra)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any) -> list[int]:
        """Token ids of a conversation. The template writes BOS itself, so none is added."""
        return self.encode(self.apply_chat_template(messages, add_generation_prompt, **extra), add_special_tokens=False)


def _template_of(folder: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja if it is there, else tokenizer_config.json's: a string, or a list of named ones with a `default`."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            data = path.read_bytes()[: MAX_TEMPLATE_BYTES + 1]
            if len(data) > MAX_TEMPLATE_BYTES:
                raise ValueError(f"{path} has more than the {MAX_TEMPLATE_BYTES} bytes allowed; is it the right file?")
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text; download it again") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict) and isinstance(t.get("name"), str)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template must be text; download it again")
    return template


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like as the template sees them; each is a string or an object with `content`."""
    found = {}
    for name, value in settings.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[name] = text
    return found
