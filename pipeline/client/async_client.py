"""The asyncio client: asks an engine for completions, whole, streamed, or by the batch.

`async_queries.py` has its other questions. `session.py` holds what is open and talks to the engine. `sync_client.py` is
the same client for callers without an event loop. Loads neither torch nor transformers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Literal, Self, Unpack, overload

from ipc.errors import RingfeedError
from ipc.sampling_params import SamplingParams
from pipeline.client.async_queries import AsyncQueries
from pipeline.client.batch import Batch
from pipeline.client.endpoint import check_client_endpoint, default_endpoint
from pipeline.client.inputs import Prompt, SchedulingOptions, batch_of, checked_timeout, new_id, scheduling_params
from pipeline.client.keys import ClientKeys
from pipeline.client.outputs import Output
from pipeline.client.session import Session
from pipeline.client.streams import OutputStream
from pipeline.terminal.progress_bar import progress_bar

DEFAULT_TIMEOUT_S: Final = 10.0
DEFAULT_RESUME_TIMEOUT_S: Final = 60.0
DEFAULT_PARAMS: Final = SamplingParams()


class AsyncClient(AsyncQueries):
    """A client of one engine, for one event loop. It connects at first use, and again when an engine comes back.

    Args:
        endpoint: where the engine listens: "ipc:///folder/name.sock" or "tcp://host:port"; None (default) = this
            user's default endpoint.
        timeout_s: seconds that a request waits until an engine is reachable, and that a query waits for its answer
            (default 10); then EngineUnavailable is raised. None = no limit.
        resume_timeout_s: seconds that an open request or query waits for an engine that continues it, after a process
            of its engine has died or the connection was lost (default 60); then Interrupted is raised. New text or
            tokens begin a new wait. 0 = it fails at once; None = no limit.
        key_file: this client's keys for an engine at a TCP address, made by `ringfeed keys`; None (default) = the file
            that the environment variable RINGFEED_KEY_FILE names, if any.

    Raises ConfigError for an endpoint of another form and for a key file that cannot be used. Requests raise
    InvalidRequest (change the request), QueueFull (try again later), EngineUnavailable (the engine starts, drains or is
    gone) or RequestFailed. All of them are RingfeedErrors. `close()`, leaving the `async with` block, or dropping the
    last reference cancels open requests. The client can be used on another event loop once its first loop has stopped.
    In a forked child it opens its own connection.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        resume_timeout_s: float | None = DEFAULT_RESUME_TIMEOUT_S,
        key_file: str | os.PathLike[str] | None = None,
    ) -> None:
        self._resume_timeout_s = checked_timeout(resume_timeout_s, "resume_timeout_s")
        timeout_s = checked_timeout(timeout_s)
        endpoint, is_default = (
            (default_endpoint(), True) if endpoint is None else (check_client_endpoint(endpoint), False)
        )
        keys = ClientKeys(endpoint, key_file)
        self.key_file = keys.path
        super().__init__(
            endpoint, timeout_s, Session(endpoint, keys, timeout_s, self._resume_timeout_s, is_default=is_default)
        )

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
        """Complete a text, a chat (list of messages, or Chat) or a list of token ids.

        `await` it for one Output with everything. With `stream=True` the request is sent at once, and the result is an
        OutputStream: `async for` gives Outputs with what is new. Breaking out of the loop cancels the request.

        Args:
            prompt: a string; a chat, as a list of {"role": ..., "content": ...} with any keys of OpenAI's API, or as a
                `Chat` with tools and options; or token ids, as a list or a 1-dimensional integer array.
            params: how tokens are sampled and when the text ends; default: greedy, up to the model's length.
            stream: whether to return a stream instead of one Output.
            request_id: a name for `cancel()`, of 1 to 256 characters; no open request may have it. None = a new one.
            cache_salt: only requests with the same salt share cached prompts. With a salt for each tenant, no tenant
                can tell from response times what another tenant has asked.
            scheduling: a SchedulingParams as `scheduling=...`, or its fields `priority`, `tenant`, `deadline_s` and
                `queue_timeout_s` one by one.

        Raises InvalidRequest, QueueFull, EngineUnavailable or RequestFailed (LogitsNotFinite if the model computed
        NaN, TokensExcluded if the parameters exclude every token). A stream raises them while it is read. A request
        that runs out of time does not raise: it ends with finish reason "deadline" or "queue_timeout".
        """
        options = scheduling_params(scheduling)
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
        """Complete many prompts and return their Outputs in input order.

        The client keeps at most as many requests open as the engine accepts. While the engine's queue is full, it
        waits as long as the engine says and tries again. A failed request has finish reason "error" and the text of
        its error; the other requests are not affected.

        Args:
            prompts: prompts as `generate` takes them.
            params: one SamplingParams for all prompts, or a list with one for each.
            progress: whether to show a progress bar on the terminal.
            scheduling: as of `generate`; applies to each prompt.

        Raises InvalidRequest for a single prompt, and EngineUnavailable if no engine is reachable at the start.
        """
        options = scheduling_params(scheduling)
        prompts, params_of = batch_of(prompts, params)
        if not prompts:
            return []
        request_ids = [new_id() for _ in prompts]
        num_samples = max(each.n if isinstance(each, SamplingParams) else 1 for each in params_of)
        window = min(len(prompts), (await self.health()).max_open_requests // num_samples)
        outputs: dict[int, Output] = {}

        def settle(i: int, result: Output | RingfeedError) -> None:
            outputs[i] = result if isinstance(result, Output) else Output.failed(request_ids[i], str(result))
            advance()

        with progress_bar("generating", len(prompts), shown=progress) as advance:
            await Batch(
                lambda i: self._session.whole(prompts[i], params_of[i], request_ids[i], "", options),
                range(len(prompts)), window, pause=self._session.pause, settle=settle,
            ).run()  # fmt: skip
        return [outputs[i] for i in range(len(prompts))]

    async def cancel(self, request_id: str) -> None:
        """End an open request of this client with finish reason "cancelled". Unknown ids are ignored."""
        self._session.cancel(request_id)

    async def close(self) -> None:
        """Cancel open requests and disconnect. Their callers get EngineUnavailable. A second call does nothing."""
        self._session.close()

    def ask_whether_ended(self, has_ended: Callable[[], bool]) -> None:
        """Fail interrupted requests once `has_ended()`: nobody starts the engine again. Call it before first use."""
        self._session.has_ended = has_ended

    def __reduce__(self) -> tuple[functools.partial[Self], tuple[()]]:
        """A pickled copy, in this or another process, is a new client of the same engine."""
        timeouts = {"timeout_s": self._timeout_s, "resume_timeout_s": self._resume_timeout_s}
        return functools.partial(type(self), self.endpoint, **timeouts, key_file=self.key_file), ()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
