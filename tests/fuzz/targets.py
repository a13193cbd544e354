"""What strangers and users may hand in, and the code that must take it or refuse it in one sentence.

A target makes inputs, by a Hypothesis strategy or from the numbers 0, 1, 2, … (quicker: good files with random damage), and has a function
that takes one. The function may return, or raise ValueError with a short sentence; anything else is a
find. Names of the targets are those of the command line of tests/fuzz/run.py.
"""

from __future__ import annotations

import json
import string
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save

from imex_persist.model.config import LIMITS, NEUTRAL, ModelConfig
from imex_persist.model.rope import rope_table
from imex_persist.model.safetensors import SafetensorsWeights
from imex_persist.model.shard import model_shape
from imex_persist.model.tokenizer import Tokenizer
from imex_persist.runtime import inputs
from imex_persist.runtime.engine import Engine
from imex_persist.runtime.mailbox import ArenaLayout, Mailbox
from imex_persist.sampling_params import SamplingParams
from tests.model.helpers import TINY, random_tensors, tiny

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6
)
PLAUSIBLE = st.integers(-1, 200) | st.sampled_from([1.0, 1e-5, 0.5, 1e4, "silu", True, False, None, [], [2]])
HUGE = st.integers(0, 300) | st.sampled_from([2**k + d for k in (15, 16, 31, 32, 40, 47, 48, 63) for d in (-1, 0, 1)])
SEED = st.integers(0, 2**32 - 1)
COUNTS = (0, 1, 255, 2**31, 2**32 - 1, 2**48, 2**63, 2**64 - 1)  # what may stand where a length stands


@dataclass(frozen=True)
class Target:
    inputs: int  # of the whole run
    act: Callable[[object], None]
    strategy: st.SearchStrategy | None
    make: Callable[[int], object] | None = None


@cache
def folder() -> Path:
    """This process's own."""
    return Path(tempfile.mkdtemp(prefix="imex-fuzz-"))


def damage(data: bytes, seed: int, begin: int, end: int) -> bytes:
    """A few bytes changed, cut out, put in, or the end cut off, within [begin, end)."""
    rng, out = np.random.default_rng(seed), bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at, kind = int(rng.integers(begin, max(begin + 1, min(end, len(out))))), int(rng.integers(6))
        if kind <= 1:
            out[at : at + 1] = bytes([int(rng.integers(256))])
        elif kind == 2:
            out[at : at + 8] = struct.pack("<Q", COUNTS[int(rng.integers(len(COUNTS)))])
        elif kind == 3:
            del out[at : at + int(rng.integers(1, 9))]
        elif kind == 4:
            out[at:at] = bytes(int(b) for b in rng.integers(0, 256, int(rng.integers(1, 9))))
        elif rng.integers(4) == 0:
            del out[at:]
    return bytes(out)


# ------------------------------------------------------------------------------------------------ config.json
FIELDS = sorted(
    {*LIMITS, *NEUTRAL, *TINY, "rope_scaling", "rope_parameters", "bos_token_id", "tie_word_embeddings", "layer_types"}
)
ROPE = st.fixed_dictionaries(
    {},
    optional={key: PLAUSIBLE | st.sampled_from(["linear", "llama3", "default", "yarn"]) for key in (
        "type", "rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "rope_theta",
    )},
)  # fmt: skip


def config_fields(changes: dict) -> None:
    config = ModelConfig.from_dict(TINY | changes)
    assert np.isfinite(rope_table(config, 3)).all()
    model_shape(config, 3)


def config_file(data: bytes) -> None:
    (folder() / "config.json").write_bytes(data)
    ModelConfig.from_folder(folder())


JSON_TEXT = ANYTHING.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60)


def damaged_config(number: int) -> bytes:
    return damage(json.dumps(TINY).encode(), number, 0, 1000)


# ------------------------------------------------------------------------------------------------ safetensors
@cache
def good_safetensors() -> bytes:
    return save(random_tensors(tiny()))


def _header(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 64


SAFETENSORS_ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I64", "F8_E4M3", "", 3, None]),
        "shape": st.lists(HUGE | st.integers(-2, 2), max_size=4) | SCALARS,
        "data_offsets": st.lists(HUGE | st.integers(-2, 2), max_size=3) | SCALARS,
    },
)
SAFETENSORS_BYTES = st.dictionaries(
    st.sampled_from(["model.norm.weight", "__metadata__", "a", ""]), SAFETENSORS_ENTRY | SCALARS, max_size=3
).map(_header) | st.binary(max_size=40)


def damaged_safetensors(number: int) -> bytes:
    data = good_safetensors()
    return damage(data, number, 0, 8 + int.from_bytes(data[:8], "little"))


