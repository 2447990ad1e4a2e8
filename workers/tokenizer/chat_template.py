"""Renders a chat with the model's own template, as transformers' `apply_chat_template` does.

Templates come with a model from the hub and are code of a stranger's: they run in jinja2's sandbox and see nothing but
strings. Owns no tokens.
"""

from __future__ import annotations

import datetime
import json
import reprlib
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import msgspec
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ipc.errors import InvalidRequest, ModelUnsupported
from ipc.messages import ChatMessage
from workers.tokenizer_files import read_tokenizer_config, special_tokens

_NO_TEMPLATE = (
    "the model has no chat template (neither chat_template.jinja nor chat_template in tokenizer_config.json): "
    "send a prompt"
)


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class ChatTemplate:
    """A compiled template. `source` None: the model has none, and `render` says so."""

    def __init__(self, source: str | None, names: dict[str, str]) -> None:
        self._names = names  # bos_token and the like
        self._template: Any = None
        self._problem = _NO_TEMPLATE
        if source is not None:
            try:
                self._template = _environment().from_string(source)
            except jinja2.TemplateError as error:
                self._problem = f"the model's chat template cannot be compiled: {error}"

    @classmethod
    def load(cls, folder: str) -> ChatTemplate:
        """The folder's template: chat_template.jinja, or else the one in tokenizer_config.json.

        Raises ModelUnsupported for files that cannot be read.
        """
        config = read_tokenizer_config(folder)
        file = Path(folder) / "chat_template.jinja"
        if file.is_file():
            try:
                return cls(file.read_text(encoding="utf-8"), special_tokens(config))
            except (OSError, UnicodeDecodeError) as error:
                raise ModelUnsupported(f"{file} cannot be read: {error}") from None
        value = config.get("chat_template")
        try:
            source = msgspec.convert(value, str | list[_NamedTemplate] | None)
        except msgspec.ValidationError as error:
            raise ModelUnsupported(
                f"{file.with_name('tokenizer_config.json')}: chat_template ({reprlib.repr(value)}) must be a text, or "
                f"a list of texts by name: {error}"
            ) from None
        if isinstance(source, list):
            source = next((named.template for named in source if named.name == "default"), None)
        return cls(source, special_tokens(config))

    def render(self, chat: list[ChatMessage]) -> str:
        """The text of the chat, ready for the model's answer.

        Raises InvalidRequest if the model has no usable template or the template refuses this chat.
        """
        if self._template is None:
            raise InvalidRequest(self._problem)
        messages = [{"role": message.role, "content": message.content} for message in chat]
        try:
            text: str = self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._names
            )
        except Exception as error:  # a template may raise whatever its expressions raise
            raise InvalidRequest(f"the model's chat template refuses this chat: {error}") from error
        return text


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which no model has been trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationTag(jinja2.ext.Extension):  # type: ignore[misc]
    """`{% generation %}` marks the model's own turns for training; here its body is rendered like any other."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)
