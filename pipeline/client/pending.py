"""The requests and queries of a client that have no final answer yet, and what the engine's messages do to them.

Reads the gateway's messages (`ipc/messages.py`: gateway -> client). Knows no sockets: `session.py` sends.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ipc.codec import decode
from ipc.errors import ProtocolError, QueueFull, RequestFailed, RingfeedError, error_from_code
from ipc.messages import (
    Alive,
    DetokenizedText,
    FinalOutput,
    GatewayToClient,
    KeptValue,
    Message,
    Outputs,
    PromptTokens,
    Refused,
)
from pipeline.client.outputs import Usage, read_token_bytes
from pipeline.client.streams import OpenRequest

logger = logging.getLogger(__name__)


class PendingAnswers:
    """Open requests by request id, and open queries by query id."""

    def __init__(self, endpoint: str) -> None:
        self.requests: dict[str, OpenRequest] = {}
        self.queries: dict[int | str, asyncio.Future[Any]] = {}  # by query id; those that can be refused, by request id
        self.unsent: dict[str | int, bytes] = {}  # the frames of those that wait for an engine
        self._endpoint = endpoint

    @property
    def are_awaited(self) -> bool:
        """Whether a caller still waits for any of them."""
        return bool(self.queries) or any(not request.abandoned for request in self.requests.values())

    def take_frames(self, frames: list[bytes]) -> tuple[int, list[int]]:
        """Give messages of the engine to the requests and queries that wait for them.

        Returns the number of Outputs messages and the receipts of other messages. The caller acknowledges both.
        """
        num_outputs = 0
        receipts: list[int] = []
        for frame in frames:
            try:
                message: GatewayToClient = decode(frame, GatewayToClient)
            except ProtocolError as error:
                self.fail_all(ProtocolError(f"the engine at {self._endpoint} sent an unreadable message: {error}"))
                continue
            match message:
                case Outputs():
                    num_outputs += 1
                    self._take_outputs(message)
                case Refused():
                    self._take_refusal(message)
                case Alive():
                    pass  # the gateway only tests whether it can reach this client
                case PromptTokens() | DetokenizedText() | KeptValue():
                    if message.receipt:
                        receipts.append(message.receipt)
                    self._answer_query(message.request_id, message)
                case _:
                    self._answer_query(message.query_id, message)
        return num_outputs, receipts

    def _answer_query(self, query_id: int | str, answer: Message) -> None:
        query = self.queries.pop(query_id, None)
        if query is not None and not query.done():
            query.set_result(answer)

    def _fail_query(self, query_id: str, error: RingfeedError) -> bool:
        """Whether there is such a query. It ends with this error."""
        query = self.queries.pop(query_id, None)
        if query is not None and not query.done():
            query.set_exception(error)
        return query is not None

    def _take_outputs(self, outputs: Outputs) -> None:
        num_token_ids = memoryview(outputs.num_token_ids).cast("i").tolist()
        token_ids = memoryview(outputs.token_ids).cast("i").tolist()
        samples = memoryview(outputs.samples or bytes(len(outputs.num_token_ids))).cast("i").tolist()
        find = self.requests.get
        start = 0
        for request_id, sample, text, num in zip(
            outputs.request_ids, samples, outputs.texts, num_token_ids, strict=True
        ):
            request = find(request_id)
            if request is not None and not request.abandoned:
                request.add(sample, text, token_ids[start : start + num])
            start += num
        bytes_of = read_token_bytes(outputs.token_bytes)
        for index, logprobs in outputs.logprobs:
            request = find(outputs.request_ids[index])
            if request is not None and not request.abandoned:
                request.samples[samples[index]].logprobs.append((logprobs, bytes_of))
        for index, part in outputs.prompt_logprobs:
            request = find(outputs.request_ids[index])
            if request is not None and not request.abandoned:
                request.add_prompt_logprobs(samples[index], (part, bytes_of))
        for index, num_prompt_tokens, num_cached_tokens in outputs.prompts:
            request = find(outputs.request_ids[index])
            if request is not None and not request.abandoned:
                request.samples[samples[index]].prompt_usage = Usage(num_prompt_tokens, 0, num_cached_tokens)
        for index, final in outputs.finals:
            request_id = outputs.request_ids[index]
            request = find(request_id)
            if request is not None:
                self.end_sample(request, samples[index], final)
            else:
                self._fail_query(request_id, _error_of_query(final))

    def _take_refusal(self, refused: Refused) -> None:
        request = self.requests.pop(refused.request_id, None)
        error = error_from_code(refused.error_code, refused.error_message, refused.retry_after_s)
        if request is not None:
            request.fail(error)
        elif not self._fail_query(refused.request_id, error):
            logger.warning("the engine refused a message: %s", refused.error_message)

    def end_sample(self, request: OpenRequest, sample: int, final: FinalOutput) -> None:
        """A sample has ended. If no other sample is open, the request has ended too."""
        if final.num_open == 0:
            del self.requests[request.request_id]
        request.end_sample(sample, final)

    def fail_all(self, error: RingfeedError) -> None:
        """End all requests and queries with an error."""
        requests, queries = list(self.requests.values()), list(self.queries.values())
        self.requests.clear()
        self.queries.clear()
        self.unsent.clear()
        for request in requests:
            request.fail(type(error)(*error.args))  # a copy for each, because threads raise them at the same time
        for query in queries:
            if not query.done() and not query.get_loop().is_closed():
                query.set_exception(type(error)(*error.args))


def _error_of_query(final: FinalOutput) -> RingfeedError:
    """The error of a query that ended without an answer."""
    if final.finish_reason == "error":
        return error_from_code(final.error_code, final.error_message, final.retry_after_s)
    if final.finish_reason == "queue_timeout":
        return QueueFull("the query waited for a tokenizer longer than its queue time-out: try again later")
    return RequestFailed(f"the query ended without an answer ({final.finish_reason})")
