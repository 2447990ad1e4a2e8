"""The client for plain code: an `AsyncClient` on an event loop in a background thread, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, Literal, Self, TypeVar, Unpack, overload

from ipc.errors import EngineUnavailable
from ipc.messages import Health
from ipc.sampling import SamplingParams
from pipeline.client import DEFAULT_PARAMS, DEFAULT_TIMEOUT_S, AsyncClient
from pipeline.outputs import Output, Prompt, SchedulingOptions
from pipeline.streams import OutputStream

T = TypeVar("T")


class Client:
    """A client of one engine, for any number of threads. Arguments, methods and errors as of AsyncClient."""

    def __init__(self, endpoint: str | None = None, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._client = AsyncClient(endpoint, timeout_s=timeout_s)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ringfeed-client", daemon=True)
        self._thread.start()

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
            return Stream(self, self.call(self._open_stream(prompt, params, request_id, cache_salt, scheduling)))
        return self.call(
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
        return self.call(self._client.generate_batch(prompts, params, progress=progress, **scheduling))

    def cancel(self, request_id: str) -> None:
        self.call(self._client.cancel(request_id))

    def health(self) -> Health:
        return self.call(self._client.health())

    def stats(self) -> dict[str, dict[str, float]]:
        return self.call(self._client.stats())

    def clear_cache(self) -> None:
        """Forget all cached prompts; see AsyncClient.clear_cache."""
        self.call(self._client.clear_cache())

    def wait_ready(self, timeout_s: float = 60.0) -> Health:
        return self.call(self._client.wait_ready(timeout_s))

    def close(self) -> None:
        """Cancel what is open and disconnect."""
        if not self._loop.is_closed():
            self.call(self._client.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the client's loop and wait for it. An interrupt here cancels it there."""
        if self._loop.is_closed():
            coroutine.close()
            raise EngineUnavailable("this client was closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            del future  # it holds the error, which holds this frame

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
    """An iterator over the Outputs of one request. Dropping it, `close()` or leaving its `with` block cancels it."""

    def __init__(self, client: Client, stream: OutputStream) -> None:
        self._client = client
        self._stream = stream

    @property
    def request_id(self) -> str:
        return self._stream.request_id

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Output:
        output = self._client.call(self._stream.next())
        if output is None:
            raise StopIteration
        return output

    def close(self) -> None:
        with contextlib.suppress(EngineUnavailable):  # the client was closed, and the request with it
            self._client.call(self._stream.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