def safetensors(data: bytes) -> None:
    (folder() / "model.safetensors").write_bytes(data)
    SafetensorsWeights(folder(), tiny())


# ------------------------------------------------------------------------------------------------ GGUF
@cache
def good_gguf() -> tuple[bytes, int]:
    """(a file, bytes of its header)."""
    from imex_persist.model.gguf_file import read_header
    from tests.model import test_gguf as made

    text = [
        ("add_tokenizer_model", "gpt2"), ("add_tokenizer_pre", "smollm"), ("add_token_list", ["a", "b", "ab", "<s>"]),
        ("add_token_types", [1, 1, 1, 3]), ("add_token_merges", ["a b"]), ("add_chat_template", "{{ messages[0].content }}"),
    ]  # fmt: skip
    path = made.write(folder() / "good.gguf", made.gguf_tensors(made.TENSORS), text)
    first = min(tensor.offset for tensor in read_header(path).tensors.values())
    return path.read_bytes(), first


def _gguf_of(keys: dict, tensors: list) -> bytes:
    """A header of such metadata, whose values are (type, packed bytes), and such tensors (name, dims, type, offset)."""
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(keys))]
    for key, (kind, value) in keys.items():
        out += [struct.pack("<Q", len(key)), key.encode(), struct.pack("<I", kind), value]
    for name, dims, kind, offset in tensors:
        out += [
            struct.pack("<Q", len(name)),
            name.encode(),
            struct.pack("<I", len(dims)),
            *(struct.pack("<Q", d) for d in dims),
        ]
        out.append(struct.pack("<IQ", kind, offset))
    return b"".join(out) + b"\0" * 64


GGUF_KEY = st.sampled_from(
    ["general.architecture", "general.alignment", "llama.embedding_length", "llama.block_count", "llama.attention.head_count",
     "llama.rope.freq_base", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"]
)  # fmt: skip
GGUF_VALUE = st.tuples(
    st.integers(0, 14),
    st.binary(max_size=12)
    | st.builds(lambda kind, size, rest: struct.pack("<IQ", kind, size) + rest, st.integers(0, 13), HUGE.filter(lambda v: v < 2**64),
                st.binary(max_size=20))
    | st.just(struct.pack("<Q", 5) + b"llama"),
)  # fmt: skip
GGUF_TENSOR = st.tuples(
    st.sampled_from(["token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight", "blk.9999.attn_q.weight", "x"]),
    st.lists(HUGE, max_size=5), st.integers(0, 40), HUGE,
)  # fmt: skip
GGUF_BYTES = st.builds(
    _gguf_of, st.dictionaries(GGUF_KEY, GGUF_VALUE, max_size=4), st.lists(GGUF_TENSOR, max_size=3)
) | st.binary(max_size=40)


def damaged_gguf(number: int) -> bytes:
    data, header_bytes = good_gguf()
    return damage(data, number, 0, header_bytes)


def gguf(data: bytes) -> None:
    from imex_persist.model.gguf import GgufWeights
    from imex_persist.model.gguf_tokenizer import gguf_tokenizer

    path = folder() / "fuzzed.gguf"
    path.write_bytes(data)
    source = GgufWeights(path)
    if tokenizer := gguf_tokenizer(source.metadata, str(path)):
        tokenizer.encode("a b")


# ------------------------------------------------------------------------------------------------ tokenizers
@cache
def good_tokenizer() -> dict:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<s>"])
    return json.loads(backend.to_str())


def _changed(tree, seed: int, value):
    """A copy of a JSON tree in which a node is something else."""
    rng, copy = np.random.default_rng(seed), json.loads(json.dumps(tree))
    node = copy
    while isinstance(node, (dict, list)) and node:
        key = list(node)[int(rng.integers(len(node)))] if isinstance(node, dict) else int(rng.integers(len(node)))
        if rng.integers(3) == 0 or not isinstance(node[key], (dict, list)) or not node[key]:
            node[key] = value
            break
        node = node[key]
    return copy


TEMPLATE = st.text(string.printable, max_size=60) | st.lists(
    st.sampled_from(
        ["{{", "}}", "{%", "%}", "for m in messages", "endfor", "m.content", "if", "endif", " x ", "messages", "|", "tojson", "[0]",
         "('a')", "raise_exception", ".__class__", "cycler", "range(10)", "set a = ", "macro f()", "endmacro", "generation"]
    ), max_size=12,
).map(" ".join)  # fmt: skip
TOKENIZER_FILES = st.fixed_dictionaries(
    {"tokenizer.json": st.builds(lambda s, v: json.dumps(_changed(good_tokenizer(), s, v)).encode(), SEED, PLAUSIBLE | ANYTHING)
                       | st.binary(max_size=30) | st.builds(lambda: json.dumps(good_tokenizer()).encode())},
    optional={"tokenizer_config.json": JSON_TEXT | st.builds(
        lambda template, bos: json.dumps({"chat_template": template, "bos_token": bos}).encode(), TEMPLATE | ANYTHING, ANYTHING)},
)  # fmt: skip


def damaged_tokenizer(number: int) -> dict[str, bytes]:
    return {"tokenizer.json": damage(json.dumps(good_tokenizer()).encode(), number, 0, 2000)}


def tokenizer(files: dict[str, bytes]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder() / name).unlink(missing_ok=True)
    for name, data in files.items():
        (folder() / name).write_bytes(data)
    made = Tokenizer.from_folder(folder())
    made.encode("ab <s> é")
    made.decode([0, 1, 2])
    if made.chat_template is not None:
        made.apply_chat_template([{"role": "user", "content": "ab"}])


# ------------------------------------------------------------------------------------------------ requests
IDS = st.lists(st.integers(-2, 12), max_size=40)
REQUEST = st.fixed_dictionaries(
    {"prompt": IDS | ANYTHING | st.lists(IDS, max_size=3)
               | st.fixed_dictionaries({}, optional={"prompt": SCALARS, "prompt_token_ids": IDS | ANYTHING})},
    optional={"max_tokens": PLAUSIBLE | HUGE, "min_tokens": PLAUSIBLE, "stop_token_ids": IDS | PLAUSIBLE},
)  # fmt: skip


@cache
def small_engine() -> tuple[Engine, Mailbox, SimpleNamespace]:
    layout = ArenaLayout(2, 32, 2)
    mailbox = Mailbox(memoryview(bytearray(layout.nbytes)), layout)
    engine = Engine(mailbox, num_slots=2, num_pages=4, page_size=16, max_model_len=32)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=10), require_tokenizer=_no_tokenizer)
    return engine, mailbox, model


