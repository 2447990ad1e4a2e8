"""Renders a chat with one of the model's templates, as transformers' `apply_chat_template` does.

    chat_inputs.py       parses the client's JSON and checks it
    message_forms.py     gives the messages the form that the template expects (`template_traits.py` finds it out)
    template_sandbox.py  runs the template; `render_limits.py` interrupts it

A template is untrusted code, and a chat untrusted input: an error or an excess of either ends only that request. Knows
no token ids.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from jinja2 import Template

from ipc.chat import EncodedChat
from ipc.errors import ConfigError, InvalidRequest
from workers.tokenizer.chat_inputs import ChatInputs, read_chat
from workers.tokenizer.message_forms import cut_at_tag, fit_messages, tag_final_message
from workers.tokenizer.render_limits import TIMEOUT_S, RenderLimits
from workers.tokenizer.template_files import read_templates
from workers.tokenizer.template_sandbox import TemplateSandbox, strftime_at
from workers.tokenizer.template_traits import TemplateTraits

MAX_TEMPLATE_CHARS: Final = 1 << 18  # of a request's template; templates of models have at most some 30,000
MAX_RENDERED_CHARS: Final = 16 << 20
_CACHED_TEMPLATES: Final = 16  # of requests
_DEFAULT: Final = "default"
_TOOL_USE: Final = "tool_use"
_NO_TEMPLATE: Final = (
    "the model has no chat template (neither chat_template.jinja nor chat_template in tokenizer_config.json): "
    "send a prompt, or set tokenizer.chat_template to a file"
)
_CONTROL_TOKEN: Final = re.compile(r"<\|[^\s<|>{}'\"]+\|>")
_TEMPLATE_MARKS: Final = ("{{", "{%", "{#")  # a text without them is no template, and may be a misspelt name


class CompiledTemplate:
    """One template, ready to render. Raises what jinja2 and its parser raise if it cannot be compiled."""

    def __init__(self, sandbox: TemplateSandbox, source: str) -> None:
        self._template: Template
        self._template, tree = sandbox.compiled(source)
        self._traits = TemplateTraits.of(tree)

    def render(self, inputs: ChatInputs, chat: EncodedChat, names: dict[str, Any], max_chars: int) -> str:
        """The text of the chat. Raises InvalidRequest if it has more than `max_chars`, and what the template raises."""
        messages = fit_messages(inputs.messages, self._traits)
        final_text = tag_final_message(messages) if chat.continue_final_message else None
        variables: dict[str, Any] = {
            **names, **inputs.template_kwargs, "messages": messages, "tools": inputs.tools,
            "documents": inputs.documents, "add_generation_prompt": chat.add_generation_prompt,
        }  # fmt: skip
        rendered = _bounded(self._template.generate(variables), max_chars)
        return rendered if final_text is None else cut_at_tag(rendered, final_text)


class ChatTemplates:
    """The templates of one model. A template that cannot be used raises its reason when a chat asks for it.

    Args:
        sources: the templates by name.
        names: special tokens that templates may write: `bos_token` and the like.
        problem: why there are no templates.
        trust_requests: whether a chat may bring its own template.
        timeout_s: processor time for one chat.
    """

    def __init__(
        self,
        sources: dict[str, str],
        names: dict[str, str],
        problem: str = _NO_TEMPLATE,
        *,
        trust_requests: bool = False,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._names = names
        self._problem = problem
        self._trusts_requests = trust_requests
        self._limits = RenderLimits(timeout_s)
        self._sandbox = TemplateSandbox()
        self._templates = {name: self._compile(source) for name, source in sources.items()}
        self.control_tokens = sorted(  # that the templates themselves write
            {token for source in sources.values() for token in _CONTROL_TOKEN.findall(source)}
        )
        self._compile_of_request = functools.lru_cache(_CACHED_TEMPLATES)(
            functools.partial(CompiledTemplate, self._sandbox)
        )

    @classmethod
    def load(cls, folder: str, names: dict[str, str], file: str | None = None, **options: Any) -> ChatTemplates:
        """Load the folder's templates, from the same files as AutoTokenizer. A `file` replaces them all.

        Raises ConfigError if `file` cannot be used. If the folder's templates cannot be read, only chats fail.
        """
        if file is not None:
            loaded = cls({_DEFAULT: _read_file(file)}, names, **options)
            if isinstance(problem := loaded._templates[_DEFAULT], str):
                raise ConfigError(f"tokenizer.chat_template ({file!r}) {problem}")
            return loaded
        try:
            return cls(read_templates(Path(folder)), names, **options)
        except InvalidRequest as error:
            return cls({}, names, str(error), **options)

    def render(self, chat: EncodedChat, max_chars: int = MAX_RENDERED_CHARS, clock_s: float | None = None) -> str:
        """The text of the chat, ready for the model's answer, as of the Unix time `clock_s`; None = now.

        Raises InvalidRequest for a malformed chat, without a usable template, if the template refuses this chat, or if
        text or effort exceed their bounds.
        """
        if chat.add_generation_prompt and chat.continue_final_message:
            raise InvalidRequest(
                "add_generation_prompt and continue_final_message are both set: the first begins a new message, the "
                "second goes on with the last one; unset one of them"
            )
        return self._limits.run(lambda: self._render(chat, max_chars, clock_s))

    def _render(self, chat: EncodedChat, max_chars: int, clock_s: float | None) -> str:
        inputs = read_chat(chat)
        template = self._choose(chat.template, bool(inputs.tools))
        try:
            return template.render(inputs, chat, {"strftime_now": strftime_at(clock_s), **self._names}, max_chars)
        except InvalidRequest:
            raise
        except Exception as error:  # a template may raise whatever its expressions raise
            whose = "the model's" if chat.template is None else "this"
            raise InvalidRequest(f"{whose} chat template refuses this chat: {_text(error)}") from error

    def _choose(self, name: str | None, has_tools: bool) -> CompiledTemplate:
        if name is None:
            if not self._templates:
                raise InvalidRequest(self._problem)
            name = _TOOL_USE if has_tools and _TOOL_USE in self._templates else _DEFAULT
            if name not in self._templates:
                raise InvalidRequest(
                    f"the model has chat templates named {self._listed()} and none named 'default': set chat_template "
                    "to one of these names"
                )
        if (template := self._templates.get(name)) is not None:
            if isinstance(template, str):
                raise InvalidRequest(f"the model's chat template {name!r} {template}")
            return template
        if not any(mark in name for mark in _TEMPLATE_MARKS):
            known = f"the model has {self._listed()}" if self._templates else self._problem
            raise InvalidRequest(f"chat_template: there is no template named {name[:100]!r}: {known}")
        if not self._trusts_requests:
            raise InvalidRequest(
                "chat_template: this engine renders no templates of requests: leave chat_template out, or start the "
                "engine with tokenizer.trust_request_templates = true if all its clients can be trusted"
            )
        if len(name) > MAX_TEMPLATE_CHARS:
            raise InvalidRequest(f"chat_template has {len(name)} characters; at most {MAX_TEMPLATE_CHARS} are allowed")
        try:
            return self._compile_of_request(name)
        except Exception as error:  # jinja2 raises its own errors and those of its parser
            raise InvalidRequest(f"chat_template cannot be compiled: {_text(error)}") from None

    def _compile(self, source: str) -> CompiledTemplate | str:
        """The template, or why it cannot be used."""
        try:
            return self._limits.run(lambda: CompiledTemplate(self._sandbox, source))
        except Exception as error:  # jinja2 raises its own errors and those of its parser
            return f"cannot be compiled: {_text(error)}"

    def _listed(self) -> str:
        return ", ".join(map(repr, sorted(self._templates)))


def _bounded(pieces: Iterable[str], max_chars: int) -> str:
    kept: list[str] = []
    num_chars = 0
    for piece in pieces:
        num_chars += len(piece)
        if num_chars > max_chars:
            raise InvalidRequest(
                f"the rendered chat has more than {max_chars} characters, far more than the longest sequence of this "
                "engine: shorten the chat"
            )
        kept.append(piece)
    return "".join(kept)


def _read_file(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"tokenizer.chat_template ({file!r}) cannot be read: {reason}") from None


def _text(error: Exception) -> str:
    """The error in one line, with the line of the template if jinja2 names it."""
    text = " ".join(str(error).split()) or type(error).__name__
    line = getattr(error, "lineno", None)
    return text if line is None else f"{text} (line {line})"
