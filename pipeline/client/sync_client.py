"""The client for plain code: an `AsyncClient` on an event loop in a background thread, and nothing else."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Sequence
from typing import Literal, Protocol, Self, Unpack, overload

from ipc.sampling_params import SamplingParams
from pipeline.client.async_client import DEFAULT_PARAMS, DEFAULT_RESUME_TIMEOUT_S, DEFAULT_TIMEOUT_S, AsyncClient
from pipeline.client.inputs import Prompt, SchedulingOptions
from pipeline.client.loop_thread import LoopThread
from pipeline.client.outputs import EngineStats, Health, Output, TokenizedPrompt
from pipeline.client.streams import OutputStream


class Engine(Protocol):
    """An engine that lives as long as a client needs it."""

    def has_ended(self) -> bool:
        """Whether it has ended, and will not be started again. Asked by any thread, and in forked children."""


class Client:
    """A client of one engine, for any number of threads.

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

    The first call starts a thread and connects. `close()` ends both, and so does dropping the last reference to the
    client and its streams. In a forked child the client starts its own thread and connection. Errors are those of
    AsyncClient.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        resume_timeout_s: float | None = DEFAULT_RESUME_TIMEOUT_S,
        key_file: str | os.PathLike[str] | None = None,
    ) -> None:
        self._client = AsyncClient(endpoint, timeout_s=timeout_s, resume_timeout_s=resume_timeout_s, key_file=key_file)
        self._thread = LoopThread(at_end=self._client.close)
        weakref.finalize(self, self._thread.close_soon).atexit = False  # at exit the process ends anyway

    @property
    def endpoint(self) -> str:
        """Where the engine listens."""
        return self._client.endpoint

    @property
    def key_file(self) -> str | None:
        """The file with this client's keys, as an absolute path."""
        return self._client.key_file

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
        """Complete a text, a chat (list of messages, or Chat) or a list of token ids.

        Returns one Output with everything. With `stream=True` it returns a Stream: an iterator of Outputs with what
        is new. Breaking out of the loop cancels the request. Arguments and errors are those of
        AsyncClient.generate.
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
        """Complete many prompts and return their Outputs in input order.

        Arguments and errors are those of AsyncClient.generate_batch.
        """
        return self._thread.run(self._client.generate_batch(prompts, params, progress=progress, **scheduling))

    def cancel(self, request_id: str) -> None:
        """End an open request of this client with finish reason "cancelled". Unknown ids are ignored."""
        self._thread.run(self._client.cancel(request_id))

    def health(self) -> Health:
        """The engine's state and its limits.

        Raises EngineUnavailable if no engine answers within `timeout_s`, and ProtocolError if the engine speaks
        another version of the protocol.
        """
        return self._thread.run(self._client.health())

    def stats(self) -> dict[str, dict[str, float]]:
        """Counters and gauges of each process: {"scheduler": {"num_steps": 12, ...}, "tokenizer.0": {...}, ...}.

        Counters grow from the engine's start; names that end in `_ns` are nanoseconds. Raises EngineUnavailable if no
        engine answers within `timeout_s`.
        """
        return self._thread.run(self._client.stats())

    def stats_with_arrays(self, names: Sequence[str]) -> EngineStats:
        """`stats()`, and those arrays of the processes' statistics that have one of these names.

        Raises EngineUnavailable if no engine answers within `timeout_s`.
        """
        return self._thread.run(self._client.stats_with_arrays(names))

    def clear_cache(self) -> None:
        """Empty the prefix cache. Requests sent after this returns reuse no earlier prompt."""
        self._thread.run(self._client.clear_cache())

    def tokenize(
        self, prompt: Prompt, *, add_special_tokens: bool = True, **scheduling: Unpack[SchedulingOptions]
    ) -> TokenizedPrompt:
        """The tokens of a prompt, as `generate` would give them to the model. Nothing is generated.

        Arguments and errors are those of AsyncClient.tokenize.
        """
        return self._thread.run(self._client.tokenize(prompt, add_special_tokens=add_special_tokens, **scheduling))

    def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = False, **scheduling: Unpack[SchedulingOptions]
    ) -> str:
        """The text of tokens, as the model's tokenizer decodes them.

        Arguments and errors are those of AsyncClient.detokenize.
        """
        return self._thread.run(
            self._client.detokenize(token_ids, skip_special_tokens=skip_special_tokens, **scheduling)
        )

    def keep(self, key: str, value: bytes) -> None:
        """Keep a value in the engine, where any client can `recall` it. Limits and errors as of AsyncClient.keep."""
        self._thread.run(self._client.keep(key, value))

    def recall(self, key: str) -> bytes | None:
        """The value that a client has kept under this key; None if there is none, or the engine has forgotten it."""
        return self._thread.run(self._client.recall(key))

    def forget(self, key: str) -> bool:
        """Forget a kept value. Returns whether there was one."""
        return self._thread.run(self._client.forget(key))

    def wait_ready(self, timeout_s: float | None = 60.0) -> Health:
        """Wait until the engine accepts requests.

        Raises EngineUnavailable if it is not ready after `timeout_s` seconds (None = no limit), or has failed.
        """
        return self._thread.run(self._client.wait_ready(timeout_s))

    def keep_alive(self, engine: Engine) -> None:
        """Keep an engine alive until the client is dropped, and fail interrupted requests once the engine has ended.

        Call it before the first use.
        """
        self._engine = engine
        self._client.ask_whether_ended(engine.has_ended)

    def close(self) -> None:
        """Cancel open requests and disconnect. Waiting threads get EngineUnavailable. A second call does nothing."""
        self._thread.close()

    def __reduce__(self) -> tuple[functools.partial[Self], tuple[()]]:
        """A pickled copy, in this or another process, is a new client of the same engine."""
        copy, nothing = self._client.__reduce__()
        return functools.partial(type(self), *copy.args, **copy.keywords), nothing

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
    """An iterator over the Outputs of one request, from `Client.generate(..., stream=True)`.

    Dropping it, `close()`, or leaving its `with` block cancels the request. One thread at a time may read it, in the
    process that opened it; any other reader gets InvalidRequest.
    """

    def __init__(self, client: Client, thread: LoopThread, stream: OutputStream) -> None:
        self._client = client  # lives as long as its streams
        self._thread = thread
        self._stream = stream

    @property
    def request_id(self) -> str:
        """The id of the request, for `cancel()`."""
        return self._stream.request_id

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Output:
        output = self._thread.run(self._stream.next())
        if output is None:
            raise StopIteration
        return output

    def close(self) -> None:
        """Cancel the request if it has not ended. A second call does nothing."""
        self._stream.close_soon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
