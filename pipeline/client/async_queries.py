"""The questions of the asyncio client beside completions: state, statistics, tokens, texts and kept values."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Final, Unpack

from ipc.errors import EngineUnavailable, ProtocolError
from ipc.messages import PROTOCOL_VERSION, DetokenizedText, KeptValue, Stats
from pipeline.client.inputs import (
    Prompt,
    SchedulingOptions,
    checked_timeout,
    detokenize_frame,
    keep_frame,
    new_id,
    recall_frame,
    scheduling_params,
    tokenize_frame,
)
from pipeline.client.outputs import EngineStats, Health, TokenizedPrompt, tokenized_prompt
from pipeline.client.session import Session

_POLL_HEALTH_S: Final = 0.05


class AsyncQueries:
    """Queries to the engine at `endpoint`, over a session. Each waits `timeout_s` seconds for its answer.

    A query that was sent before the connection was lost is sent again.
    """

    def __init__(self, endpoint: str, timeout_s: float | None, session: Session) -> None:
        self.endpoint = endpoint
        self._timeout_s = timeout_s
        self._session = session

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
        return await tokenized_prompt(await self._session.ask(request_id, frame, self._timeout_s, is_queued=True))

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

    async def _ask_health(self, timeout_s: float | None) -> Health:
        return Health.of(await self._session.query("health", timeout_s))
