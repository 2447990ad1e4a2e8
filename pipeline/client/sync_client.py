"""The client for plain code: an `AsyncClient` on an event loop in a background thread, and nothing else."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Literal, Self, Unpack, overload

from ipc.messages import Health
from ipc.sampling_params import SamplingParams
from pipeline.client.async_client import DEFAULT_PARAMS, DEFAULT_TIMEOUT_S, AsyncClient
from pipeline.client.inputs import Prompt, SchedulingOptions
from pipeline.client.loop_thread import LoopThread
from pipeline.client.outputs import Output
from pipeline.client.streams import OutputStream


class Client:
    """A client of one engine, for any number of threads. Arguments, methods and errors as of AsyncClient.

    The first call starts a thread and connects. `close()` ends both, and so does dropping the last reference to the
    client and its streams. In a forked child the client starts a thread and a connection of its own.
    """

    def __init__(self, endpoint: str | None = None, *, timeout_s: float | None = DEFAULT_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._client = AsyncClient(endpoint, timeout_s=timeout_s)
        self._thread = LoopThread(at_end=self._client.close)
        weakref.finalize(self, self._thread.close_soon).atexit = False  # at exit the process ends anyway

    @property
    def endpoint(self) -> str:
        return self._client.endpoint

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
    ) -> Output: ...

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
    ) -> Stream: ...

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams = DEFAULT_PARAMS,
        *,
        stream: bool = False,
        request_id: str | None = None,
        cache_salt: str = "",
        **scheduling: Unpack[SchedulingOptions],
    ) -> Output | Stream:
        """Complete a text, a chat (list of messages) or a list of token ids.

        Returns one Output with everything, or with `stream=True` an iterator of Outputs, each with what is new;
        breaking out of it cancels the request. See AsyncClient.generate for the other arguments.
        """
        if stream:
            opening = self._open_stream(prompt, params, request_id, cache_salt, scheduling)
            return Stream(self, self._thread, self._thread.run(opening))
        return self._thread.run(
            self._client.generate(prompt, params, request_id=request_id, cache_salt=cache_salt, **scheduling)
        )

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = DEFAULT_PARAMS,
        *,
        progress: bool = False,
        **scheduling: Unpack[SchedulingOptions],
    ) -> list[Output]:
        """Complete many prompts; Outputs come in input order. See AsyncClient.generate_batch."""
        return self._thread.run(self._client.generate_batch(prompts, params, progress=progress, **scheduling))

    def cancel(self, request_id: str) -> None:
        self._thread.run(self._client.cancel(request_id))

    def health(self) -> Health:
        return self._thread.run(self._client.health())

    def stats(self) -> dict[str, dict[str, float]]:
        return self._thread.run(self._client.stats())

    def clear_cache(self) -> None:
        """Forget all cached prompts; see AsyncClient.clear_cache."""
        self._thread.run(self._client.clear_cache())

    def wait_ready(self, timeout_s: float | None = 60.0) -> Health:
        return self._thread.run(self._client.wait_ready(timeout_s))

    def keep_alive(self, owner: object) -> None:
        """Hold a reference to what this client depends on, as long as the client lives."""
        self._kept_alive = owner

    def close(self) -> None:
        """Cancel open requests and disconnect. Threads that wait get EngineUnavailable. A second call does nothing."""
        self._thread.close()

    def __reduce__(self) -> tuple[Callable[[], Self], tuple[()]]:
        """A pickled copy, in whichever process, is a new client of the same engine."""
        return functools.partial(type(self), self.endpoint, timeout_s=self._timeout_s), ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _open_stream(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None,
        cache_salt: str,
        scheduling: SchedulingOptions,
    ) -> OutputStream:
        return self._client.generate(
            prompt, params, stream=True, request_id=request_id, cache_salt=cache_salt, **scheduling
        )


class Stream:
    """An iterator over the Outputs of one request. Dropping it, `close()` or leaving its `with` block cancels it.

    One thread reads at a time, in the process that opened it: another one gets InvalidRequest.
    """

    def __init__(self, client: Client, thread: LoopThread, stream: OutputStream) -> None:
        self._client = client  # lives as long as its streams
        self._thread = thread
        self._stream = stream

    @property
    def request_id(self) -> str:
        return self._stream.request_id

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Output:
        output = self._thread.run(self._stream.next())
        if output is None:
            raise StopIteration
        return output

    def close(self) -> None:
        self._stream.close_soon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
