"""Sends a client's requests and queries to the engine, on one event loop, and waits for their answers.

Writes the client's messages to the gateway (`ipc/messages.py`: client -> gateway) and sends them over `connection.py`.
`pending.py` reads the gateway's messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import reprlib
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

from ipc.codec import encode
from ipc.errors import EngineUnavailable, InvalidRequest
from ipc.messages import Cancel, ClearCache, Delivered, Query, Received
from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import SchedulingParams
from pipeline.client.callbacks import Pauses, weakly
from pipeline.client.connection import Connection
from pipeline.client.endpoint import no_engine
from pipeline.client.inputs import Prompt, client_frame, generate_message, new_id
from pipeline.client.interruption import OpenQuery
from pipeline.client.keys import ClientKeys
from pipeline.client.loop_thread import CLOSED
from pipeline.client.open_request import OpenRequest
from pipeline.client.outputs import Output
from pipeline.client.pending import PendingAnswers
from pipeline.client.resuming import Resumer
from pipeline.environment import forks


class Session:
    """The requests and queries of one client. Connects at first use, and again when an engine comes back.

    A session belongs to the event loop of its first use. Once that loop has stopped, another one can use the session.
    In a forked child it starts again from nothing. The loop does not keep it alive: dropping the last reference closes
    its connection. `timeout_s`: how long a request waits until an engine is reachable; None = no limit.
    `resume_timeout_s`: how long an interrupted one waits for an engine that continues it.
    """

    def __init__(
        self, endpoint: str, keys: ClientKeys, timeout_s: float | None, resume_timeout_s: float | None, is_default: bool
    ) -> None:
        self.has_ended: Callable[[], bool] = lambda: False  # whether the engine has ended for good
        self._endpoint = endpoint
        self._keys = keys
        self._timeout_s = timeout_s
        self._resume_timeout_s = resume_timeout_s
        self._is_default = is_default  # this user's default endpoint
        self._closed = False
        self._query_ids = itertools.count(1)
        self._forget()
        forks.register(self)

    def _forget(self) -> None:
        """Return to the state before the first use."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connection: Connection | None = None
        self._resumer: Resumer | None = None
        self._pending = PendingAnswers(self._endpoint, resumes=self._resume_timeout_s != 0)
        self._pauses = Pauses()

    async def whole(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None,
        cache_salt: str,
        scheduling: SchedulingParams,
    ) -> Output:
        """Send a request and wait for its one Output."""
        request = self.start(prompt, params, False, request_id, cache_salt, scheduling)
        try:
            while not request.ended:
                await request.news(self.bind())
        finally:
            self.abandon(request)  # if this task was cancelled; no effect if the request has ended
        if request.error is not None:
            raise request.take_error()
        return request.take_whole()

    def start(
        self,
        prompt: Prompt,
        params: SamplingParams,
        stream: bool,
        request_id: str | None,
        cache_salt: str,
        scheduling: SchedulingParams,
    ) -> OpenRequest:
        """Send a request; if no engine is reachable, it waits for one. `request_id` None = a new one."""
        connection = self._connect()
        request_id = new_id() if request_id is None else request_id
        message = generate_message(request_id, prompt, params, stream, cache_salt, scheduling)
        frame = client_frame(message, "prompt")
        if request_id in self._pending.requests:
            raise InvalidRequest(f"request_id ({request_id!r}) belongs to an open request: choose another one")
        request = self._pending.requests[request_id] = OpenRequest(message)
        if connection.is_up:
            connection.send(frame)
            request.sent(time.monotonic())
        else:
            self._pending.unsent[request_id] = frame
            if self._timeout_s is not None:
                self.bind().call_later(self._timeout_s, weakly(self._fail_if_unsent), request)
        return request

    def abandon(self, request: OpenRequest) -> None:
        """Cancel a request whose reader has gone. Its id stays in use until its final answer, which is discarded."""
        if self._pending.requests.get(request.request_id) is not request or request.abandoned:
            return
        request.abandoned = request.is_deaf = True
        if not self._pending.take_back(request) and self._connection is not None:
            self._connection.send(encode(Cancel(request_id=request.request_id)))

    def cancel(self, request_id: str) -> None:
        """End an open request of this client with finish reason "cancelled". Unknown ids are ignored."""
        if not isinstance(request_id, str):
            raise InvalidRequest(f"request_id ({reprlib.repr(request_id)}) must be a string")
        self.bind()
        request = self._pending.requests.get(request_id)
        if request is None:
            return
        request.cancelled = True
        if self._pending.take_back(request):
            request.end_here("cancelled")
        else:
            self._connect().send(encode(Cancel(request_id=request_id)))

    async def query(
        self, what: Literal["health", "stats", "clear_cache"], timeout_s: float | None, arrays: Sequence[str] = ()
    ) -> Any:
        """Ask for the engine's state, its statistics, or an empty cache. Waits for the answer as `ask` does."""
        query_id = next(self._query_ids)
        if what == "clear_cache":
            frame = encode(ClearCache(query_id=query_id))
        else:
            frame = encode(Query(query_id=query_id, what=what, arrays=list(arrays)))
        return await self.ask(query_id, frame, timeout_s)

    async def ask(self, query_id: int | str, frame: bytes, timeout_s: float | None, *, is_queued: bool = False) -> Any:
        """Send a query and return the engine's answer, or raise its error.

        Raises EngineUnavailable after `timeout_s` seconds; None = no limit. If the query waits in the engine's queue
        (`is_queued`), `timeout_s` limits only the time until an engine is reachable. Cancelling the task cancels it.
        """
        connection, pending = self._connect(), self._pending
        answer: asyncio.Future[Any] = self.bind().create_future()
        query = pending.queries[query_id] = OpenQuery(query_id, answer, frame, is_queued=is_queued)
        if connection.is_up:
            connection.send(frame)
        else:
            pending.unsent[query_id] = frame
        try:
            await asyncio.wait([answer], timeout=timeout_s)
            if not answer.done() and not (is_queued and query_id not in pending.unsent):
                raise self._no_engine(timeout_s)
            return await answer
        finally:
            if answer.done() and not answer.cancelled():
                answer.exception()  # asyncio would log it if the task was cancelled at the same moment
            if pending.queries.get(query_id) is query and not pending.take_back(query):
                pending.remove(query)
                if is_queued and self._connection is not None:
                    self._connection.send(encode(Cancel(request_id=str(query_id))))

    async def pause(self, seconds: float) -> None:
        """Sleep. Raises EngineUnavailable if the client is closed or gets closed meanwhile."""
        if self._closed:
            raise EngineUnavailable(CLOSED)
        await self._pauses.sleep(seconds, self.bind())
        if self._closed:
            raise EngineUnavailable(CLOSED)

    def bind(self) -> asyncio.AbstractEventLoop:
        """Return the running loop. The client belongs to it from now on."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise InvalidRequest(
                "AsyncClient needs a running event loop: call it in a coroutine, or use Client"
            ) from None
        if loop is not self._loop:
            self._leave_loop()
            self._loop = loop
        return loop

    def close(self) -> None:
        """Cancel open requests, fail them and open queries, and disconnect. Call it on any running loop."""
        self._closed, loop = True, self._loop
        if loop is None or loop is asyncio.get_running_loop() or not loop.is_running():
            self._close()
        else:
            with contextlib.suppress(RuntimeError):  # the loop has just ended
                loop.call_soon_threadsafe(self._close)

    def forget_parent(self) -> None:
        """In a forked child: leave the parent's connection and requests alone, and start again from nothing."""
        forks.keep_for_ever(self._connection, self._pending, self._pauses, self._resumer)
        self._forget()

    def _fail_if_unsent(self, request: OpenRequest) -> None:
        pending, request_id = self._pending, request.request_id
        if pending.requests.get(request_id) is request and request_id in pending.unsent:
            pending.take_back(request)
            request.fail(self._no_engine())

    # Messages of the engine, and its end

    def _take_frames(self, frames: list[bytes]) -> None:
        num_outputs, receipts = self._pending.take_frames(frames)
        if self._connection is None:
            return
        if num_outputs:
            # Acknowledge at once: what a slow reader leaves unread is merged into one Output per sample.
            self._connection.send(encode(Delivered(count=num_outputs)))
        if receipts:
            self._connection.send(encode(Received(receipts=receipts)))

    def _lose_engine(self) -> None:
        self._pending.lose_engine(EngineUnavailable(f"the engine at {self._endpoint} is gone"))

    # The event loop and the connection

    def _leave_loop(self) -> None:
        """Leave the present loop. Raises InvalidRequest if it runs, or if open requests on it can still end."""
        loop = self._loop
        if loop is None:
            return
        if loop.is_running() or (self._pending.are_awaited and not loop.is_closed()):
            raise InvalidRequest(
                "this AsyncClient belongs to another event loop, which is still in use: make one AsyncClient for each "
                "event loop, or use Client, which threads can share"
            )
        self._disconnect(flush=False)
        self._forget()

    def _connect(self) -> Connection:
        if self._closed:
            raise EngineUnavailable(CLOSED)
        loop = self.bind()
        if self._connection is None:
            # The loop refers to the connection, and the connection must not keep this client alive.
            self._connection = Connection(
                self._endpoint,
                loop,
                self._keys,
                on_frames=weakly(self._take_frames),
                on_up=weakly(self._meet_engine),
                on_down=weakly(self._lose_engine),
            )
            self._resumer = Resumer(
                self._pending, self._connection, loop,
                endpoint=self._endpoint, limit_s=self._resume_timeout_s, has_ended=self.has_ended,
            )  # fmt: skip
            self._finalizer = weakref.finalize(self, self._connection.drop)
            self._finalizer.atexit = False  # at exit the process ends anyway
        return self._connection

    def _disconnect(self, *, flush: bool) -> None:
        if self._resumer is not None:
            self._resumer.close()
        if self._connection is not None:
            self._finalizer.detach()
            self._connection.close(flush=flush)

    def _close(self) -> None:
        if self._connection is not None:
            pending = self._pending
            for request_id in pending.requests.keys() - pending.unsent.keys() - pending.waiting.keys():
                self._connection.send(encode(Cancel(request_id=request_id)))
        self._pending.fail_all(EngineUnavailable(CLOSED))
        self._pauses.end()
        self._disconnect(flush=True)
        self._connection = self._resumer = None

    def _meet_engine(self) -> None:
        pending, now = self._pending, time.monotonic()
        for key, frame in pending.unsent.items():
            self._connect().send(frame)
            if isinstance(key, str) and (request := pending.requests.get(key)) is not None:
                request.sent(now)
        pending.unsent.clear()
        if self._resumer is not None:
            self._resumer.meet_engine()

    def _no_engine(self, timeout_s: float | None = None) -> EngineUnavailable:
        refusal = self._connection.refusal if self._connection else ""
        return no_engine(self._endpoint, timeout_s or self._timeout_s, self._is_default, refusal)
