"""`imex-persist chat`: what is said when, what an interrupt ends, and that the next turn costs only what is new."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import pytest

from imex_persist import LLM, SamplingParams
from imex_persist.cli import main
from imex_persist.front.chat import Chat, converse
from tests.model.test_tokenizer import TEMPLATE, byte_backend
from tests.runtime.test_llm import CONFIG


class Echo:
    """An LLM that repeats the last message word by word; at "interrupt" the user presses Ctrl-C, "long" does not fit."""

    def __init__(self):
        self.conversations, self.closed = [], 0

    def stream_chat(self, messages, _params):
        self.conversations.append(list(messages))
        if messages[-1]["content"] == "long":
            raise ValueError("the prompt has 999 tokens")
        return Words(self, messages[-1]["content"].split())


class Words:
    def __init__(self, llm, words):
        self.llm, self.words = llm, words

    def __iter__(self):
        for word in self.words:
            if word == "interrupt":
                raise KeyboardInterrupt
            yield SimpleNamespace(text=word + " ")

    def close(self):
        self.llm.closed += 1


def talk(*lines: str, typed: bool = False, system: str | None = None, monkeypatch=None):
    llm, out = Echo(), io.StringIO()
    source = io.StringIO("".join(line + "\n" for line in lines))
    if typed:
        source.isatty = lambda: True
        said = iter(lines)

        def ask(prompt):
            assert prompt == "> "
            try:
                line = next(said)
            except StopIteration:
                raise EOFError from None
            if line == "^C":
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr("builtins.input", ask)
    chat = Chat(llm, SamplingParams(temperature=0), system)
    converse(chat, source, out)
    return chat, llm, out.getvalue()


def test_a_pipe_s_lines_are_turns():
    chat, llm, out = talk("hello you", "", "  again  ")
    assert out == "hello you \nagain \n", "answers and nothing else"
    assert [len(conversation) for conversation in llm.conversations] == [1, 3]
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[3]["content"] == "again "


def test_reset_and_exit(capsys):
    chat, llm, out = talk("a", "/reset", "b", "/whatever", "/exit", "c", system="be brief")
    assert out == "a \nb \n" and "/whatever is no command" in capsys.readouterr().err
    assert [m["content"] for m in llm.conversations[-1]] == ["be brief", "b"] and len(chat.messages) == 3


def test_too_long_leaves_the_conversation_as_it_was(capsys):
    chat, _, out = talk("a", "long", "b")
    assert out == "a \nb \n" and "999 tokens (/reset begins" in capsys.readouterr().err
    assert [m["content"] for m in chat.messages] == ["a", "a ", "b", "b "]


def test_an_interrupt_ends_the_answer_and_the_next_one_the_chat(monkeypatch, capsys):
    chat, llm, out = talk("one interrupt two", "more", "^C", "never", typed=True, monkeypatch=monkeypatch)
    assert out == "one \nmore \n" and llm.closed == 1
    assert [m["content"] for m in chat.messages] == ["one interrupt two", "one ", "more", "more "]
    assert "Ctrl-C stops" in capsys.readouterr().err


def test_an_interrupt_in_a_pipe_ends_everything():
    with pytest.raises(KeyboardInterrupt):
        talk("one interrupt two", "more")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 256}))
    byte_backend().save(str(tmp_path / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE.replace("<s>", "")}  # the model knows no special tokens
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="worker processes share memory through /proc")
def test_the_next_turn_computes_what_is_new(folder):
    with LLM(folder, load_format="dummy", device="sim", max_model_len=1024) as llm:
        streams = []
        chat = Chat(llm, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        plain = llm.stream_chat
        llm.stream_chat = lambda *args: streams.append(plain(*args)) or streams[-1]
        for text in ("x" * 150, "and then?"):
            assert chat.answer(text, io.StringIO())
        first, second = (stream.result for stream in streams)
        assert first.num_cached_tokens == 0 and second.num_cached_tokens == 128  # whole pages
        assert second.prompt_token_ids[:150] == first.prompt_token_ids[:150]


@pytest.mark.skipif(sys.platform != "linux", reason="worker processes share memory through /proc")
def test_command(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nhi\n/reset\nhi\n"))
    assert main(["chat", folder, "--load-format", "dummy", "--device", "sim", "--max-tokens", "5"]) == 0
    answers = capsys.readouterr().out
    assert answers.endswith("\n") and answers.count("\n") >= 3


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--max-tokens", "0"], "max_tokens is 0"), (["--temperature", "-1"], "temperature is -1.0")]
)
def test_bad_input(folder, capsys, arguments, words):
    assert main(["chat", folder, "--load-format", "dummy", "--device", "sim", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_model_without_a_template_says_so(folder, tmp_path, capsys):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert main(["chat", folder, "--load-format", "dummy", "--device", "sim"]) == 2
    assert "has no chat template" in capsys.readouterr().err
