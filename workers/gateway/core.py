"""Decides everything that the gateway says. Knows no sockets: events come in by method, messages go out by `outbox`.

`Gateway` has one method for every event. It leaves

    the engine's state: ready, draining, ...        to serving_state.py,
    requests' states, cancellation and time-outs    to request_lifecycle.py, which draws the state diagram,
    prompts that wait for or are at a tokenizer     to prompt_dispatch.py,
    outputs, acknowledgements, slow clients         to client_flow.py,
    processes that were started again               to recovery.py,
    queries of health and statistics                to queries.py,
    values that clients keep                        to kept_values.py,
    the checks of clients' frames                   to client_frames.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ipc.errors import EngineUnavailable, InvalidRequest, QueueFull, RequestFailed, RingfeedError
from ipc.messages import (
    CacheCleared,
    Cancel,
    ClearCache,
    ClientGone,
    ClientRequest,
    Delivered,
    Delivery,
    DetokenizedText,
    Drained,
    Generate,
    Keep,
    KeptValue,
    Outputs,
    PromptTokens,
    Query,
    Recall,
    Received,
    Refused,
    TokenizeDone,
)
from ipc.scheduling_params import no_priority
from workers.gateway.cache_clears import CacheClears
from workers.gateway.client_flow import PROBE_INTERVAL_S, ClientFlow
from workers.gateway.client_frames import MAX_ERROR_CHARS, UnreadableFrame, read_client_frames
from workers.gateway.config import GatewayBootstrap
from workers.gateway.kept_values import KeptValues
from workers.gateway.outbox import Outbox, Peer, Send
from workers.gateway.queries import EngineQueries, RoleArrays, RoleStats
from workers.gateway.recovery import Recovery
from workers.gateway.request_lifecycle import RequestLifecycle
from workers.gateway.request_table import RequestTable
from workers.gateway.request_timers import to_ns
from workers.gateway.serving_state import ServingState

logger = logging.getLogger(__name__)


class Gateway:
    """The role's whole behaviour. Times are seconds of one monotonic clock.

    After every event the owner sends the messages of `take_outbox()`. It calls `client_gone()` if a client cannot be
    reached, and `client_full()` if a message has no room. `snapshot_stats` reads all statistics, and arrays by name.
    """

    def __init__(
        self, bootstrap: GatewayBootstrap, snapshot_stats: Callable[[Sequence[str]], tuple[RoleStats, RoleArrays]]
    ) -> None:
        self.serving = ServingState(bootstrap.frontend.drain_timeout_s, is_first=bootstrap.worker.epoch == 1)
        self.table = RequestTable(bootstrap.worker.epoch)
        self._outbox = Outbox()
        self._flow = ClientFlow(bootstrap, self.table, self._outbox)
        self.requests = RequestLifecycle(bootstrap, self.table, self._flow, self._outbox)
        self.num_received = 0
        self.num_refused = 0
        self.num_queue_full = 0  # refused because something was full
        self._bootstrap = bootstrap
        self._queries = EngineQueries(bootstrap, snapshot_stats)
        self._clears = CacheClears()
        self.recovery = Recovery(self.table, self.requests, self._clears, self._outbox)
        self.kept = KeptValues(bootstrap.frontend.max_kept_bytes)
        self._next_probe = 0.0

    def take_outbox(self) -> list[Send]:
        """The messages to send, in order."""
        if self.serving.has_just_drained(len(self.table)):
            self._outbox.add(Peer.LAUNCHER, Drained())
        return self._outbox.take()

    # The launcher

    def abort(self, error: RingfeedError) -> None:
        """Answer every open request with an error."""
        self.serving.fail(str(error))
        self.requests.fail_all(error)

    # Clients

    def client_frames(self, identity: bytes, frames: list[bytes], now: float) -> None:
        """A client has sent a message, which may hold anything."""
        self.num_received += 1
        request_id = ""
        try:
            message = read_client_frames(frames)
            if isinstance(message, ClientRequest | Keep | Recall):
                request_id = message.request_id
            if isinstance(message, ClientRequest):
                self._open(identity, message, len(frames[0]), now)
            elif isinstance(message, Keep | Recall):
                self._keep_or_recall(identity, message)
            else:
                self._client_message(identity, message, now)
        except UnreadableFrame as unreadable:
            self._refuse(identity, unreadable.request_id, unreadable.error)
        except RingfeedError as error:
            self._refuse(identity, request_id, error)

    def _open(self, identity: bytes, message: ClientRequest, frame_bytes: int, now: float) -> None:
        self.serving.check_takes_requests(is_resumed=isinstance(message, Generate) and message.resume is not None)
        self._flow.check_not_suspended(identity)
        priority = message.scheduling.priority
        if priority and self._bootstrap.policy.policy != "priority":
            raise InvalidRequest(no_priority(priority))
        self.requests.open(identity, message, frame_bytes, now)

    def _keep_or_recall(self, identity: bytes, message: Keep | Recall) -> None:
        """Engines of any state do this: a server stores the answers of its last requests while the engine drains."""
        request_id = message.request_id
        if isinstance(message, Keep):
            answer = KeptValue(request_id=request_id, found=self.kept.keep(message.key, message.value))
        elif message.forget:
            answer = KeptValue(request_id=request_id, found=self.kept.forget(message.key))
        else:
            value = self.kept.recall(message.key)
            if value:
                self._flow.send_answer(identity, KeptValue(request_id=request_id, found=True, value=value))
                return
            answer = KeptValue(request_id=request_id, found=value is not None)
        self._outbox.add(Peer.CLIENT, answer, identity)

    def _client_message(
        self, identity: bytes, message: Cancel | Query | ClearCache | Delivered | Received, now: float
    ) -> None:
        if isinstance(message, Cancel):
            self.requests.cancel(identity, message.request_id, now)
        elif isinstance(message, Query):
            self._outbox.add(Peer.CLIENT, self._queries.answer(message, self.serving), identity)
        elif isinstance(message, ClearCache):
            clear_id = self._clears.add(identity, message.query_id, to_ns(now))
            self._outbox.add(Peer.SCHEDULER, ClearCache(query_id=clear_id))
        elif isinstance(message, Received):
            self._flow.received(identity, message.receipts)
        else:
            self._flow.acknowledge(identity, message.count, now)

    def _refuse(self, identity: bytes, request_id: str, error: RingfeedError) -> None:
        self.num_refused += 1
        self.num_queue_full += isinstance(error, QueueFull)
        logger.debug("refused %s: %s", request_id or "a message", error)
        text = str(error)[:MAX_ERROR_CHARS]
        refused = Refused(
            request_id=request_id, error_code=error.code, error_message=text, retry_after_s=error.retry_after_s
        )
        self._outbox.add(Peer.CLIENT, refused, identity)

    def client_gone(self, identity: bytes) -> None:
        """A client cannot be reached any more."""
        self._flow.forget(identity)
        client = self.table.client(identity)
        if client is not None:
            if client.keys:
                logger.info("a client has disconnected; cancelling its %d requests", len(client.keys))
            self.requests.drop_client(client)

    def client_full(self, identity: bytes, message: Any) -> None:
        """A client's queue is full of unread messages and has no room for `message`. Suspend the client."""
        client = self.table.client(identity)
        if isinstance(message, PromptTokens | DetokenizedText | KeptValue):
            self._flow.received(identity, [message.receipt])  # it is in no queue
        if client is not None or isinstance(message, Outputs | bytes):  # else: an answer that needs no credit is lost
            self._flow.suspend(identity, message)
        if client is not None:
            logger.warning("a client does not read its messages; cancelling its %d requests", len(client.keys))
            self._flow.send_errors(client, RequestFailed("cancelled: this client left too many messages unread"))
            self.requests.drop_client(client)

    # The other workers

    def tokenizer_done(self, identity: bytes, key: int, now: float) -> None:
        """A tokenizer has passed on a request, or (key 0) has connected."""
        self.requests.prompts.done(identity, key)
        self.requests.dispatch(now)

    def answered(self, done: TokenizeDone, now: float) -> None:
        """A tokenizer has answered a query; `tokenizer_done` was called for it too."""
        self.requests.answered(done, now)

    def accepted(self, keys: Iterable[int]) -> None:
        """The scheduler has these requests."""
        self.requests.accepted(keys)

    def withdrawn(self, keys: Iterable[int], now: float) -> None:
        """The scheduler does not have these requests, and will drop them when they arrive."""
        self.requests.withdrawn(keys, now)

    def cache_cleared(self, clear_id: int, now: float) -> None:
        """The scheduler has emptied its cache."""
        identity, query_id = self._clears.done(clear_id, to_ns(now))
        self._outbox.add(Peer.CLIENT, CacheCleared(query_id=query_id), identity)

    def delivery(self, head: Delivery, frames: list[bytes], now: float) -> None:
        """The detokenizer has outputs: one encoded frame for each client that the head names."""
        for name, finished, frame in zip(head.clients, head.finished, frames, strict=True):
            client = self.table.client_named(name)
            if client is None:
                # The client was dropped and its requests are cancelled. This frame will not be acknowledged.
                self._outbox.add(Peer.DETOKENIZER, ClientGone(client=name))
            else:
                self._flow.send_outputs(client, frame, now)
            if finished:
                self.requests.finished(finished, now)

    # Time

    def timeout_s(self, now: float) -> float | None:
        """The longest time until the next `tick`; None: no tick is needed before the next event."""
        times = [self.serving.next_tick()]
        if self._flow.needs_probes:
            times.append(now + PROBE_INTERVAL_S)
        if self.requests.first_timer_ns is not None:
            times.append(self.requests.first_timer_ns / 1e9)
        first = min(times)
        return None if first == float("inf") else max(0.0, first - now)

    def tick(self, now: float) -> None:
        """End requests that are out of time, and drop clients that have gone or stopped reading.

        Call at least as often as `timeout_s` says.
        """
        self.requests.expire(now)
        if self.serving.tick(now):
            self.requests.fail_all(EngineUnavailable("the engine was stopped before this request was finished"))
        if now >= self._next_probe:
            self._next_probe = now + PROBE_INTERVAL_S
            self._drop_slow_clients(now)
            self._flow.probe()

    def _drop_slow_clients(self, now: float) -> None:
        timeout_s = self._bootstrap.frontend.slow_client_timeout_s
        for client in self._flow.slow_clients(now):
            logger.warning(
                "a client has acknowledged no output for %g s; cancelling its %d requests", timeout_s, len(client.keys)
            )
            error = RequestFailed(f"cancelled: this client took in no output for {timeout_s:g} s")
            self._flow.send_errors(client, error)
            self.requests.drop_client(client)
            self._flow.suspend(client.identity)
