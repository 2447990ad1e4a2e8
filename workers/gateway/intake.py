"""Tracks requests from their arrival until the scheduler has them: queued for a tokenizer, then at a tokenizer.

Owns the queue, the prompts under way to the tokenizers, and the time-outs of these requests. Sends no answers:
`core.py` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ipc.messages import FinishReason, Generate, Route, Tokenize
from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import SchedulingParams
from workers.gateway.config import GatewayBootstrap
from workers.gateway.prompt_queue import PromptQueue
from workers.gateway.request_table import Request, RequestState, RequestTable
from workers.gateway.tokenizer_pool import TokenizerPool
from workers.queueing.timers import Timers

Ends = list[tuple[Request, FinishReason]]


class Intake:
    """Times are nanoseconds of CLOCK_MONOTONIC, as in the messages."""

    def __init__(self, bootstrap: GatewayBootstrap, table: RequestTable) -> None:
        self.queue = PromptQueue(bootstrap.frontend.max_queued_bytes, bootstrap.policy)  # of the QUEUED requests
        self._queue_timeout_s = bootstrap.policy.queue_timeout_s
        self._table = table
        self._tokenizers = TokenizerPool(bootstrap.tokenizer_window, bootstrap.tokenizer_window_bytes)
        self._timers = Timers(self._is_ours)
        self._withdraws: list[int] = []  # at most as many as are under way to tokenizers

    @property
    def first_timer_ns(self) -> int | None:
        """When `take_due` may return something; None: not before the next `add`."""
        return self._timers.first_ns

    def clear(self) -> None:
        """All requests have ended."""
        self.queue.clear()
        self._timers.clear()

    def add(
        self, request: Request, message: Generate, params: SamplingParams, frame_bytes: int, num_held: int, now_ns: int
    ) -> None:
        """A new request begins to wait. `params` are the message's, with a seed; it holds `num_held` bytes."""
        assert request.client is not None, "a new request has its client"
        tokenize = Tokenize(
            key=request.key,
            route=Route(request.client.name, message.request_id, message.stream),
            params=params,
            prompt=message.prompt,
            chat=message.chat,
            token_ids=message.token_ids,
            cache_salt=message.cache_salt,
            scheduling=message.scheduling,
            arrived_ns=now_ns,
            deadline_ns=self._set_timers(request.key, message.scheduling, now_ns),
        )
        self.queue.add(tokenize, frame_bytes, num_held)

    def _set_timers(self, key: int, scheduling: SchedulingParams, now_ns: int) -> int:
        """Set timers, as the scheduler will when it has the request. Returns the time of the deadline; 0 = none."""
        wait_s = scheduling.queue_timeout_s or self._queue_timeout_s
        if wait_s is not None:
            self._timers.add(now_ns + round(wait_s * 1e9), key, "queue_timeout")
        if scheduling.deadline_s is None:
            return 0
        deadline_ns = now_ns + round(scheduling.deadline_s * 1e9)
        self._timers.add(deadline_ns, key, "deadline")
        return deadline_ns

    def _is_ours(self, key: int) -> bool:
        """Whether a request is open and, as far as is known here, has not reached the scheduler."""
        request = self._table.request(key)
        return request is not None and request.state is not RequestState.ACCEPTED

    def take_due(self, now_ns: int) -> Ends:
        """The requests whose time has run out here, each with the reason that came first."""
        if self._timers.first_ns is None or self._timers.first_ns > now_ns:
            return []
        due: dict[Request, FinishReason] = {}
        for key, reason in self._timers.take_due(now_ns):
            request = self._table.request(key)
            if request is not None and request.state is not RequestState.ACCEPTED:
                due.setdefault(request, reason)
        return list(due.items())

    def stop(self, ends: Ends) -> Ends:
        """Stop requests that the scheduler does not have, as far as is known here.

        Returns those that have ended now; for the others, the scheduler's answer decides.
        """
        ended: Ends = []
        for request, reason in ends:
            if request.state is RequestState.QUEUED:
                self.queue.end(request.key)
                ended.append((request, reason))
            elif request.withdrawn_as is None:  # the first reason stands
                request.withdrawn_as = reason
                self._withdraws.append(request.key)
        return ended

    def take_withdraws(self) -> list[int]:
        """Keys of the requests that were withdrawn since the last call; the scheduler must hear of them."""
        keys, self._withdraws = self._withdraws, []
        return keys

    def withdrawn(self, keys: Iterable[int]) -> tuple[Ends, list[int]]:
        """The scheduler does not have these requests, and will drop them when they arrive.

        Returns those that have ended now, and the keys of those that had arrived and ended earlier: the scheduler need
        not expect them any more.
        """
        ended: Ends = []
        over = []
        for key in keys:
            request = self._table.request(key)
            if request is None or request.state is RequestState.ACCEPTED:
                over.append(key)
            else:
                assert request.withdrawn_as is not None, f"request {key} was never withdrawn"
                ended.append((request, request.withdrawn_as))
        return ended, over

    def tokenizer_done(self, identity: bytes, key: int) -> None:
        """A tokenizer has passed on a request, or (key 0) has connected."""
        self._tokenizers.done(identity, key)
        self.queue.end(key)

    def dispatch(self, now_ns: int) -> Iterator[tuple[bytes, Tokenize]]:
        """Yield prompts in the order of the policy while a tokenizer has room, each with the tokenizer that gets it."""
        while len(self.queue) and (tokenizer := self._tokenizers.next()) is not None:
            message, num_bytes = self.queue.take_next(now_ns)
            request = self._table.request(message.key)
            assert request is not None, f"request {message.key} is queued and not in the table"
            request.state = RequestState.TOKENIZING
            self._tokenizers.give(tokenizer, message.key, num_bytes)
            yield tokenizer.identity, message
