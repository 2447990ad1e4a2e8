"""The scheduler's messages to the peers of its ROUTER, each peer's in order, until they can be sent."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import zmq

from ipc.channels import send_to


class Outbox:
    """Messages wait only while their peer is still connecting. One such peer does not delay the others."""

    def __init__(self, router: zmq.Socket[Any]) -> None:
        self._router = router
        self._waiting: dict[bytes, deque[Any]] = {}

    def __bool__(self) -> bool:
        """Whether messages wait: call `send` again soon."""
        return bool(self._waiting)

    def add(self, peer: bytes, messages: Iterable[Any]) -> None:
        self._waiting.setdefault(peer, deque()).extend(messages)

    def forget(self, peer: bytes) -> None:
        """A peer has died: drop the messages that wait for it."""
        self._waiting.pop(peer, None)

    def send(self) -> None:
        """Send what can be sent now."""
        for peer, messages in list(self._waiting.items()):
            while messages and send_to(self._router, peer, messages[0]):
                messages.popleft()
            if not messages:
                del self._waiting[peer]
