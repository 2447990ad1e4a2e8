"""The requests and queries of a client that have no final answer yet, and what the engine's messages do to them.

Reads the gateway's messages (`ipc/messages.py`: gateway -> client). Knows no sockets: `session.py` sends, and
`resuming.py` sends interrupted questions again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from ipc.codec import decode
from ipc.errors import (
    EngineUnavailable,
    Interrupted,
    ProtocolError,
    QueueFull,
    RequestFailed,
    RingfeedError,
    error_from_code,
)
from ipc.messages import (
    Alive,
    DetokenizedText,
    FinalOutput,
    GatewayToClient,
    Health,
    KeptValue,
    Message,
    Outputs,
    PromptTokens,
    Refused,
)
from pipeline.client.interruption import Interruption, OpenQuery
from pipeline.client.open_request import OpenRequest
from pipeline.client.outputs import Usage, read_token_bytes

logger = logging.getLogger(__name__)

Question = OpenRequest | OpenQuery


class PendingAnswers:
    """Open requests by request id, and open queries by query id.

    `resumes`: whether a question that the engine has lost waits to be sent again. Otherwise it fails.
    """

    def __init__(self, endpoint: str, *, resumes: bool) -> None:
        self.requests: dict[str, OpenRequest] = {}
        self.queries: dict[int | str, OpenQuery] = {}  # by query id; those that can be refused, by request id
        self.unsent: dict[str | int, bytes] = {}  # the frames of those that wait for their first engine
        self.waiting: dict[str | int, Question] = {}  # those that were interrupted and wait to be sent again
        self.on_waiting: Callable[[], None] = lambda: None  # called after a question has begun to wait
        self.on_health: Callable[[Health], None] = lambda _: None  # called with each Health of the engine
        self._endpoint = endpoint
        self._resumes = resumes

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
                case Health():
                    self._answer_query(message.query_id, message)
                    self.on_health(message)
                case _:
                    self._answer_query(message.query_id, message)
        return num_outputs, receipts

    def _answer_query(self, query_id: int | str, answer: Message) -> None:
        query = self.queries.pop(query_id, None)
        if query is not None and not query.answer.done():
            query.answer.set_result(answer)

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
            if request is not None and not request.is_deaf:
                request.add(sample, text, token_ids[start : start + num])
            start += num
        bytes_of = read_token_bytes(outputs.token_bytes)
        for index, logprobs in outputs.logprobs:
            request = find(outputs.request_ids[index])
            if request is not None and not request.is_deaf:
                request.samples[samples[index]].logprobs.append((logprobs, bytes_of))
        for index, part in outputs.prompt_logprobs:
            request = find(outputs.request_ids[index])
            if request is not None and not request.is_deaf:
                request.add_prompt_logprobs(samples[index], (part, bytes_of))
        for index, num_prompt_tokens, num_cached_tokens in outputs.prompts:
            request = find(outputs.request_ids[index])
            if request is not None and not request.is_deaf:
                request.add_prompt_usage(samples[index], Usage(num_prompt_tokens, 0, num_cached_tokens))
        for index, final in outputs.finals:
            request_id = outputs.request_ids[index]
            if request_id in self.waiting:  # an engine has lost it: this is not its end
                continue
            if (request := find(request_id)) is not None:
                self._end_sample(request, samples[index], final)
            elif (query := self.queries.get(request_id)) is not None:
                self._take_error(query, _error_of_query(final), QueueFull)

    def _take_refusal(self, refused: Refused) -> None:
        question = self.requests.get(refused.request_id) or self.queries.get(refused.request_id)
        error = error_from_code(refused.error_code, refused.error_message, refused.retry_after_s)
        if question is None:
            logger.warning("the engine refused a message: %s", refused.error_message)
        elif question.key not in self.waiting:
            self._take_error(question, error, (QueueFull, EngineUnavailable))

    def _end_sample(self, request: OpenRequest, sample: int, final: FinalOutput) -> None:
        """A sample has ended. If no other sample is open, the request has ended too, or can be resumed."""
        if final.finish_reason == "error":
            error = error_from_code(final.error_code, final.error_message, final.retry_after_s)
            request.is_suspected |= final.suspected
            if isinstance(error, Interrupted) and final.num_open:
                request.lost = final
            else:
                self._take_error(request, error, QueueFull, is_open=final.num_open > 0)
            return
        lost = request.lost
        request.end_sample(sample, final)
        if final.num_open == 0 and lost is not None:
            self._take_error(request, error_from_code(lost.error_code, lost.error_message), ())
        elif final.num_open == 0:
            del self.requests[request.request_id]

    def _take_error(
        self,
        question: Question,
        error: RingfeedError,
        passing: type[RingfeedError] | tuple[type[RingfeedError], ...],
        *,
        is_open: bool = False,
    ) -> None:
        """The engine does not answer a question: it waits to be sent again, or fails.

        A question that was interrupted has been accepted once. So it also waits after a `passing` error of a further
        attempt. `is_open`: the id stays in use, because other samples of the request still run.
        """
        if isinstance(error, Interrupted) or (question.interruption is not None and isinstance(error, passing)):
            self.interrupt(question, error)
            return
        if not is_open:
            self.remove(question)
        question.fail(error)

    def interrupt(self, question: Question, error: RingfeedError) -> None:
        """The engine has lost a question. It waits to be sent again, unless nobody wants its answer any more."""
        if isinstance(question, OpenRequest) and (question.ended or question.abandoned or question.cancelled):
            self.remove(question)
            if not question.ended:
                question.end_here("cancelled")
        elif self._resumes:
            if question.interruption is None:
                question.interruption = Interruption()
            question.interruption.begin(error, time.monotonic())
            if isinstance(question, OpenRequest):
                question.end_attempt()
            self.waiting[question.key] = question
            self.on_waiting()
        else:
            self.remove(question)
            question.fail(error)

    def lose_engine(self, error: RingfeedError) -> None:
        """The connection was lost, and with it every question that was sent."""
        for question in self._questions():
            if question.key not in self.unsent and question.key not in self.waiting:
                self.interrupt(question, type(error)(*error.args))

    def _questions(self) -> list[Question]:
        return [*self.requests.values(), *self.queries.values()]

    def take_back(self, question: Question) -> bool:
        """Remove a question that no engine works on, and say whether it was one."""
        if self.unsent.pop(question.key, None) is None and self.waiting.pop(question.key, None) is None:
            return False
        self.remove(question)
        return True

    def remove(self, question: Question) -> None:
        """Forget a question that has ended."""
        self.waiting.pop(question.key, None)
        if isinstance(question, OpenRequest):
            del self.requests[question.key]
        else:
            self.queries.pop(question.key, None)

    def fail_all(self, error: RingfeedError) -> None:
        """End all requests and queries with an error."""
        questions = self._questions()
        for each in (self.requests, self.queries, self.unsent, self.waiting):
            each.clear()
        for question in questions:
            question.fail(type(error)(*error.args))  # a copy for each, because threads raise them at the same time


def _error_of_query(final: FinalOutput) -> RingfeedError:
    """The error of a query that ended without an answer."""
    if final.finish_reason == "error":
        return error_from_code(final.error_code, final.error_message, final.retry_after_s)
    if final.finish_reason == "queue_timeout":
        return QueueFull("the query waited for a tokenizer longer than its queue time-out: try again later")
    return RequestFailed(f"the query ended without an answer ({final.finish_reason})")
