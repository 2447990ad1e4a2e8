"""Moves every request through its states, and ends each with exactly one final answer.

             dispatch                Accepted              Delivery with the final answer
    QUEUED ───────────> TOKENIZING ────────────> ACCEPTED ────────────────────────────────> closed
      │                     │                       │
      │ cancel, time-out    │ cancel, time-out:     │ cancel: send CancelRequests.
      │                     │ send Withdraw         │ It stays ACCEPTED until its Delivery
      v                     v
    closed,             Withdrawn: closed, answered here
    answered here       Accepted:  ACCEPTED; a cancel is now sent as CancelRequests

A query (`TokenizeQuery`, `DetokenizeQuery`) never becomes ACCEPTED: its answer comes from the tokenizer and closes it.
If it ends earlier, it is closed and answered here at once, and the tokenizer's answer is dropped.

If a client is dropped, all its requests are cancelled, and no Delivery for them is awaited.

Final answers come from the detokenizer, in frames that the gateway passes on without reading them. The gateway itself
answers requests that the detokenizer does not know: those that end while QUEUED, and those that are Withdrawn. It also
answers if it drops a client or the engine fails; then it discards the detokenizer's frames.

Only the scheduler knows whether a TOKENIZING request has reached it. From `Accepted` on, the scheduler enforces the
request's time-outs.
"""

from __future__ import annotations

import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable

from ipc.errors import RingfeedError
from ipc.messages import (
    ClientGone,
    ClientRequest,
    FinishReason,
    Generate,
    Route,
    Tokenize,
    TokenizeDone,
    TokenizerQuery,
    open_samples,
)
from ipc.sampling_params import MAX_SEED
from workers.gateway.client_flow import ClientFlow
from workers.gateway.config import GatewayBootstrap
from workers.gateway.outbox import Outbox, Peer
from workers.gateway.prompt_dispatch import PromptDispatcher
from workers.gateway.prompt_memory import held_bytes
from workers.gateway.request_table import ClientSession, Request, RequestState, RequestTable, SampleEnd
from workers.gateway.request_timers import RequestTimers, to_ns

Ends = list[tuple[Request, FinishReason]]


