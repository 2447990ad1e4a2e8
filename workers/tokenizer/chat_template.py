"""Renders a chat with the model's own template, as transformers' `apply_chat_template` does.

A template comes with the model and is untrusted code: it runs in jinja2's sandbox and sees only strings. Knows no token
ids.
"""

from __future__ import annotations

import datetime
import json
import re
import reprlib
from pathlib import Path
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ipc.errors import InvalidRequest
from ipc.messages import ChatMessage
from workers.model_tokenizer.declarations import read_object

_NO_TEMPLATE: Final = (
    "the model has no chat template (neither chat_template.jinja nor chat_template in tokenizer_config.json): "
    "send a prompt"
)
_CONTROL_TOKEN: Final = re.compile(r"<\|[^\s<|>{}'\"]+\|>")


class ChatTemplate:
    """A model's compiled template. If the model has none, `render` raises the reason."""

    def __init__(self, source: str | None, names: dict[str, str], problem: str = _NO_TEMPLATE) -> None:
        self._names = names  # bos_token and the like
        self._template: Any = None
        self._problem = problem
        self.control_tokens = sorted(set(_CONTROL_TOKEN.findall(source or "")))  # that the template itself writes
        if source is not None:
            try:
                self._template = _environment().from_string(source)
            except Exception as error:  # jinja2 raises its own errors and those of its parser
                self._problem = f"the model's chat template cannot be compiled: {error}"

    @classmethod
    def load(cls, folder: str, names: dict[str, str]) -> ChatTemplate:
        """Load the folder's template, from the same files as AutoTokenizer; `names` are the special tokens for it.

        Files (chat_template.jinja, additional_chat_templates/*.jinja) outrank tokenizer_config.json. Of several
        templates, the one named "default" is used. If the template cannot be read, only chats fail.
        """
        config = Path(folder) / "tokenizer_config.json"
        try:
            templates = _of_files(Path(folder)) or _of_config(config, read_object(config).get("chat_template"))
        except InvalidRequest as error:
            return cls(None, names, str(error))
        if templates and "default" not in templates:
            listed = ", ".join(map(repr, sorted(templates)))
            return cls(
                None, names, f"the model has chat templates named {listed} and none named 'default': send a prompt"
            )
        return cls(templates.get("default"), names)

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


def _of_files(folder: Path) -> dict[str, str]:
    """Templates that are separate files, by name."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    templates = {}
    for name, file in files.items():
        try:
            if file.is_file():
                templates[name] = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"the model's chat template ({file}) cannot be read: {error}") from None
    return templates


def _of_config(file: Path, value: Any) -> dict[str, str]:
    """Templates of tokenizer_config.json, by name: one text, texts by name, or a list of {name, template}."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        value = {one.get("name"): one.get("template") for one in value}
    if not isinstance(value, dict) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise InvalidRequest(
            f"the model's chat_template ({reprlib.repr(value)}) in {file} must be a text, or texts by "
            "name: send a prompt"
        )
    return value


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
    """Replaces jinja2's own filter, which escapes HTML: models are not trained on escaped text."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationTag(jinja2.ext.Extension):  # type: ignore[misc]
    """`{% generation %}` marks the model's own turns for training; here its body is rendered like any other."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)
