"""Collects the messages that the gateway's core wants sent, in order, until the worker takes them."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any, NamedTuple

from ipc.messages import CancelRequests, Withdraw, split_keys


class Peer(enum.Enum):
    """The receiver of a message."""

    CLIENT = "client"
    TOKENIZER = "tokenizer"
    SCHEDULER = "scheduler"
    DETOKENIZER = "detokenizer"
    LAUNCHER = "launcher"


class Send(NamedTuple):
    """A message to send. `identity` names one peer of a ROUTER; elsewhere it is b"". Bytes are an encoded frame."""

    peer: Peer
    identity: bytes
    message: Any


class Outbox:
    """Messages to send. Cancellations and withdrawals are collected into few messages, which go last."""

    def __init__(self) -> None:
        self._sends: list[Send] = []
        self._cancelled: list[int] = []
        self._withdrawn: list[int] = []

    def add(self, peer: Peer, message: Any, identity: bytes = b"") -> None:
        self._sends.append(Send(peer, identity, message))

    def cancel(self, keys: Iterable[int]) -> None:
        """Tell the scheduler to end these sequences. It ignores keys of sequences that have ended."""
        self._cancelled += keys

    def withdraw(self, key: int) -> None:
        """Tell the scheduler to drop this request when it arrives, unless it has arrived already."""
        self._withdrawn.append(key)

    def take(self) -> list[Send]:
        """Empty the outbox."""
        for cancels in split_keys(CancelRequests, self._cancelled):
            self.add(Peer.SCHEDULER, cancels)
        for withdraws in split_keys(Withdraw, self._withdrawn):
            self.add(Peer.SCHEDULER, withdraws)
        self._cancelled, self._withdrawn = [], []
        sends, self._sends = self._sends, []
        return sends