class RequestLifecycle:
    """All transitions of requests. Times are seconds of CLOCK_MONOTONIC."""

    def __init__(self, bootstrap: GatewayBootstrap, table: RequestTable, flow: ClientFlow, outbox: Outbox) -> None:
        self.prompts = PromptDispatcher(bootstrap)  # of requests that are QUEUED or TOKENIZING
        self.num_finished = 0
        self.num_cancelled = 0
        self.num_out_of_time: Counter[str] = Counter()  # before they reached the scheduler, by finish reason
        self._max_open_requests = bootstrap.frontend.max_open_requests
        self._policy = bootstrap.policy.policy
        self._table = table
        self._flow = flow
        self._outbox = outbox
        self._timers = RequestTimers(table, bootstrap.policy.queue_timeout_s)

    # A request begins

    def open(self, identity: bytes, message: ClientRequest, frame_bytes: int, now: float) -> None:
        """A client's valid request arrives. Raises InvalidRequest or QueueFull if the gateway cannot take it."""
        now_ns = to_ns(now)
        num_samples = message.params.n if isinstance(message, Generate) else 1
        self._table.check_open_requests(identity, message.request_id, num_samples, self._max_open_requests, now_ns)
        num_held = held_bytes(message, frame_bytes, self._policy)
        self.prompts.check_room(num_held, now_ns)
        num_prompt_tokens = len(message.token_ids or b"") // 4
        request = self._table.open(identity, message.request_id, num_samples, now_ns, num_prompt_tokens)
        if isinstance(message, Generate):
            if message.resume is not None:
                request.known = open_samples(num_samples, message.resume)
            self.prompts.add(self._tokenize(request, message, now_ns), frame_bytes, num_held)
        else:
            request.is_query = True
            self._timers.set(request.key, message.scheduling, now_ns)
            query = TokenizerQuery(key=request.key, query=message, arrived_ns=now_ns)
            self.prompts.add(query, frame_bytes, num_held)
        self.dispatch(now)

    def _tokenize(self, request: Request, message: Generate, now_ns: int) -> Tokenize:
        """The message for the tokenizer. Sets the request's timers, and draws a seed if it has none."""
        assert request.client is not None, "a new request has its client"
        params, resume = message.params, message.resume
        deadline_ns = self._timers.set(request.key, message.scheduling, now_ns, is_resumed=resume is not None)
        if params.seed is None:
            params = params.with_seed(secrets.randbelow(MAX_SEED + 1))
        return Tokenize(
            key=request.key,
            route=Route(request.client.name, message.request_id, message.stream),
            params=params,
            prompt=message.prompt,
            chat=message.chat,
            token_ids=message.token_ids,
            cache_salt=message.cache_salt,
            scheduling=message.scheduling,
            arrived_ns=now_ns,
            deadline_ns=deadline_ns,
            clock_s=message.clock_s,
            resume=resume,
        )

    @property
    def first_timer_ns(self) -> int | None:
        """When `expire` may have something to do; None: not before the next request."""
        return self._timers.first_ns

    # QUEUED -> TOKENIZING -> ACCEPTED -> closed

    def dispatch(self, now: float) -> None:
        """Give the tokenizers as many prompts as they have room for. Requests that are out of time end first."""
        self.expire(now)
        for identity, message in self.prompts.dispatch(to_ns(now)):
            request = self._table.request(message.key)
            assert request is not None, f"request {message.key} is queued and not in the table"
            request.state = RequestState.TOKENIZING
            self._outbox.add(Peer.TOKENIZER, message, identity)

    def accepted(self, keys: Iterable[int]) -> None:
        """The scheduler has these requests, and enforces their time-outs. Passes on cancellations that came earlier."""
        for key in keys:
            request = self._table.request(key)
            if request is None:  # ended already
                continue
            request.state = RequestState.ACCEPTED
            self.prompts.accepted(key)
            if request.is_cancelled:
                self._outbox.cancel(request.keys)
                if request.client is None:
                    self._close(request)

    def finished(self, keys: Iterable[int], now: float) -> None:
        """The detokenizer has sent the final answers of these requests."""
        for key in keys:
            request = self._table.request(key)
            if request is not None:
                self._close(request, now)

    def answered(self, done: TokenizeDone, now: float) -> None:
        """A tokenizer has answered a query. If the query has ended already, the answer is dropped."""
        request = self._table.request(done.key)
        if request is not None and request.client is not None:
            self._flow.answer_query(request.client, request.request_id, done, now)
            self._close(request, now)

    # Requests are stopped

    def cancel(self, identity: bytes, request_id: str, now: float) -> None:
        """A client cancels one of its requests. Unknown ids are ignored."""
        client = self._table.client(identity)
        key = None if client is None else client.keys.get(request_id)
        request = None if key is None else self._table.request(key)
        if request is not None:
            self._end_here(self._cancel(request), now)

    def expire(self, now: float) -> None:
        """Stop the requests whose time runs out before they reach the scheduler."""
        if due := self._timers.take_due(to_ns(now)):
            self._end_here(self._stop(due), now)

    def drop_client(self, client: ClientSession) -> None:
        """Cancel all requests of a client without answers: the client has gone, or has errors already."""
        self._outbox.add(Peer.DETOKENIZER, ClientGone(client=client.name))
        for request in self._table.forget(client):
            for ended, _ in self._cancel(request):
                self._close(ended)
            if request.state is RequestState.ACCEPTED:
                self._close(request)  # a TOKENIZING one stays in the table until the scheduler has answered

    def withdrawn(self, keys: Iterable[int], now: float) -> None:
        """The scheduler does not have these requests, and will drop them when they arrive."""
        ended: Ends = []
        for key in keys:
            request = self._table.request(key)
            if request is None or request.state is RequestState.ACCEPTED:
                self._outbox.cancel([key])  # it had arrived and has ended: the scheduler must not wait for it
            else:
                assert request.withdrawn_as is not None, f"request {key} was never withdrawn"
                ended.append((request, request.withdrawn_as))
        self._end_here(ended, now)

    def fail_all(self, error: RingfeedError) -> None:
        """Answer all open requests with an error. The detokenizer's later frames find no client."""
        for client in list(self._table.clients):
            self._flow.send_errors(client, error)
        self.num_finished += len(self._table)
        self._table.clear()
        self.prompts.clear()
        self._timers.clear()

    def _cancel(self, request: Request) -> Ends:
        """Cancel a request, once. Returns it if it has ended now."""
        if request.is_cancelled:
            return []
        request.is_cancelled = True
        self.num_cancelled += 1
        if request.state is RequestState.ACCEPTED:
            self._outbox.cancel(request.keys)
            return []
        return self._stop([(request, "cancelled")])

    def _stop(self, ends: Ends) -> Ends:
        """Stop QUEUED and TOKENIZING requests. Returns those that have ended now, among them all queries.

        For the others, the scheduler's answer to Withdraw decides.
        """
        ended: Ends = []
        for request, reason in ends:
            if request.state is RequestState.QUEUED:
                self.prompts.remove(request.key)
                ended.append((request, reason))
            elif request.is_query:
                ended.append((request, reason))
            elif request.withdrawn_as is None:  # the first reason stands
                request.withdrawn_as = reason
                self._outbox.withdraw(request.key)
        return ended

    def fail(self, requests: list[Request], error: RingfeedError, now: float) -> None:
        """Answer requests with an error, and close them."""
        self._end_here([(request, "error") for request in requests], now, error)

    def end(self, requests: list[Request], reason: FinishReason, now: float) -> None:
        """Answer requests of which no other process knows, and close them."""
        self._end_here([(request, reason) for request in requests], now)

    def _end_here(self, ends: Ends, now: float, error: RingfeedError | None = None) -> None:
        """Answer requests that the detokenizer does not know, and close them. Each client gets one message."""
        answers: defaultdict[ClientSession, list[SampleEnd]] = defaultdict(list)
        for request, reason in ends:
            if reason in ("deadline", "queue_timeout"):
                self.num_out_of_time[reason] += 1
            if request.client is not None:
                answers[request.client] += request.ends(reason) if error is None else request.failed(error)
        for client, finals in answers.items():
            self._flow.send_finals(client, finals, now)
        for request, _ in ends:
            self._close(request, now)

    def _close(self, request: Request, now: float | None = None) -> None:
        """Take a request out of the table. `now` may be None if its client was dropped."""
        self.num_finished += 1
        self.prompts.forget(request.key)
        if request.client is not None and now is not None:
            request.client.departures.leave(to_ns(now), len(request.keys))
        self._table.close(request)
