"""Gives checked messages the form that one template expects. Changes none of the messages that it is given."""

from __future__ import annotations

from typing import Any, Final

from ipc.errors import InvalidRequest
from workers.tokenizer.template_traits import TemplateTraits

CONTINUE_TAG: Final = "CONTINUE_FINAL_MESSAGE_HERE "  # ends with a space, to see whether the template strips it
_SYSTEM_SEPARATOR: Final = "\n\n"
_PART_SEPARATOR: Final = "\n"

Object = dict[str, Any]


def fit_messages(messages: list[Object], traits: TemplateTraits) -> list[Object]:
    """The messages for a template with these traits.

    A template that goes over a content's parts gets parts as they are. Other templates, and every message of a tool,
    get their texts joined by newlines. A text becomes one part if the template never asks for texts. The role
    "developer" becomes "system" if the template does not know it. Then all system messages are joined into one at the
    beginning, since many templates allow no other. vLLM does the same.
    """
    fitted = [{**message, "content": _fit_content(message, traits)} for message in messages]
    if traits.knows_developer or all(message["role"] != "developer" for message in fitted):
        return fitted
    system = [message for message in fitted if message["role"] in ("developer", "system")]
    others = [message for message in fitted if message["role"] not in ("developer", "system")]
    first = {**system[0], "role": "system", "content": _joined([message["content"] for message in system])}
    first.pop("tools", None)  # of OpenAI's developer messages
    return [first, *others]


def _fit_content(message: Object, traits: TemplateTraits) -> str | list[Object]:
    content: str | list[Object] = message["content"]
    if isinstance(content, list):
        if traits.reads_parts and message["role"] != "tool":
            return content
        return _PART_SEPARATOR.join(part["text"] for part in content)
    if traits.reads_parts and not traits.reads_text and message["role"] != "tool":
        return [{"type": "text", "text": content}] if content else []
    return content


def _joined(contents: list[str | list[Object]]) -> str | list[Object]:
    """One content with the texts of all, separated by an empty line."""
    texts = [content if isinstance(content, str) else "".join(part["text"] for part in content) for content in contents]
    joined = _SYSTEM_SEPARATOR.join(filter(None, texts))
    return joined if isinstance(contents[0], str) else [{"type": "text", "text": joined}]


def tag_final_message(messages: list[Object]) -> str:
    """Append CONTINUE_TAG to the last message's last text, in place, and return that text without the tag."""
    last = messages[-1]
    content = last["content"]
    if isinstance(content, str):
        last["content"] = content + CONTINUE_TAG
        return content
    text = str(content[-1]["text"]) if content else ""
    last["content"] = [*content[:-1], {"type": "text", "text": text + CONTINUE_TAG}]
    return text


def cut_at_tag(rendered: str, final_text: str) -> str:
    """The rendered text up to the end of the final message, as transformers' `continue_final_message` cuts it.

    Raises InvalidRequest if the template has left out the final message.
    """
    tag = CONTINUE_TAG.strip()
    end = rendered.rfind(tag)
    if end < 0 or final_text.strip() not in rendered:
        raise InvalidRequest(
            "continue_final_message: this chat template leaves out the last message or a part of it, so that it cannot "
            "be continued"
        )
    # A template that strips texts has also stripped the tag's space. Then the text's own spaces at its end go too.
    return rendered[:end] if rendered.startswith(CONTINUE_TAG, end) else rendered[:end].rstrip()
