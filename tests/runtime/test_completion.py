"""From tokens to what is shown, with a tokenizer whose tokens are single bytes: characters and stop strings begin and end anywhere."""

from __future__ import annotations

import pytest

from imex_persist import SamplingParams
from imex_persist.runtime.completion import Completion
from imex_persist.runtime.request import Request, Submission, TokenEvent
from tests.model.test_tokenizer import BYTES

EOS = 257


def complete(text: str, *, last: int | None = None, finish="length", **params):
    """Feeds `text` byte by byte; `last` is one more token, with which the request ends. Returns (completion, deltas, cancels)."""
    params = SamplingParams(temperature=0, max_tokens=1000, **params)
    request, cancels = Request(7, Submission((1, 2), 1000)), []
    completion = Completion(request, "p", params, BYTES.detokenizer(params.skip_special_tokens), cancels.append)
    ids = BYTES.encode(text, add_special_tokens=False) + ([] if last is None else [last])
    deltas = []
    for i, token in enumerate(ids):
        reason = finish if i == len(ids) - 1 else None
        deltas.append(completion.feed(TokenEvent(token, reason, i, float(i))))
    return completion, deltas, cancels


def shown(deltas) -> str:
    return "".join(delta.text for delta in deltas)


def test_characters_come_whole():
    text = "aé日本😀 e\u0301"
    completion, deltas, _ = complete(text)
    assert completion.output.text == text == shown(deltas)
    assert [d.text for d in deltas][:4] == ["a", "", "é", ""]
    assert "\N{REPLACEMENT CHARACTER}" not in shown(deltas)
    assert len(completion.output.token_ids) == len(text.encode())


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_of_split_characters(include):
    completion, deltas, cancels = complete("ein 日本語 x", stop=["本語"], include_stop_str_in_output=include)
    out = completion.output
    assert out.text == shown(deltas) == ("ein 日本語" if include else "ein 日")
    assert (out.finish_reason, out.stop_reason) == ("stop", "本語")
    assert cancels == [completion.request], "the kernel does not know strings: the request is cancelled, once"
    assert len(out.token_ids) == len("ein 日本語".encode()), "the token that completed it is the last"


def test_half_a_character_before_a_stop_string_is_not_shown_as_one():
    """A character that begins like the stop string's first, in bytes: 本 is e6 9c ac, 来 is e6 9d a5."""
    completion, deltas, _ = complete("本来本", stop=["来"])
    assert completion.output.text == "本" == shown(deltas)


def test_what_might_begin_a_stop_string_waits():
    _, deltas, _ = complete("a<enb<end>c", stop=["<end>"])
    assert [d.text for d in deltas] == ["a", "", "", "", "<enb", "", "", "", "", "", ""]


def test_nothing_after_the_stop_is_taken():
    completion, deltas, _ = complete("one END two", stop=["END"])
    assert deltas[-1] == type(deltas[-1])("", ()) and completion.output.text == "one "
    assert BYTES.decode(completion.output.token_ids) == "one END"


@pytest.mark.parametrize(("min_tokens", "text"), [(0, "a"), (2, "a"), (4, "aENDb"), (9, "aENDbENDc")])
def test_min_tokens(min_tokens, text):
    """A stop string counts if its last token comes after the first min_tokens."""
    completion, _, _ = complete("aENDbENDc", stop=["END"], min_tokens=min_tokens)
    assert completion.output.text == text
    assert completion.output.finish_reason == ("length" if text.endswith("c") else "stop")


@pytest.mark.parametrize(("include", "skip", "text"), [(False, True, "hi"), (True, True, "hi"), (True, False, "hi</s>")])
def test_a_stop_token_is_no_text_unless_asked_for(include, skip, text):
    completion, _, _ = complete(
        "hi", last=EOS, finish="stop", stop_token_ids=[EOS], include_stop_str_in_output=include, skip_special_tokens=skip
    )
    assert (completion.output.text, completion.output.stop_reason) == (text, EOS)


def test_what_was_held_back_is_shown_at_the_end():
    completion, deltas, _ = complete("say EN", stop=["END"])
    assert completion.output.text == "say EN" == shown(deltas) and completion.output.finish_reason == "length"


def test_bytes_that_end_inside_a_character():
    """Cut by max_tokens: one replacement character, at the end only."""
    request = Request(7, Submission((1,), 10))
    completion = Completion(request, None, SamplingParams(temperature=0), BYTES.detokenizer(), lambda _: None)
    ids = BYTES.encode("日", add_special_tokens=False)[:2]
    deltas = [completion.feed(TokenEvent(t, r, 0, 0.0)) for t, r in zip(ids, (None, "length"), strict=True)]
    assert [d.text for d in deltas] == ["", "\N{REPLACEMENT CHARACTER}"]


def test_a_stop_string_at_the_very_end_is_a_stop():
    completion, _, cancels = complete("xEND", stop=["END"])
    assert (completion.output.finish_reason, completion.output.text, cancels) == ("stop", "x", [])
