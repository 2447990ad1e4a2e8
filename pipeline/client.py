"""The asyncio client: asks an engine for completions, whole, streamed, or by the batch.

Talks to the gateway alone (`ipc/messages.py`: client -> gateway, gateway -> client), over `pipeline/connection.py`.
`pipeline/sync_client.py` is the same for callers without an event loop. Loads neither torch nor transformers.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import reprlib
import time
import uuid
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any, Final, Literal, Self, Unpack, overload

from ipc.codec import decode, encode
from ipc.errors import EngineUnavailable, InvalidRequest, ProtocolError, QueueFull, RingfeedError, error_from_code
from ipc.messages import (
    PROTOCOL_VERSION,
    Alive,
    Cancel,
    ClearCache,
    Delivered,
    GatewayToClient,
    Health,
    Outputs,
    Query,
    Refused,
    Stats,
)
from ipc.messages import Final as FinalAnswer
from ipc.sampling import SamplingParams
from ipc.scheduling import SchedulingParams
from pipeline.connection import Connection
from pipeline.endpoint import default_endpoint
from pipeline.outputs import Output, Prompt, SchedulingOptions, generate_frame
from pipeline.progress import progress_bar
from pipeline.streams import OpenRequest, OutputStream

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S: Final = 10.0
DEFAULT_PARAMS: Final = SamplingParams()
_POLL_HEALTH_S: Final = 0.05
_QUEUE_FULL_PAUSE_S: Final = 0.1  # before the one request left of a batch tries a full queue again


class AsyncClient:
    """A client of one engine, for one event loop. Connects at first use, and again when an engine comes back.

    Args:
        endpoint: the engine's; None = this user's default one.
        timeout_s: how long a request or query waits for an engine to be there, before EngineUnavailable.

    Errors of a request: InvalidRequest (mend it), QueueFull (try later), EngineUnavailable (starting, draining, gone),
    RequestFailed. Close it with `close()` or `async with`: what is open then is cancelled.
    """

    def __init__(self, endpoint: str | None = None, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.endpoint = endpoint or default_endpoint()
        self._timeout_s = timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connection: Connection | None = None
        self._closed = False
        self._open: dict[str, OpenRequest] = {}
        self._queries: dict[int, asyncio.Future[Any]] = {}
        self._query_ids = itertools.count(1)
        self._outbox: dict[str | int, bytes] = {}  # by request or query: what waits for an engine

    @overload
    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams = ...,
        *,
        stream: Literal[False] = False,
        request_id: str | None = None,
        cache_salt: str = "",
        **scheduling: Unpack[SchedulingOptions],
    ) -> Coroutine[Any, Any, Output]: ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams = ...,
        *,
        stream: Literal[True],
        request_id: str | None = None,
        cache_salt: str = "",
        **scheduling: Unpack[SchedulingOptions],
    ) -> OutputStream: ...

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams = DEFAULT_PARAMS,
        *,
        stream: bool = False,
        request_id: str | None = None,
        cache_salt: str = "",
        **scheduling: Unpack[SchedulingOptions],
    ) -> Coroutine[Any, Any, Output] | OutputStream:
        """Complete a text, a chat (list of messages) or a list of token ids.

        `await` it for one Output with everything. With `stream=True` the request is sent at once and the result is an
        async iterator of Outputs, each with what is new (of one sample, if `params.n` asks for several); breaking out
        of it cancels the request. `request_id`, for `cancel()`, must not be that of an open request; None = a new one.
        Only requests of the same `cache_salt` share cached prompts: give each tenant its own, and none can tell from
        the time taken what another has asked. `priority`, `tenant`, `deadline_s` and `queue_timeout_s` say when it has
        its turn and how long it may take (see `SchedulingParams`): one that runs out of time ends with finish reason
        "deadline" or "queue_timeout".
        """
        options = SchedulingParams(**scheduling)
        if stream:
            request = self._start(prompt, params, True, request_id, cache_salt, options)
            return OutputStream(request, self._abandon, self._running_loop())
        return self._generate_whole(prompt, params, request_id, cache_salt, options)

    async def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = DEFAULT_PARAMS,
        *,
        progress: bool = False,
        **scheduling: Unpack[SchedulingOptions],
    ) -> list[Output]:
        """Complete many prompts, with one SamplingParams or one for each. Returns their Outputs in input order.

        No more are open at a time than the engine takes. One that fails has finish reason "error" and the text of its
        error; the others are not affected. `progress` shows a bar on the terminal. Raises EngineUnavailable if there is
        no engine to begin with. Scheduling arguments, as of `generate`, apply to each prompt.
        """
        options = SchedulingParams(**scheduling)
        if isinstance(prompts, str):  # a sequence of prompts of one letter
            raise InvalidRequest(f"prompts ({reprlib.repr(prompts)}) must be a list of prompts; generate takes one")
        prompts = list(prompts)
        params_of = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(params_of) != len(prompts):
            raise InvalidRequest(f"{len(params_of)} params for {len(prompts)} prompts: give one, or one for each")
        if not prompts:
            return []
        request_ids = [_new_id() for _ in prompts]
        outputs: dict[int, Output] = {}
        waiting = deque(range(len(prompts)))
        num_askers = min(len(prompts), max(1, (await self.health()).max_open_requests))

        def settle(index: int, output: Output | RingfeedError) -> None:
            outputs[index] = output if isinstance(output, Output) else Output.failed(request_ids[index], str(output))
            advance()

        async def ask() -> None:
            """Ask for one prompt after the other. If the engine's queue is full, one asker fewer is enough."""
            nonlocal num_askers
            while waiting:
                index = waiting.popleft()
                try:
                    output = await self._generate_whole(
                        prompts[index], params_of[index], request_ids[index], "", options
                    )
                    settle(index, output)
                except QueueFull:
                    waiting.appendleft(index)
                    if num_askers > 1:
                        num_askers -= 1
                        return
                    await asyncio.sleep(_QUEUE_FULL_PAUSE_S)
                except RingfeedError as error:
                    settle(index, error)
                    if isinstance(error, EngineUnavailable):  # for the rest too: they need not find out one by one
                        while waiting:
                            settle(waiting.popleft(), error)

        with progress_bar("generating", len(prompts), shown=progress) as advance:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(num_askers):
                    tasks.create_task(ask())
        return [outputs[index] for index in range(len(prompts))]

    async def cancel(self, request_id: str) -> None:
        """End an open request of this client: it gets finish reason "cancelled". Other ids are ignored."""
        request = self._open.get(request_id)
        if request is None:
            return
        if self._outbox.pop(request_id, None) is not None:
            self._finish(request, FinalAnswer("cancelled", 0, 0))
        else:
            self._connect().send(encode(Cancel(request_id=request_id)))

    async def health(self) -> Health:
        """The engine's state: "starting", "ready", "draining" or "failed", and its limits."""
        health: Health = await self._ask("health")
        if health.protocol_version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the engine at {self.endpoint} speaks protocol {health.protocol_version}, this client "
                f"{PROTOCOL_VERSION}: use the same ringfeed on both sides"
            )
        return health

    async def stats(self) -> dict[str, dict[str, float]]:
        """Counters and gauges by worker: {"scheduler": {"num_steps": 12, ...}, "tokenizer.0": {...}, ...}."""
        stats: Stats = await self._ask("stats")
        return stats.roles

    async def clear_cache(self) -> None:
        """Forget all cached prompts. Requests that are sent after this has returned find nothing from before."""
        await self._ask("clear_cache")

    async def wait_ready(self, timeout_s: float = 60.0) -> Health:
        """Wait until the engine takes requests. Raises EngineUnavailable if it does not in time, or never will."""
        deadline = time.monotonic() + timeout_s
        while True:
            health = await self._ask("health", timeout_s=max(0.0, deadline - time.monotonic()))
            if health.state == "ready":
                return await self.health()
            if health.state == "failed" or time.monotonic() + _POLL_HEALTH_S >= deadline:
                raise EngineUnavailable(f"the engine at {self.endpoint} is {health.state}: {health.detail}")
            await asyncio.sleep(_POLL_HEALTH_S)

    async def close(self) -> None:
        """Cancel what is open and disconnect. A closed client cannot be used again."""
        if self._closed:
            return
        self._closed = True
        if self._connection is not None:
            for request_id in self._open.keys() - self._outbox.keys():
                self._connection.send(encode(Cancel(request_id=request_id)))
            self._fail_all(EngineUnavailable("this client was closed"))
            self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # Requests

    async def _generate_whole(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None,
        cache_salt: str,
        scheduling: SchedulingParams,
    ) -> Output:
        request = self._start(prompt, params, False, request_id, cache_salt, scheduling)
        try:
            while not request.ended:
                await request.news(self._running_loop())
        finally:
            self._abandon(request)  # if this task was cancelled; no effect on one that has ended
        if request.error is not None:
            raise request.take_error()
        return request.take_whole()

    def _start(
        self,
        prompt: Prompt,
        params: SamplingParams,
        stream: bool,
        request_id: str | None,
        cache_salt: str,
        scheduling: SchedulingParams,
    ) -> OpenRequest:
        connection = self._connect()
        request_id = _new_id() if request_id is None else request_id
        frame = generate_frame(request_id, prompt, params, stream, cache_salt, scheduling)
        if request_id in self._open:
            raise InvalidRequest(f"request_id ({request_id!r}) is that of an open request")
        request = self._open[request_id] = OpenRequest(request_id, params.n)
        if connection.is_up:
            connection.send(frame)
        else:
            self._outbox[request_id] = frame
            self._running_loop().call_later(self._timeout_s, self._give_up_unsent, request)
        return request

    def _give_up_unsent(self, request: OpenRequest) -> None:
        if self._open.get(request.request_id) is request and self._outbox.pop(request.request_id, None) is not None:
            del self._open[request.request_id]
            request.fail(self._nobody_there(self._timeout_s))

    def _abandon(self, request: OpenRequest) -> None:
        """Nobody wants the rest. The id stays taken until the engine's final answer, which is then dropped."""
        if self._open.get(request.request_id) is not request or request.abandoned:
            return
        request.abandoned = True
        if self._outbox.pop(request.request_id, None) is not None:
            del self._open[request.request_id]
        elif self._connection is not None:
            self._connection.send(encode(Cancel(request_id=request.request_id)))

    def _finish(self, request: OpenRequest, final: FinalAnswer, sample: int = 0) -> None:
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
                self._fail_all(ProtocolError(f"the engine at {self.endpoint} sent an unreadable message: {error}"))
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
            # Taken in is delivered: what a slow reader leaves unread coalesces into one Output per request.
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

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop

    def _connect(self) -> Connection:
        if self._closed:
            raise EngineUnavailable("this client was closed")
        if self._connection is None:
            self._connection = Connection(
                self.endpoint,
                self._running_loop(),
                on_frames=self._take_frames,
                on_up=self._flush_outbox,
                on_down=lambda: self._fail_all(EngineUnavailable(f"the engine at {self.endpoint} is gone")),
            )
        return self._connection

    def _flush_outbox(self) -> None:
        for frame in self._outbox.values():
            self._connect().send(frame)
        self._outbox.clear()

    def _fail_all(self, error: RingfeedError) -> None:
        requests, queries = list(self._open.values()), list(self._queries.values())
        self._open.clear()
        self._queries.clear()
        self._outbox.clear()
        for request in requests:
            request.fail(error)
        for query in queries:
            if not query.done():
                query.set_exception(error)

    async def _ask(self, what: Literal["health", "stats", "clear_cache"], timeout_s: float | None = None) -> Any:
        connection = self._connect()
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        query_id = next(self._query_ids)
        frame = encode(ClearCache(query_id=query_id) if what == "clear_cache" else Query(query_id=query_id, what=what))
        answer = self._queries[query_id] = self._running_loop().create_future()
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

    def _nobody_there(self, timeout_s: float) -> EngineUnavailable:
        return EngineUnavailable(
            f"no engine answers at {self.endpoint} within {timeout_s:g} s: is it started, and is this its endpoint?"
        )


def _new_id() -> str:
    return uuid.uuid4().hex
