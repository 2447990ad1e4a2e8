"""A chat as the caller of a client writes it, and as JSON for the engine. Knows no sockets.

The engine's tokenizer checks what the messages say, because that depends on the model's chat template.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Integral, Real
from typing import Any

from ipc.chat import EncodedChat
from ipc.codec import MAX_ITEMS
from ipc.errors import InvalidRequest


@dataclass(frozen=True)
class Chat:
    """A chat with everything that its template may need. A list of messages alone is a prompt too.

    Args:
        messages: dictionaries as in OpenAI's API: `role`, `content` (a text, or a list of text parts such as
            {"type": "text", "text": ...}), and where they apply `tool_calls`, `tool_call_id`, `name`,
            `reasoning_content`. Any other key reaches the template as it is.
        tools: definitions of functions as in OpenAI's API: {"type": "function", "function": {"name": ...,
            "description": ..., "parameters": ...}}, or the inner dictionaries alone.
        documents: dictionaries for templates that cite documents.
        chat_template: the name of one of the model's templates, or a jinja2 template, which needs an engine with
            `tokenizer.trust_request_templates`. None = the model's template "tool_use" if there is one and tools are
            given, otherwise its main template.
        chat_template_kwargs: further variables for the template, such as {"enable_thinking": False}.
        add_generation_prompt: whether the prompt ends with the beginning of an answer. None = the opposite of
            `continue_final_message`.
        continue_final_message: whether the model continues the last message instead of answering it.

    All of them hold what JSON can hold: texts, numbers, booleans, None, lists and dictionaries. A request raises
    InvalidRequest if something else is among them.
    """

    messages: Sequence[Mapping[str, Any]]
    _: KW_ONLY
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False


def encode_chat(chat: Chat) -> EncodedChat:
    """The chat as it travels. Raises InvalidRequest if no engine would accept it."""
    for name, value in (("tools", chat.tools), ("documents", chat.documents)):
        if value is not None:
            _check_list(value, name)
    _check_list(chat.messages, "messages")
    if not chat.messages:
        raise InvalidRequest("messages is empty: a chat has at least one message")
    kwargs, template = chat.chat_template_kwargs, chat.chat_template
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InvalidRequest(f"chat_template_kwargs ({reprlib.repr(kwargs)}) must be a dictionary")
    if template is not None and not isinstance(template, str):
        raise InvalidRequest(f"chat_template ({reprlib.repr(template)}) must be a string")
    continues = _checked_bool(chat.continue_final_message, "continue_final_message")
    if chat.add_generation_prompt is None:
        begins = not continues
    else:
        begins = _checked_bool(chat.add_generation_prompt, "add_generation_prompt")
    if begins and continues:
        raise InvalidRequest(
            "add_generation_prompt and continue_final_message are both True: the first begins a new message, the "
            "second goes on with the last one; leave one of them out"
        )
    return EncodedChat(
        messages=_json_of_list(chat.messages, "messages"),
        tools=None if chat.tools is None else _json_of_list(chat.tools, "tools"),
        documents=None if chat.documents is None else _json_of_list(chat.documents, "documents"),
        template=template,
        template_kwargs=None if kwargs is None else _json(kwargs, "chat_template_kwargs"),
        add_generation_prompt=begins,
        continue_final_message=continues,
    )


def _check_list(values: object, name: str) -> None:
    if not isinstance(values, Sequence) or isinstance(values, str | bytes | bytearray | memoryview):
        raise InvalidRequest(f"{name} ({reprlib.repr(values)}) must be a list of dictionaries")
    if len(values) > MAX_ITEMS:
        raise InvalidRequest(f"{name} has {len(values)} items; at most {MAX_ITEMS} are allowed")
    for i, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise InvalidRequest(f"{name}[{i}] ({reprlib.repr(value)}) must be a dictionary")


def _checked_bool(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} ({reprlib.repr(value)}) must be True or False")
    return value


def _json_of_list(values: Sequence[Mapping[str, Any]], name: str) -> bytes:
    """JSON of the list. An error names the item."""
    return b"[" + b",".join([_json(value, f"{name}[{i}]") for i, value in enumerate(values)]) + b"]"


def _json(value: object, where: str) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain)
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{where}: text with a lone surrogate at character {error.start} cannot be sent") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where} cannot be sent as JSON: {error}") from None


def _plain(value: object) -> object:
    """What json itself does not encode: mappings, sequences and numbers of other classes, such as numpy's."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return list(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")
