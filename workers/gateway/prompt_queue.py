"""Requests that wait for a tokenizer, oldest first, and how much memory they hold."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Final

from ipc.errors import QueueFull
from ipc.messages import Generate, Tokenize

# Resident memory, rounded up from what 100,000 requests of a kind took each (CPython 3.11, x86-64).
REQUEST_OVERHEAD_BYTES: Final = 1_280  # of the message and its entries in the tables
ITEM_OVERHEAD_BYTES: Final = 80  # of each turn of a chat, stop string and stop token


def held_bytes(message: Generate, frame_bytes: int) -> int:
    """About how much memory a request takes while it waits: bytes, rather too many than too few.

    That is its frame, or its text where that is more (a string is as wide as its widest character, up to four times
    its frame), and what the objects take besides, however small the frame is.
    """
    params, chat = message.params, message.chat or []
    texts = [message.prompt or "", *params.stop]
    for turn in chat:
        texts += turn.role, turn.content
    num_items = len(chat) + len(params.stop) + len(params.stop_token_ids)
    content = max(frame_bytes, sum(map(sys.getsizeof, texts)))
    return content + num_items * ITEM_OVERHEAD_BYTES + REQUEST_OVERHEAD_BYTES


class PromptQueue:
    """`Tokenize` messages by key. `max_bytes` bounds what they hold, in `held_bytes`; one alone may be larger."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._messages: OrderedDict[int, tuple[Tokenize, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._messages)

    def check_room(self, num_bytes: int) -> None:
        """Raise QueueFull if a request that holds this much would be too much."""
        if self._messages and self._num_bytes + num_bytes > self._max_bytes:
            raise QueueFull(
                f"requests that hold {self._num_bytes} bytes wait for a tokenizer; with this one's {num_bytes} that "
                f"would be more than frontend.max_queued_bytes ({self._max_bytes}): try again later"
            )

    def add(self, message: Tokenize, num_bytes: int) -> None:
        self._messages[message.key] = message, num_bytes
        self._num_bytes += num_bytes

    def pop_oldest(self) -> Tokenize:
        return self.remove(next(iter(self._messages)))

    def remove(self, key: int) -> Tokenize:
        message, num_bytes = self._messages.pop(key)
        self._num_bytes -= num_bytes
        return message

    def clear(self) -> None:
        self._messages.clear()
        self._num_bytes = 0
