"""Tools for chat templates that do not show them: descriptions and calls as plain text in the messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import jinja2
import jinja2.meta

from ipc.errors import InvalidRequest
from pipeline.http.generation.tool_definitions import read_tools
from pipeline.http.parsing.scanner import Tool
from workers.tokenizer.template_files import read_templates
from workers.tokenizer.template_sandbox import TemplateSandbox

Message = dict[str, Any]
_WITH_TOOLS: Final = "tool_use"  # the name of the template for chats with tools, if there is one
_DEFAULT: Final = "default"
_RESULT_ROLES: Final = ("tool", "function")
_SYSTEM_ROLES: Final = ("system", "developer")
_HEAD: Final = (
    "You can call functions. To call one, answer with one JSON object and nothing else: "
    '{"name": NAME, "parameters": ARGUMENTS}. The arguments are an object that fits the JSON schema of the function\'s '
    "parameters. These are the functions:"
)


def template_reads_tools(folder: str, file: str | None = None) -> bool:
    """Whether the chat template that a chat with tools gets refers to `tools`.

    Args:
        folder: of the model's files.
        file: a template that replaces the folder's (`tokenizer.chat_template`).

    False if there is no template that can be read. Every chat fails then.
    """
    try:
        templates = read_templates(Path(folder)) if file is None else {_DEFAULT: Path(file).read_text("utf-8")}
        source = templates.get(_WITH_TOOLS, templates.get(_DEFAULT, ""))
        return "tools" in jinja2.meta.find_undeclared_variables(TemplateSandbox().parse(source))
    except (InvalidRequest, OSError, UnicodeDecodeError, jinja2.TemplateError, RecursionError):
        return False


def messages_for(messages: list[Message], tools: Any, template_reads_tools: bool) -> list[Message]:
    """The messages of a chat as the model's template can show them. Those given are not changed.

    For a template that ignores tools, their descriptions are added to the system message; a chat without one gets one.
    Calls become text of the assistant, and results become text of the user: such a template knows no other roles.
    Raises InvalidRequest for tools that are not well-formed.
    """
    definitions = read_tools(tools)
    if template_reads_tools:
        return messages
    names: dict[str, str] = {}
    shown: list[Message] = []
    ends_with_result = False
    for message in messages:
        is_result = _role(message) in _RESULT_ROLES
        text = _as_text(message, names)
        # Many templates want the roles of user and assistant to alternate.
        if shown and _role(text) == _role(shown[-1]) == "user" and (is_result or ends_with_result):
            shown[-1] = {**text, "content": _joined(shown[-1].get("content"), text.get("content"))}
        else:
            shown.append(text)
        ends_with_result = is_result
    return _described(shown, "\n".join([_HEAD, *map(_line, definitions)])) if definitions else shown


def _line(definition: Tool) -> str:
    shown = {key: definition[key] for key in ("name", "description", "parameters") if definition.get(key) is not None}
    return json.dumps(shown, ensure_ascii=False)


def _described(messages: list[Message], description: str) -> list[Message]:
    if not messages or _role(messages[0]) not in _SYSTEM_ROLES:
        return [{"role": "system", "content": description}, *messages]
    first = messages[0]
    return [{**first, "content": _joined(first.get("content"), description)}, *messages[1:]]


def _as_text(message: Message, names: dict[str, str]) -> Message:
    """The message without calls and results of tools. `names` collects the functions of calls by the calls' ids."""
    role = _role(message)
    if role in _RESULT_ROLES:
        call_id = message.get("tool_call_id")
        name = message.get("name") or names.get(call_id if isinstance(call_id, str) else "")
        head = f"Result of the function {name}:" if isinstance(name, str) else "Result of the function:"
        return {"role": "user", "content": _joined(head, message.get("content"), "\n")}
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return message
    texts = [_call_text(call, names) for call in calls]
    rest = {key: value for key, value in message.items() if key not in ("tool_calls", "content")}
    return {**rest, "content": _joined(message.get("content"), "\n".join(texts), "\n")}


def _call_text(call: Any, names: dict[str, str]) -> str:
    """A call in the form that the description asks for. The engine's tokenizer refuses calls that are not well-formed,
    which this form would hide, so they are checked here."""
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise InvalidRequest("messages: each of tool_calls must be an object with a function that has a name")
    if isinstance(call_id := call.get("id"), str):
        names[call_id] = name
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "parameters": {arguments.strip() or "{}"}}}'


def _joined(first: Any, second: Any, separator: str = "\n\n") -> Any:
    """Two contents as one. Each is a text, a list of parts, or None."""
    if not first or not second:
        return first or second or ""
    texts = [_plain(first), _plain(second)]
    if None in texts:  # parts that are no text: the engine's tokenizer refuses them by name
        return [*_parts(first), *_parts(second)]
    return separator.join(map(str, texts))


def _plain(content: Any) -> str | None:
    """The text of a content, with one line for each part. None: a part is no text."""
    texts = [part.get("text") if isinstance(part, dict) else part for part in _parts(content)]
    plain = [text for text in texts if isinstance(text, str)]
    return "\n".join(plain) if len(plain) == len(texts) else None


def _parts(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None
