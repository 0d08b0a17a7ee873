"""Conversations as the text that a chat model was trained on."""

import dataclasses
import datetime
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ._files import existing_directory, optional_object, read_text
from ._tokenizer import special_tokens, TOKENIZER_CONFIG


TEMPLATE = "chat_template.jinja"

# A template is a program: besides Jinja's own, it may fail with what Python raises.
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template that writes a conversation as text, as `transformers` does.

    It runs in Jinja's sandbox, since it comes with the weights.

    **Arguments:**

    - `source`: the template.
    - `special_tokens`: what it knows as `bos_token`, `eos_token` and the like.
    """

    source: str
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """Writes a conversation.

        **Arguments:**

        - `messages`: each with a `role`, such as `user`, and a `content`.
        - `add_generation_prompt`: whether the text ends where the next answer begins.

        **Returns:**

        The text, special tokens included. A `ValueError` says what the template does not
        accept, as some do not accept a system message.
        """
        try:
            text = self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.special_tokens,
            )
            # A lone surrogate cannot be cut into tokens.
            text.encode("utf-8")
        except _FAILURES as error:
            raise ValueError(f"the chat template fails: {error}") from error
        return text

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        return environment.from_string(self.source)


def load_chat_template(directory: str | os.PathLike) -> ChatTemplate:
    """Loads the chat template of a checkpoint.

    **Arguments:**

    - `directory`: holds `chat_template.jinja`, or a `tokenizer_config.json` with a
        `chat_template`; of several, the one called `default` is meant.

    **Returns:**

    The template, which knows the tokenizer's special tokens. A `ValueError` says that
    there is none, or what is wrong with it.
    """
    root = existing_directory(directory)
    config = optional_object(root / TOKENIZER_CONFIG)
    path = root / TEMPLATE
    if path.is_file():
        source = read_text(path)
    else:
        path = root / TOKENIZER_CONFIG
        source = _default_template(path, config.get("chat_template"))
    if source is None:
        raise ValueError(
            f"{root}: no chat template, neither {TEMPLATE} nor in {TOKENIZER_CONFIG}"
        )
    template = ChatTemplate(source, special_tokens(root))
    try:
        template._template  # noqa: B018  Compiled, to find its mistakes now.
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        raise ValueError(f"{path}: not a chat template ({error})") from error
    return template


def _default_template(path: pathlib.Path, given: Any) -> str | None:
    if isinstance(given, list):
        try:
            given = {named["name"]: named["template"] for named in given}.get("default")
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: chat_template is no list of templates") from error
    if given is not None and not isinstance(given, str):
        raise ValueError(f"{path}: chat_template is no text")
    return given


# --- What templates use besides Jinja's own


class _Generation(Extension):
    """`{% generation %}` marks what an answer is, for training; here it marks nothing, but
    what is set in it is forgotten after it.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes what has a meaning in HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
