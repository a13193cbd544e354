"""Text while it comes: stop strings across tokens, nothing shown that belongs to one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imex_persist.runtime.text import TextStream


class Letters:
    """Token i says pieces[i]; the last piece may be held back until flush."""

    def __init__(self, pieces, held=""):
        self.pieces, self.held = pieces, held

    def push(self, token):
        return self.pieces[token]

    def flush(self):
        held, self.held = self.held, ""
        return held


def run(pieces, held="", **options):
    stream = TextStream(Letters(pieces, held), **options)
    shown = []
    for i in range(len(pieces)):
        shown.append(stream.push(i))
        if stream.stop_string:
            break
    shown.append(stream.finish())
    assert "".join(shown) == stream.text
    return stream, shown


def test_plain_text_is_shown_at_once():
    stream, shown = run(["Hello", ", ", "you"])
    assert shown == ["Hello", ", ", "you", ""] and stream.stop_string is None


@pytest.mark.parametrize("pieces", [["one END two"], ["one E", "ND two"], ["one ", "E", "N", "D", " two"]])
def test_a_stop_string_is_found_across_tokens(pieces):
    stream, shown = run(pieces, stop=["END"])
    assert (stream.text, stream.stop_string) == ("one ", "END")
    assert all("E" not in part for part in shown)
    stream, _ = run(pieces, stop=["END"], include_stop=True)
    assert stream.text == "one END"


def test_what_only_looked_like_a_stop_string_is_shown_late():
    stream, shown = run(["a<", "/", "b", "</s>x"], stop=["</s>"])
    assert shown == ["a", "", "</b", "", ""] and stream.stop_string == "</s>"
    stream, shown = run(["a<"], stop=["</s>"])
    assert shown == ["a", "<"] and stream.stop_string is None


def test_the_earliest_of_several_stop_strings_counts():
    stream, _ = run(["x b a"], stop=["a", "b"])
    assert (stream.text, stream.stop_string) == ("x ", "b")


def test_bytes_that_never_became_a_character_come_at_the_end():
    stream, shown = run(["a", ""], held="\N{REPLACEMENT CHARACTER}")
    assert shown[-1] == "\N{REPLACEMENT CHARACTER}" and stream.text.startswith("a")


def test_no_stop_before_min_tokens():
    stream = TextStream(Letters(["END", "x", "END"]), stop=["END"])
    assert stream.push(0, look_for_stop=False) == "END"
    assert stream.push(1) == "x"
    assert stream.push(2) == "" and stream.stop_string == "END"


def test_a_stop_string_that_begins_before_min_tokens_and_ends_after_counts():
    stream = TextStream(Letters(["x E", "N", "D END y"]), stop=["END"])
    assert [stream.push(0, look_for_stop=False), stream.push(1, look_for_stop=False)] == ["x ", ""]
    assert stream.push(2) == "" and (stream.text, stream.stop_string) == ("x ", "END")


def test_a_stop_string_within_min_tokens_is_text():
    stream = TextStream(Letters(["aEND", "b", "EN"]), stop=["END"])
    assert stream.push(0, look_for_stop=False) == "aEND"
    assert [stream.push(1), stream.push(2), stream.finish()] == ["b", "", "EN"]
    assert stream.text == "aENDbEN" and stream.stop_string is None


def test_the_end_does_not_look_where_nobody_looked():
    stream = TextStream(Letters(["EN"], held="D"), stop=["END"])
    stream.push(0, look_for_stop=False)
    assert stream.finish() == "END" and stream.stop_string is None


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.booleans(), st.data())
def test_how_text_is_cut_into_tokens_changes_nothing(text, stop, include, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole, _ = run(pieces, stop=stop, include_stop=include)
    single, _ = run(list(text), stop=stop, include_stop=include)
    assert (whole.text, whole.stop_string) == (single.text, single.stop_string)


@given(st.lists(st.text("abc", max_size=4), max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_streamed_text_is_the_whole_text_cut_at_the_first_stop(pieces, stop):
    stream, _ = run(pieces, stop=stop)
    whole = "".join(pieces)
    at = min((i for s in stop if (i := whole.find(s)) >= 0), default=None)
    assert (stream.stop_string is None) == (at is None)
    if at is None:
        assert stream.text == whole
    else:
        assert whole.startswith(stream.text) and not any(s in stream.text for s in stop)
