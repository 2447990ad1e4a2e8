"""Finds out whether a prompt ends inside the model's reasoning.

Some chat templates write the tag that begins the reasoning themselves; others do so for some arguments only. The
engine's tokenizers render the template, so they are asked for the end of a short chat with the same arguments.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from typing import Any, Final

from pipeline.client.async_client import AsyncClient
from pipeline.client.chat_input import Chat

_MAX_ANSWERS: Final = 256  # kept, one for each combination of arguments
_MESSAGES: Final = [{"role": "user", "content": "Hello"}]


class ReasoningStart:
    """The answers for one model. `tags`: begin and end of its reasoning; None: it has none."""

    def __init__(self, client: AsyncClient, tags: tuple[str, str] | None) -> None:
        self._client = client
        self._tags = tags
        self._known: OrderedDict[bytes, bool] = OrderedDict()

    async def is_inside(self, chat: Chat) -> bool:
        """Whether the prompt of this chat ends inside the reasoning. Raises what `AsyncClient.tokenize` raises."""
        if self._tags is None:
            return False
        if chat.continue_final_message:
            return self._ends_inside(_text_of(chat.messages[-1]))
        if chat.add_generation_prompt is False:
            return False
        arguments = json.dumps([chat.chat_template, chat.chat_template_kwargs], sort_keys=True, default=str)
        key = hashlib.sha256(arguments.encode()).digest()  # a client may send megabytes of arguments
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        probe = Chat(_MESSAGES, chat_template=chat.chat_template, chat_template_kwargs=chat.chat_template_kwargs)
        rendered = await self._client.tokenize(probe)
        answer = self._known[key] = self._ends_inside(b"".join(rendered.token_bytes).decode("utf-8", "replace"))
        if len(self._known) > _MAX_ANSWERS:
            self._known.popitem(last=False)
        return answer

    def _ends_inside(self, text: str) -> bool:
        assert self._tags is not None, "asked only for a model with reasoning"
        begin, end = self._tags
        return text.rfind(begin) > text.rfind(end)


def _text_of(message: Any) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
