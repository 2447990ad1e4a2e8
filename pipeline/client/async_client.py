"""The asyncio client: asks an engine for completions, whole, streamed, or by the batch.

`session.py` holds the open requests and talks to the engine. `sync_client.py` is the same client for callers without
an event loop. Loads neither torch nor transformers.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Literal, Self, Unpack, overload

from ipc.errors import EngineUnavailable, ProtocolError
from ipc.messages import (
    PROTOCOL_VERSION,
    Health,
    Stats,
)
from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import SchedulingParams
from pipeline.client.batch import Batch
from pipeline.client.endpoint import check_client_endpoint, default_endpoint
from pipeline.client.inputs import Prompt, SchedulingOptions, batch_of, checked_timeout
from pipeline.client.outputs import Output
from pipeline.client.session import Session, new_id
from pipeline.client.streams import OutputStream
from pipeline.terminal.progress_bar import progress_bar

DEFAULT_TIMEOUT_S: Final = 10.0
DEFAULT_PARAMS: Final = SamplingParams()
_POLL_HEALTH_S: Final = 0.05


class AsyncClient:
    """A client of one engine, for one event loop. Connects at first use, and again when an engine comes back.

    Args:
        endpoint: the engine's; None = this user's default one.
        timeout_s: how long a request waits for an engine, and a query for its answer, before EngineUnavailable;
            None = for ever.

    Errors of a request: InvalidRequest (mend it), QueueFull (try later), EngineUnavailable (starting, draining, gone),
    RequestFailed. `close()`, leaving its `async with` block, or dropping the last reference cancels open requests. A
    client can be used on another event loop once its first one has stopped. In a forked child it opens a connection of
    its own.
    """

    def __init__(self, endpoint: str | None = None, *, timeout_s: float | None = DEFAULT_TIMEOUT_S) -> None:
        self.endpoint = default_endpoint() if endpoint is None else check_client_endpoint(endpoint)
        self._timeout_s = checked_timeout(timeout_s)
        self._session = Session(self.endpoint, self._timeout_s, is_default=endpoint is None)

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
            request = self._session.start(prompt, params, True, request_id, cache_salt, options)
            return OutputStream(request, self._session.abandon, self._session.bind())
        return self._session.whole(prompt, params, request_id, cache_salt, options)

    async def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = DEFAULT_PARAMS,
        *,
        progress: bool = False,
        **scheduling: Unpack[SchedulingOptions],
    ) -> list[Output]:
        """Complete many prompts, with one SamplingParams or one for each. Returns their Outputs in input order.

        At most as many are open at a time as the engine accepts. While its queue is full, the rest waits in the client,
        for as long as the engine says. A request that fails has finish reason "error" and the text of its error; the
        others are not affected. `progress` shows a bar on the terminal. Raises EngineUnavailable if no engine is
        reachable at the start. Scheduling arguments, as of `generate`, apply to each prompt.
        """
        options = SchedulingParams(**scheduling)
        prompts, params_of = batch_of(prompts, params)
        if not prompts:
            return []
        request_ids = [new_id() for _ in prompts]
        num_samples = max(each.n if isinstance(each, SamplingParams) else 1 for each in params_of)
        window = (await self.health()).max_open_requests // num_samples
        with progress_bar("generating", len(prompts), shown=progress) as advance:
            results = await Batch(
                lambda i: self._session.whole(prompts[i], params_of[i], request_ids[i], "", options),
                len(prompts), window, pause=self._session.pause, advance=advance,
            ).run()  # fmt: skip
        return [
            result if isinstance(result, Output) else Output.failed(request_id, str(result))
            for request_id, result in zip(request_ids, results, strict=True)
        ]

    async def cancel(self, request_id: str) -> None:
        """End an open request of this client: it gets finish reason "cancelled". Other ids are ignored."""
        self._session.cancel(request_id)

    async def health(self) -> Health:
        """The engine's state: "starting", "ready", "draining" or "failed", and its limits."""
        health: Health = await self._session.ask("health", self._timeout_s)
        if health.protocol_version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the engine at {self.endpoint} speaks protocol {health.protocol_version}, this client "
                f"{PROTOCOL_VERSION}: use the same ringfeed on both sides"
            )
        return health

    async def stats(self) -> dict[str, dict[str, float]]:
        """Counters and gauges by worker: {"scheduler": {"num_steps": 12, ...}, "tokenizer.0": {...}, ...}."""
        stats: Stats = await self._session.ask("stats", self._timeout_s)
        return stats.roles

    async def clear_cache(self) -> None:
        """Forget all cached prompts. Requests that are sent after this has returned find nothing from before."""
        await self._session.ask("clear_cache", self._timeout_s)

    async def wait_ready(self, timeout_s: float | None = 60.0) -> Health:
        """Wait until the engine takes requests. Raises EngineUnavailable if it does not in time, or never will."""
        timeout_s = checked_timeout(timeout_s)
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            health = await self._session.ask("health", None if left_s == math.inf else left_s)
            if health.state == "ready":
                return await self.health()
            if health.state == "failed" or time.monotonic() + _POLL_HEALTH_S >= deadline:
                raise EngineUnavailable(f"the engine at {self.endpoint} is {health.state}: {health.detail}")
            await self._session.pause(_POLL_HEALTH_S)

    async def close(self) -> None:
        """Cancel open requests, whose callers get EngineUnavailable, and disconnect. A second call does nothing."""
        self._session.close()

    def __reduce__(self) -> tuple[Callable[[], Self], tuple[()]]:
        """A pickled copy, in whichever process, is a new client of the same engine."""
        return functools.partial(type(self), self.endpoint, timeout_s=self._timeout_s), ()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