def _no_tokenizer():
    raise ValueError("the model has no tokenizer")


def descriptor(request: dict) -> None:
    """What a user asks for, up to the descriptor in the ring, whose words must be what was asked."""
    engine, mailbox, model = small_engine()
    options = {name: value for name, value in request.items() if name != "prompt"}
    params = SamplingParams(temperature=0, **options)
    for prompt in inputs.as_list(request["prompt"]):
        _, ids = inputs.to_ids(prompt, model)
        one = inputs.submission(ids, params, (2,), 32, model.config.vocab_size)
        engine.check(one)
        mailbox._acked = mailbox.descriptors.posted  # a kernel that takes everything
        sequence = mailbox.submit(request=7, slot=1, prompt=one.prompt_token_ids, pages=[0, 1], stop=one.stop_token_ids,
                                  max_tokens=one.max_tokens, min_tokens=one.min_tokens)  # fmt: skip
        assert sequence and len(ids) + one.max_tokens <= 32 and one.min_tokens <= one.max_tokens


SAMPLING = st.fixed_dictionaries(
    {},
    optional={
        name: PLAUSIBLE | ANYTHING | st.floats(-3, 3) | HUGE
        for name in ("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens",
                     "min_tokens", "logprobs", "presence_penalty", "frequency_penalty", "repetition_penalty", "skip_special_tokens",
                     "include_stop_str_in_output")
    },
)  # fmt: skip


def sampling(options: dict) -> None:
    """From fields to the words that the kernel gets, in a vocabulary that stop tokens may be outside of, or all of."""
    inputs.submission([1, 2], SamplingParams(**options), (0,), max_model_len=64, vocab_size=8)


TARGETS = {
    "config_fields": Target(
        12_000, config_fields, st.dictionaries(st.sampled_from(FIELDS), PLAUSIBLE | ANYTHING | ROPE, max_size=4)
    ),
    "config_any": Target(3_000, ModelConfig.from_dict, ANYTHING),
    "config_file": Target(4_000, config_file, JSON_TEXT),
    "config_damaged": Target(15_000, config_file, None, damaged_config),
    "safetensors": Target(5_000, safetensors, SAFETENSORS_BYTES),
    "safetensors_damaged": Target(16_000, safetensors, None, damaged_safetensors),
    "gguf": Target(6_000, gguf, GGUF_BYTES),
    "gguf_damaged": Target(20_000, gguf, None, damaged_gguf),
    "tokenizer": Target(5_000, tokenizer, TOKENIZER_FILES),
    "tokenizer_damaged": Target(12_000, tokenizer, None, damaged_tokenizer),
    "descriptor": Target(8_000, descriptor, REQUEST),
    "sampling": Target(8_000, sampling, SAMPLING),
}
