"""`imex-persist chat`: a conversation in a terminal, or with the lines of a pipe.

The whole conversation is the prompt of every answer. What it begins with was computed for the answer before, so only what is new is
computed: prefix reuse (runtime/pages.py), of whole pages.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TextIO

GREETING = "Ctrl-C stops an answer, Ctrl-D leaves; /reset begins anew, /exit leaves."
PROMPT = "> "
MAX_TOKENS = 1024


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Everything but the engine's options."""
    add = command.add_argument
    add("model", nargs="?", help="a Hugging Face folder, a GGUF file, or smollm2 (default $IMEX_MODEL)")
    add("--system", metavar="TEXT", help="a system message (default: the chat template's own, if it has one)")
    add("--max-tokens", type=int, default=MAX_TOKENS, metavar="N", help="tokens of an answer at most (default %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 (the default) is greedy")


def run(args: argparse.Namespace, make_engine: Callable) -> int:
    """`make_engine()` gives the LLM. Returns the exit code."""
    from imex_persist.sampling_params import SamplingParams

    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    with make_engine() as llm:
        if llm.model.require_tokenizer().chat_template is None:
            raise ValueError(f"{args.model} has no chat template: complete prompts with imex-persist generate")
        converse(Chat(llm, params, args.system), sys.stdin, sys.stdout)
    return 0


class Chat:
    """A conversation so far, and a model to go on with it."""

    def __init__(self, llm, params, system: str | None = None):
        self._llm, self._params, self._system = llm, params, system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def answer(self, text: str, out: TextIO) -> bool:
        """Prints the answer as it comes. An interrupt ends it where it is, and it stays part of the conversation as far as it was
        shown; False then. Raises ValueError, with the conversation as before, for one that has become too long.
        """
        stream, shown, whole = None, [], True
        try:
            stream = self._llm.stream_chat([*self.messages, {"role": "user", "content": text}], self._params)
            for step in stream:
                shown.append(step.text)
                out.write(step.text)
                out.flush()
        except KeyboardInterrupt:
            whole = False
            if stream is not None:
                stream.close()
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "".join(shown)}]
        out.write("\n")
        out.flush()
        return whole


def converse(chat: Chat, source: TextIO, out: TextIO) -> None:
    """Lines from `source` are what the user says, until it ends or an interrupt comes that has no answer to stop."""
    typed = source.isatty()
    if typed:
        _edit_lines()
        print(GREETING, file=sys.stderr)
    while (line := _next_line(source, typed)) is not None:
        text = line.strip()
        if text == "/exit":
            return
        if text == "/reset":
            chat.reset()
        elif text.startswith("/"):
            print(f"{text.split()[0]} is no command: /reset begins anew, /exit leaves", file=sys.stderr)
        elif text:
            try:
                if not chat.answer(text, out) and not typed:
                    raise KeyboardInterrupt  # nobody is there to ask something else
            except ValueError as error:
                print(f"{error} (/reset begins a new conversation)", file=sys.stderr)


def _next_line(source: TextIO, typed: bool) -> str | None:
    """None at the end."""
    try:
        return input(PROMPT) if typed else source.readline() or None
    except (EOFError, KeyboardInterrupt):
        if typed:
            print()
        return None


def _edit_lines() -> None:
    try:
        import readline  # noqa: F401  input() then knows arrows and what was said before
    except ImportError:  # a Python without it
        pass
