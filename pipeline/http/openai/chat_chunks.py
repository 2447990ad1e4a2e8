"""Writes the parts of a chat as the chunks of a chat completion stream, one server-sent event each.

A chunk is a fixed text around one delta. Only the delta is encoded for each token, because a server with many streams
spends most of its time here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from pipeline.http.generation.chat_run import Part, RunUsage
from pipeline.http.generation.events import Content, Event, Reasoning, ToolArguments, ToolCallBegin
from pipeline.http.openai.wire import chat_logprobs, usage_value
from pipeline.http.service import new_id

_encode: Final = msgspec.json.Encoder().encode


class ChunkWriter:
    """The chunks of one request.

    Args:
        head: the fields that all chunks share: id, object, created, model.
        reports_usage: the stream ends with a chunk that has the usage; all others have `usage` null.
        prompt_token_ids: the first chunk of each sample has these, and each chunk has its `token_ids`: vLLM's further
            fields. None = neither.
        role: of the message, in the first chunk of each sample.
        tokens_as_ids: log-probabilities name a token "token_id:7".
    """

    def __init__(
        self,
        head: dict[str, Any],
        *,
        reports_usage: bool,
        role: str,
        prompt_token_ids: list[int] | None = None,
        tokens_as_ids: bool = False,
    ) -> None:
        self._begin = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._end = b'],"usage":null}\n\n' if reports_usage else b"]}\n\n"
        self._head = head
        self._with_token_ids = prompt_token_ids is not None
        self._prompt = b"" if prompt_token_ids is None else b',"prompt_token_ids":' + _encode(prompt_token_ids)
        self._tokens_as_ids = tokens_as_ids
        self._usage_so_far = RunUsage.of(0, 0)
        self._role = _encode(role)
        self._begun: set[int] = set()  # samples that have a chunk
        self._num_calls: defaultdict[int, int] = defaultdict(int)  # by sample

    def count(self, part: Part) -> None:
        """Put the usage, with this part, into the chunks from now on: vLLM's `continuous_usage_stats`."""
        so_far = self._usage_so_far
        if part.prompt_usage is not None:
            so_far.prompt_tokens, so_far.cached_tokens = (
                part.prompt_usage.prompt_tokens,
                part.prompt_usage.cached_tokens,
            )
        so_far.completion_tokens += len(part.token_ids)
        value = usage_value(part.usage or so_far)
        if part.usage is None:
            del value["completion_tokens_details"]  # the tokens of reasoning are known at the end
        self._end = b'],"usage":' + _encode(value) + b"}\n\n"

    def write(self, part: Part) -> bytes:
        """The events of a part: a chunk for each kind of delta in it, at least one. b"" if the part has no news."""
        index = part.index
        deltas = self._deltas(part.events, index)
        has_more = part.logprobs is not None or part.finish_reason is not None or self._with_token_ids
        if len(deltas) == 1 and not has_more and index in self._begun:  # nearly every token of nearly every stream
            return self._chunk(index, deltas[0])
        chunks = []
        if index not in self._begun:
            self._begun.add(index)
            role = self._chunk(index, b'{"role":' + self._role + b',"content":""}')
            chunks.append(role.removesuffix(self._end) + b"]" + self._prompt + self._end[1:])
        logprobs = chat_logprobs(part.logprobs, as_ids=self._tokens_as_ids) if part.logprobs else None
        token_ids = part.token_ids if self._with_token_ids else None
        if not deltas and (logprobs or token_ids or part.finish_reason is not None):
            deltas = [b"{}"]
        last = len(deltas) - 1
        for i, delta in enumerate(deltas):
            if i < last:
                chunks.append(self._chunk(index, delta))
            else:  # the tokens of the part belong to its last delta
                chunks.append(self._chunk(index, delta, logprobs, part.finish_reason, part.stop_reason, token_ids))
        return b"".join(chunks)

    def write_usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk that ends a stream with its usage."""
        return b"data: " + _encode({**self._head, "choices": [], "usage": usage}) + b"\n\n"

    def _chunk(
        self,
        index: int,
        delta: bytes,
        logprobs: Any = None,
        finish_reason: str | None = None,
        stop_reason: str | None = None,
        token_ids: list[int] | None = None,
    ) -> bytes:
        if logprobs is None and finish_reason is None and token_ids is None:
            return b'%b{"index":%d,"delta":%b,"logprobs":null,"finish_reason":null}%b' % (
                self._begin, index, delta, self._end,
            )  # fmt: skip
        rest: dict[str, Any] = {"logprobs": logprobs, "finish_reason": finish_reason}
        if finish_reason is not None:
            rest["stop_reason"] = stop_reason
        if token_ids is not None:
            rest["token_ids"] = token_ids
        return b'%b{"index":%d,"delta":%b,%b%b' % (self._begin, index, delta, _encode(rest)[1:], self._end)

    def _deltas(self, events: Iterable[Event], index: int) -> list[bytes]:
        deltas = []
        for event in events:
            match event:
                case Content(text):
                    deltas.append(b'{"content":' + _encode(text) + b"}")
                case Reasoning(text):
                    encoded = _encode(text)
                    deltas.append(b'{"reasoning_content":' + encoded + b',"reasoning":' + encoded + b"}")
                case ToolCallBegin(name, call_id):
                    call = {
                        "index": self._num_calls[index], "id": call_id or new_id("call_"), "type": "function",
                        "function": {"name": name, "arguments": ""},
                    }  # fmt: skip
                    self._num_calls[index] += 1
                    deltas.append(_encode({"tool_calls": [call]}))
                case ToolArguments(text):
                    call = {"index": self._num_calls[index] - 1, "function": {"arguments": text}}
                    deltas.append(_encode({"tool_calls": [call]}))
        return deltas
