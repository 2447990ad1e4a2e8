"""The asyncio client: asks an engine for completions, whole, streamed, or by the batch.

`session.py` holds the open requests and talks to the engine. `sync_client.py` is the same client for callers without
an event loop. Loads neither torch nor transformers.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Literal, Self, Unpack, overload

from ipc.errors import EngineUnavailable, ProtocolError
from ipc.messages import PROTOCOL_VERSION, DetokenizedText, KeptValue, Stats
from ipc.messages import Health as HealthMessage
from ipc.sampling_params import SamplingParams
from pipeline.client.batch_requests import run_batch
from pipeline.client.endpoint import check_client_endpoint, default_endpoint
from pipeline.client.inputs import (
    Prompt,
    SchedulingOptions,
    batch_of,
    checked_timeout,
    detokenize_frame,
    keep_frame,
    recall_frame,
    scheduling_params,
    tokenize_frame,
)
from pipeline.client.keys import ClientKeys
from pipeline.client.outputs import EngineStats, Health, Output, TokenizedPrompt, tokenized_prompt
from pipeline.client.session import Session, new_id
from pipeline.client.streams import OutputStream

DEFAULT_TIMEOUT_S: Final = 10.0
DEFAULT_PARAMS: Final = SamplingParams()
_POLL_HEALTH_S: Final = 0.05


class AsyncClient:
    """A client of one engine, for one event loop. It connects at first use, and again when an engine comes back.

    Args:
        endpoint: where the engine listens: "ipc:///folder/name.sock" or "tcp://host:port"; None (default) = this
            user's default endpoint.
        timeout_s: seconds that a request waits until an engine is reachable, and that a query waits for its answer
            (default 10); then EngineUnavailable is raised. None = no limit.
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
        key_file: str | os.PathLike[str] | None = None,
    ) -> None:
        self.endpoint = default_endpoint() if endpoint is None else check_client_endpoint(endpoint)
        self._timeout_s = checked_timeout(timeout_s)
        keys = ClientKeys(self.endpoint, key_file)
        self.key_file = keys.path
        self._session = Session(self.endpoint, keys, self._timeout_s, is_default=endpoint is None)

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

        Raises InvalidRequest if `prompts` is a single prompt, and EngineUnavailable if no engine is reachable at the
        start.
        """
        options = scheduling_params(scheduling)
        prompts, params_of = batch_of(prompts, params)
        if not prompts:
            return []
        window = (await self.health()).max_open_requests
        return await run_batch(self._session, prompts, params_of, options, window, progress=progress)

    async def cancel(self, request_id: str) -> None:
        """End an open request of this client with finish reason "cancelled". Unknown ids are ignored."""
        self._session.cancel(request_id)

    async def health(self) -> Health:
        """The engine's state and its limits.

        Raises EngineUnavailable if no engine answers within `timeout_s`, and ProtocolError if the engine speaks
        another version of the protocol.
        """
        health = await self._ask_health(self._timeout_s)
        if health.protocol_version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the engine at {self.endpoint} speaks protocol {health.protocol_version}, this client "
                f"{PROTOCOL_VERSION}: use the same ringfeed on both sides"
            )
        return health

    async def stats(self) -> dict[str, dict[str, float]]:
        """Counters and gauges of each process: {"scheduler": {"num_steps": 12, ...}, "tokenizer.0": {...}, ...}.

        Counters grow from the engine's start; names that end in `_ns` are nanoseconds. Raises EngineUnavailable if no
        engine answers within `timeout_s`.
        """
        stats: Stats = await self._session.query("stats", self._timeout_s)
        return stats.roles

    async def stats_with_arrays(self, names: Sequence[str]) -> EngineStats:
        """`stats()`, and those arrays of the processes' statistics that have one of these names.

        Raises EngineUnavailable if no engine answers within `timeout_s`.
        """
        stats: Stats = await self._session.query("stats", self._timeout_s, names)
        return EngineStats.of(stats)

    async def clear_cache(self) -> None:
        """Empty the prefix cache. Requests sent after this returns reuse no earlier prompt."""
        await self._session.query("clear_cache", self._timeout_s)

    async def tokenize(
        self, prompt: Prompt, *, add_special_tokens: bool = True, **scheduling: Unpack[SchedulingOptions]
    ) -> TokenizedPrompt:
        """The tokens of a prompt, as `generate` would give them to the model. Nothing is generated.

        A prompt may be empty, or longer than the model's longest sequence. The query waits in the same queue as
        requests.

        Args:
            prompt: a prompt as `generate` takes it. A chat is rendered with the model's template.
            add_special_tokens: whether the tokenizer adds its special tokens to a text, such as one that begins it. No
                effect on a chat, whose template writes them, and on token ids.
            scheduling: as of `generate`.

        Raises the errors of `generate`, and QueueFull if the query waits longer than its queue time-out.
        """
        request_id = new_id()
        frame = tokenize_frame(request_id, prompt, add_special_tokens, scheduling_params(scheduling))
        return tokenized_prompt(await self._session.ask(request_id, frame, self._timeout_s, is_queued=True))

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = False, **scheduling: Unpack[SchedulingOptions]
    ) -> str:
        """The text of tokens, as the model's tokenizer decodes them.

        Args:
            token_ids: a list or a 1-dimensional integer array; no more ids than the model's longest sequence has.
            skip_special_tokens: whether special tokens have no text; otherwise their text is their name.
            scheduling: as of `generate`.

        Raises InvalidRequest, which names the id if the model does not have it, and the other errors of `tokenize`.
        """
        request_id = new_id()
        frame = detokenize_frame(request_id, token_ids, skip_special_tokens, scheduling_params(scheduling))
        answer: DetokenizedText = await self._session.ask(request_id, frame, self._timeout_s, is_queued=True)
        return answer.text

    async def keep(self, key: str, value: bytes) -> None:
        """Keep a value in the engine, where any client can `recall` it. It replaces an earlier value of this key.

        The engine forgets the values that were not used for longest, to stay within `frontend.max_kept_bytes`; it
        forgets all of them when it ends. Raises InvalidRequest if key (1 to 256 characters) or value (less than 16 MiB,
        and less than `frontend.max_kept_bytes`) are too large, or if the engine keeps no values.
        """
        request_id = new_id()
        await self._session.ask(request_id, keep_frame(request_id, key, value), self._timeout_s)

    async def recall(self, key: str) -> bytes | None:
        """The value that a client has kept under this key; None if there is none, or the engine has forgotten it.

        Raises InvalidRequest if the engine keeps no values, and QueueFull if clients leave too many answers unread.
        """
        answer = await self._recall(key, forget=False)
        return answer.value if answer.found else None

    async def forget(self, key: str) -> bool:
        """Forget a kept value. Returns whether there was one. Raises InvalidRequest if the engine keeps no values."""
        return (await self._recall(key, forget=True)).found

    async def _recall(self, key: str, *, forget: bool) -> KeptValue:
        request_id = new_id()
        frame = recall_frame(request_id, key, forget=forget)
        answer: KeptValue = await self._session.ask(request_id, frame, self._timeout_s)
        return answer

    async def wait_ready(self, timeout_s: float | None = 60.0) -> Health:
        """Wait until the engine accepts requests.

        Raises EngineUnavailable if it is not ready after `timeout_s` seconds (None = no limit), or has failed.
        """
        timeout_s = checked_timeout(timeout_s)
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            health = await self._ask_health(None if left_s == math.inf else left_s)
            if health.state == "ready":
                return await self.health()
            if health.state == "failed" or time.monotonic() + _POLL_HEALTH_S >= deadline:
                raise EngineUnavailable(f"the engine at {self.endpoint} is {health.state}: {health.detail}")
            await self._session.pause(_POLL_HEALTH_S)

    async def close(self) -> None:
        """Cancel open requests and disconnect. Their callers get EngineUnavailable. A second call does nothing."""
        self._session.close()

    async def _ask_health(self, timeout_s: float | None) -> Health:
        answer: HealthMessage = await self._session.query("health", timeout_s)
        return Health(**{name: getattr(answer, name) for name in Health.__struct_fields__})

    def __reduce__(self) -> tuple[Callable[[], Self], tuple[()]]:
        """A pickled copy, in this or another process, is a new client of the same engine."""
        return functools.partial(type(self), self.endpoint, timeout_s=self._timeout_s, key_file=self.key_file), ()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
