"""What the gateway does when processes behind it were started again. Knows no sockets.

a tokenizer    its prompts wait until the scheduler says that it takes nothing more from the dead one (`Fenced`).
               Those that are not ACCEPTED then go to another tokenizer. A key may be used again: messages of the
               dead tokenizer are refused by its identity
the core       (scheduler, tokenizers, detokenizer, grammar processes) QUEUED requests wait on, and TOKENIZING ones
               wait again. What the core had ACCEPTED is lost in it: the client hears `Interrupted`, and sends the
               request again with what it has received
"""

from __future__ import annotations

import logging

from ipc.errors import Interrupted, RequestFailed
from ipc.messages import CacheCleared
from workers.gateway.cache_clears import CacheClears
from workers.gateway.outbox import Outbox, Peer
from workers.gateway.request_lifecycle import RequestLifecycle
from workers.gateway.request_table import Request, RequestState, RequestTable

logger = logging.getLogger(__name__)

INTERRUPTED = "a process of the engine died while it worked on this request"
_POISON = "the prompt of this request has ended two tokenizer processes: it is not tried again"


class Recovery:
    """Times are seconds."""

    def __init__(self, table: RequestTable, requests: RequestLifecycle, clears: CacheClears, outbox: Outbox) -> None:
        self._table = table
        self._requests = requests
        self._clears = clears
        self._outbox = outbox
        self._fenced_early: set[bytes] = set()  # tokenizers that live as far as we know

    def tokenizer_replaced(self, identity: bytes, now: float) -> None:
        """A tokenizer has died, and another one takes its place."""
        self._requests.prompts.replaced(identity)
        if identity in self._fenced_early:
            self._fenced_early.remove(identity)
            self.fenced(identity, now)

    def fenced(self, identity: bytes, now: float) -> None:
        """The scheduler takes nothing more from a dead tokenizer, and has accepted what it had from it."""
        prompts = self._requests.prompts
        if not prompts.is_replaced(identity):  # the scheduler was told of its death before us
            self._fenced_early.add(identity)
            return
        lost = prompts.lost(identity)
        self._outbox.cancel(lost.ended)
        poisonous = [self._table.request(prompt.key) for prompt in lost.poisonous]
        for request in filter(None, poisonous):
            if not self._end_withdrawn(request, now):
                logger.warning("request %d ends: %s", request.key, _POISON)
                self._requests.fail([request], RequestFailed(_POISON), now)
        self._queue_again(now)

    def core_replaced(self, now: float) -> None:
        """All processes between us and the GPU process are new.

        A request that a tokenizer has handed over counts as ACCEPTED: the scheduler's message may be lost.
        """
        self._fenced_early.clear()
        handed_over = self._requests.prompts.lost_all()
        for request in self._table.requests():
            if request.key in handed_over and self._end_withdrawn(request, now):
                continue
            if request.key not in handed_over and request.state is not RequestState.ACCEPTED:
                continue
            if request.is_cancelled:
                self._requests.end([request], "cancelled", now)
            else:
                self._requests.fail([request], Interrupted(INTERRUPTED), now)
        for client in self._table.clients:
            client.num_own_outputs = client.num_outputs  # the new detokenizer has spent no credit on them
        for identity, query_id in self._clears.take_all():
            self._outbox.add(Peer.CLIENT, CacheCleared(query_id=query_id), identity)
        self._queue_again(now)

    def _end_withdrawn(self, request: Request, now: float) -> bool:
        """End a request that is not ACCEPTED if the scheduler was asked to drop it. Returns whether it was."""
        if request.withdrawn_as is None:
            return False
        self._outbox.cancel([request.key])  # the scheduler may expect it, and will never get it
        self._requests.end([request], request.withdrawn_as, now)
        return True

    def _queue_again(self, now: float) -> None:
        """Bring the states of requests in line with the prompts that wait again."""
        prompts = self._requests.prompts
        for request in self._table.requests():
            if request.state is not RequestState.TOKENIZING or not prompts.is_waiting(request.key):
                continue
            request.state = RequestState.QUEUED
            if request.withdrawn_as is not None:
                prompts.remove(request.key)
                self._end_withdrawn(request, now)
        self._requests.dispatch(now)
