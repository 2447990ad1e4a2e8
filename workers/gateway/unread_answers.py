"""Bounds the large answers that clients have not read: token ids, texts and kept values.

Each such answer has a random receipt. The client returns it in `Received` and thereby proves that it has read the
answer, so no queue holds it any more. A client that only asks cannot fill the gateway's memory.
"""

from __future__ import annotations

import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, KeysView
from typing import Final

from ipc.errors import QueueFull

MAX_UNREAD_BYTES_OF_CLIENT: Final = 64 << 20
MAX_UNREAD_BYTES: Final = 256 << 20  # of all clients
ANSWER_OVERHEAD_BYTES: Final = 512  # of an answer in a queue and of its receipt here, rounded up
RECEIPT_BITS: Final = 63
RETRY_AFTER_S: Final = 1.0


class UnreadAnswers:
    """The sizes of the unread answers by client and receipt, each with its overhead."""

    def __init__(self) -> None:
        self._answers: defaultdict[bytes, dict[int, int]] = defaultdict(dict)  # bytes by receipt, by client's identity
        self._num_bytes: Counter[bytes] = Counter()  # by client's identity

    @property
    def clients(self) -> KeysView[bytes]:
        """The identities of clients with unread answers."""
        return self._answers.keys()

    def add(self, identity: bytes, num_bytes: int) -> int:
        """An answer is about to be sent. Returns its receipt. Raises QueueFull if too much is unread."""
        num_bytes += ANSWER_OVERHEAD_BYTES
        for unread, limit, whose in (
            (self._num_bytes[identity], MAX_UNREAD_BYTES_OF_CLIENT, "this client"),
            (self._num_bytes.total(), MAX_UNREAD_BYTES, "all clients together"),
        ):
            if unread + num_bytes > limit:
                raise QueueFull(
                    f"answers that {whose} left unread hold {unread} bytes; the {num_bytes} bytes of this one would "
                    f"exceed {limit}: read them, and try again in {RETRY_AFTER_S:g} s",
                    RETRY_AFTER_S,
                )
        receipt = 1 + secrets.randbits(RECEIPT_BITS - 1)
        self._answers[identity][receipt] = num_bytes
        self._num_bytes[identity] += num_bytes
        return receipt

    def received(self, identity: bytes, receipts: Iterable[int]) -> None:
        """A client has read these answers. Unknown receipts are ignored."""
        answers = self._answers.get(identity)
        if answers is None:
            return
        for receipt in receipts:
            self._num_bytes[identity] -= answers.pop(receipt, 0)
        if not answers:
            self.forget(identity)

    def forget(self, identity: bytes) -> None:
        """The client has gone, and with it the queue of its answers."""
        self._answers.pop(identity, None)
        self._num_bytes.pop(identity, None)
