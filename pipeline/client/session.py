"""A client's open requests and queries on one event loop, and the connection that carries them.

Talks to the gateway alone (`ipc/messages.py`: client -> gateway, gateway -> client), over `connection.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import reprlib
import uuid
import weakref
from collections.abc import Callable
from typing import Any, Literal

from ipc.codec import decode, encode
from ipc.errors import EngineUnavailable, InvalidRequest, ProtocolError, RingfeedError, error_from_code
from ipc.messages import (
    Alive,
    Cancel,
    ClearCache,
    Delivered,
    FinalOutput,
    GatewayToClient,
    Outputs,
    Query,
    Refused,
)
from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import SchedulingParams
from pipeline.client.connection import Connection
from pipeline.client.endpoint import where_else
from pipeline.client.loop_thread import CLOSED
from pipeline.client.outputs import Output, Prompt, generate_frame
from pipeline.client.streams import OpenRequest
from pipeline.environment import forks

logger = logging.getLogger(__name__)


class Session:
    """The requests and queries of one client. Connects at first use, and again when an engine comes back.

    It belongs to the event loop of its first use; once that loop has stopped, another one can use it. In a forked child
    it starts afresh. The loop does not keep it alive. Dropping the last reference closes its connection.
    `timeout_s`: how long a request waits until an engine is reachable; None = for ever.
    """

    def __init__(self, endpoint: str, timeout_s: float | None, *, is_default: bool) -> None:
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._is_default = is_default  # this user's default endpoint
        self._closed = False
        self._query_ids = itertools.count(1)
        self._forget()
        forks.register(self)

    def _forget(self) -> None:
        """Return to the state before the first use."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connection: Connection | None = None
        self._open: dict[str, OpenRequest] = {}
        self._queries: dict[int, asyncio.Future[Any]] = {}
        self._pauses: set[asyncio.Future[None]] = set()
        self._outbox: dict[str | int, bytes] = {}  # messages that wait for an engine, by request or query

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
            self.abandon(request)  # if this task was cancelled; no effect on one that has ended
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
        """Send a request, or have it wait for an engine. `request_id` None = a new one."""
        connection = self._connect()
        request_id = new_id() if request_id is None else request_id
        frame = generate_frame(request_id, prompt, params, stream, cache_salt, scheduling)
        if request_id in self._open:
            raise InvalidRequest(f"request_id ({request_id!r}) is that of an open request")
        request = self._open[request_id] = OpenRequest(request_id, params.n)
        if connection.is_up:
            connection.send(frame)
        else:
            self._outbox[request_id] = frame
            if self._timeout_s is not None:
                self.bind().call_later(self._timeout_s, _weakly(self._give_up_unsent), request)
        return request

    def abandon(self, request: OpenRequest) -> None:
        """Cancel a request whose caller has left. Its id stays in use until the final answer, which is dropped."""
        if self._open.get(request.request_id) is not request or request.abandoned:
            return
        request.abandoned = True
        if self._outbox.pop(request.request_id, None) is not None:
            del self._open[request.request_id]
        elif self._connection is not None:
            self._connection.send(encode(Cancel(request_id=request.request_id)))

    def cancel(self, request_id: str) -> None:
        """End an open request of this client: it gets finish reason "cancelled". Other ids are ignored."""
        if not isinstance(request_id, str):
            raise InvalidRequest(f"request_id ({reprlib.repr(request_id)}) must be a string")
        self.bind()
        request = self._open.get(request_id)
        if request is None:
            return
        if self._outbox.pop(request_id, None) is not None:
            self._finish(request, FinalOutput("cancelled", 0, 0))
        else:
            self._connect().send(encode(Cancel(request_id=request_id)))

    async def ask(self, what: Literal["health", "stats", "clear_cache"], timeout_s: float | None) -> Any:
        """Send a query and return the engine's answer. `timeout_s` bounds all of it; None = no limit."""
        connection = self._connect()
        query_id = next(self._query_ids)
        frame = encode(ClearCache(query_id=query_id) if what == "clear_cache" else Query(query_id=query_id, what=what))
        answer = self._queries[query_id] = self.bind().create_future()
        if connection.is_up:
            connection.send(frame)
        else:
            self._outbox[query_id] = frame
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise self._nobody_there(timeout_s) from None
        finally:
            self._queries.pop(query_id, None)
            self._outbox.pop(query_id, None)

    async def pause(self, seconds: float) -> None:
        """Sleep. Raises EngineUnavailable if the client is closed, before or meanwhile."""
        if self._closed:
            raise EngineUnavailable(CLOSED)
        pause = self.bind().create_future()
        self._pauses.add(pause)
        try:
            async with asyncio.timeout(seconds):
                await pause
        except TimeoutError:
            pass
        finally:
            self._pauses.discard(pause)
        if self._closed:
            raise EngineUnavailable(CLOSED)

    def bind(self) -> asyncio.AbstractEventLoop:
        """The running loop, to which the client belongs from now on."""
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
        """Cancel and fail everything that is open, and disconnect. Called on any running loop."""
        self._closed = True
        loop = self._loop
        if loop is None or loop is asyncio.get_running_loop() or not loop.is_running():
            self._close()
        else:
            with contextlib.suppress(RuntimeError):  # the loop has just ended, and everything open on it too
                loop.call_soon_threadsafe(self._close)

    def forget_parent(self) -> None:
        """In a forked child: leave the parent's connection and requests alone, and start afresh."""
        forks.keep_for_ever(self._connection, self._open, self._queries, self._pauses)
        self._forget()

    def _give_up_unsent(self, request: OpenRequest) -> None:
        if self._open.get(request.request_id) is request and self._outbox.pop(request.request_id, None) is not None:
            del self._open[request.request_id]
            request.fail(self._nobody_there())

    def _finish(self, request: OpenRequest, final: FinalOutput, sample: int = 0) -> None:
        """A sample has ended, and the whole request if `final` says so."""
        if final.num_open == 0:
            del self._open[request.request_id]
        request.end_sample(sample, final)

    # What comes from the engine

    def _take_frames(self, frames: list[bytes]) -> None:
        num_outputs = 0
        for frame in frames:
            try:
                message: GatewayToClient = decode(frame, GatewayToClient)
            except ProtocolError as error:
                self._fail_all(ProtocolError(f"the engine at {self._endpoint} sent an unreadable message: {error}"))
                continue
            match message:
                case Outputs():
                    num_outputs += 1
                    self._take_outputs(message)
                case Refused():
                    self._take_refusal(message)
                case Alive():
                    pass  # the gateway asks the socket, not us
                case _:
                    query = self._queries.pop(message.query_id, None)
                    if query is not None and not query.done():
                        query.set_result(message)
        if num_outputs and self._connection is not None:
            # Credit goes back at once: what a slow reader leaves unread coalesces into one Output per request.
            self._connection.send(encode(Delivered(count=num_outputs)))

    def _take_outputs(self, outputs: Outputs) -> None:
        num_token_ids = memoryview(outputs.num_token_ids).cast("i").tolist()
        token_ids = memoryview(outputs.token_ids).cast("i").tolist()
        samples = memoryview(outputs.samples or bytes(len(outputs.num_token_ids))).cast("i").tolist()
        find = self._open.get
        start = 0
        for request_id, sample, text, num in zip(
            outputs.request_ids, samples, outputs.texts, num_token_ids, strict=True
        ):
            request = find(request_id)
            if request is not None and not request.abandoned:
                request.add(sample, text, token_ids[start : start + num])
            start += num
        for index, logprobs in outputs.logprobs:
            request = find(outputs.request_ids[index])
            if request is not None and not request.abandoned:
                request.samples[samples[index]].logprobs.append(logprobs)
        for index, final in outputs.finals:
            request = find(outputs.request_ids[index])
            if request is not None:
                self._finish(request, final, samples[index])

    def _take_refusal(self, refused: Refused) -> None:
        request = self._open.pop(refused.request_id, None)
        if request is None:
            logger.warning("the engine refused a message: %s", refused.error_message)
        else:
            request.fail(error_from_code(refused.error_code, refused.error_message, refused.retry_after_s))

    # Connection

    def _leave_loop(self) -> None:
        """Give up the present loop. Raises InvalidRequest if it is running, or has requests that can still end."""
        loop = self._loop
        if loop is None:
            return
        is_used = any(not request.abandoned for request in self._open.values()) or bool(self._queries)
        if loop.is_running() or (is_used and not loop.is_closed()):
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
                on_frames=_weakly(self._take_frames),
                on_up=_weakly(self._flush_outbox),
                on_down=_weakly(self._lose_engine),
            )
            self._finalizer = weakref.finalize(self, self._connection.drop)
            self._finalizer.atexit = False  # at exit the process ends anyway
        return self._connection

    def _disconnect(self, *, flush: bool) -> None:
        if self._connection is not None:
            self._finalizer.detach()
            self._connection.close(flush=flush)

    def _close(self) -> None:
        if self._connection is not None:
            for request_id in self._open.keys() - self._outbox.keys():
                self._connection.send(encode(Cancel(request_id=request_id)))
        self._fail_all(EngineUnavailable(CLOSED))
        for pause in self._pauses:
            _wake(pause)
        self._disconnect(flush=True)
        self._connection = None

    def _flush_outbox(self) -> None:
        for frame in self._outbox.values():
            self._connect().send(frame)
        self._outbox.clear()

    def _lose_engine(self) -> None:
        self._fail_all(EngineUnavailable(f"the engine at {self._endpoint} is gone"))

    def _fail_all(self, error: RingfeedError) -> None:
        requests, queries = list(self._open.values()), list(self._queries.values())
        self._open.clear()
        self._queries.clear()
        self._outbox.clear()
        for request in requests:
            request.fail(type(error)(*error.args))  # one for each: threads raise them at the same time
        for query in queries:
            if not query.done() and not query.get_loop().is_closed():
                query.set_exception(type(error)(*error.args))

    def _nobody_there(self, timeout_s: float | None = None) -> EngineUnavailable:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        within = "" if timeout_s is None else f" within {timeout_s:g} s"
        text = f"no engine answers at {self._endpoint}{within}: is it started, and is this its endpoint?"
        return EngineUnavailable(f"{text} {where_else(self._endpoint)}" if self._is_default else text)


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """The method as a callback that does not keep its object alive, and does nothing once that is gone."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: object) -> None:
        if (found := reference()) is not None:
            found(*arguments)

    return call


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done() and not sleeper.get_loop().is_closed():
        sleeper.set_result(None)


def new_id() -> str:
    return uuid.uuid4().hex
