"""Requests that wait for a tokenizer, oldest first, and how many bytes they hold."""

from __future__ import annotations

from collections import OrderedDict

from ipc.errors import QueueFull
from ipc.messages import Tokenize


class PromptQueue:
    """`Tokenize` messages by key. `max_bytes` bounds the frames that they came in: prompts may be large."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._messages: OrderedDict[int, tuple[Tokenize, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._messages)

    def check_room(self, num_bytes: int) -> None:
        """Raise QueueFull if a frame of this size would be too much."""
        if self._num_bytes + num_bytes > self._max_bytes:
            raise QueueFull(
                f"prompts of {self._num_bytes} bytes wait for a tokenizer; with these {num_bytes} there would be more "
                f"than frontend.max_queued_bytes ({self._max_bytes}): try again later"
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
