"""Chat templates: Jinja from the model's files in an immutable sandbox, with the functions that transformers gives them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from imex_persist.model.messages import one_line


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which marks the assistant's part for training: here only its body."""

    tags = frozenset({"generation"})

    def parse(self, parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class ChatTemplate:
    """One compiled template. Raises ValueError if it is not valid Jinja.

    `variables` are what every rendering sees, such as bos_token and eos_token.
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(
                f"the model's chat template is not valid ({one_line(error)}); give plain prompts or token ids instead"
            ) from None
        self._variables = dict(variables or {})

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any) -> str:
        """The prompt for `messages` ({"role": …, "content": …} each); `extra` are further template variables, such as tools.

        Raises ValueError if the messages are malformed or the template refuses them.
        """
        _check_messages(messages)
        variables = {"tools": None, "documents": None} | self._variables | extra
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
        except Exception as error:  # a template is a program: it may fail in any way
            raise ValueError(
                f"the chat template cannot render these messages ({one_line(error)}); see the model's card"
            ) from None


def _check_messages(messages: Any) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError('messages must be a non-empty list of {"role": …, "content": …}')
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError('every message must be an object with a "role" such as "user", and a "content"')


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes <, > and &, which would change the prompt
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
