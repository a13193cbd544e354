"""The tokenizer inside a GGUF file: a byte-level BPE vocabulary with merges, and the name of its pre-tokenizer.

GGUF has no rules, only a name (`tokenizer.ggml.pre`); the rules below are those that llama.cpp attaches to the names
(llama-vocab.cpp).
"""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from imex_persist.model.messages import native_errors, short
from imex_persist.model.tokenizer import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(use_regex: bool):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


_PRE = {
    "gpt-2": lambda: [_byte_level(True)],
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), _byte_level(True)],
    "llama-bpe": lambda: [pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), _byte_level(False)],
}


def gguf_tokenizer(metadata: dict[str, Any], where: str) -> Tokenizer | None:
    """The tokenizer of a GGUF file's metadata, or None where it has none of a supported kind (token ids still work).

    Raises ValueError, naming `where`, for a vocabulary that contradicts itself.
    """
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or pre not in _PRE:
        return None
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    merges = metadata.get("tokenizer.ggml.merges")
    for name, value, kind in (("tokens", tokens, str), ("merges", merges, str), ("token_type", types, int)):
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise ValueError(f"{where}: tokenizer.ggml.{name} is {short(value)}, and must be a list; download the file again")
    if len(types) != len(tokens):
        raise ValueError(f"{where} has {len(tokens)} tokens and {len(types)} token types; download the file again")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    with native_errors(f"{where} has no valid BPE vocabulary", "; download the file again"):
        # llama-bpe takes a piece that is a token as a whole, whatever the merges would make of it
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(_PRE[pre]())
    backend.decoder = decoders.ByteLevel()
    added = [(token, kind == _CONTROL) for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token, control in added if control])
    backend.add_tokens([AddedToken(token, normalized=False) for token, control in added if not control])
    special = {}
    for name in ("bos", "eos", "unk", "pad"):
        index = metadata.get(f"tokenizer.ggml.{ {'unk': 'unknown', 'pad': 'padding'}.get(name, name) }_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            special[f"{name}_token"] = tokens[index]
    if metadata.get("tokenizer.ggml.add_bos_token", False) and "bos_token" in special:
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocabulary[bos])]
        )
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(backend, template if isinstance(template, str) else None, special)
