"""Collects each sequence's tokens and turns them into outputs for its client, as the client's credit allows.

Owns text, stop strings, usage and the one final answer of every request. Knows no sockets.

While a client has credit, each of its sequences with new tokens gets an item in the next `Outputs`. While it has no
credit, tokens collect as plain ints and are sent as one item later. So a slow client costs less, and delays no other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from ipc.codec import encode
from ipc.errors import RequestFailed
from ipc.messages import (
    ClientCredit,
    ClientGone,
    Delivery,
    Ended,
    Opened,
    Outputs,
    PromptLogprobs,
    StepLogprobs,
    StepOutputs,
)
from ipc.records import FinishCode
from workers.detokenizer import frames as frame_bounds
from workers.detokenizer.frames import FrameBuilder
from workers.detokenizer.request_metrics import RequestMetrics
from workers.detokenizer.request_state import NO_DECODER, Client, Request, Sequence
from workers.detokenizer.stop_strings import SpecialTokens
from workers.detokenizer.text_decoding import Decoding
from workers.model_tokenizer.loading import is_foreign_failure

logger = logging.getLogger(__name__)

MAX_PROBLEM_CHARS: Final = 300

RUNNING: Final = int(FinishCode.RUNNING)
STOP: Final = int(FinishCode.STOP)


class Detokenizer:
    """The whole behaviour of the role. Pass it messages, then collect `deliveries()` and `take_cancels()`."""

    def __init__(
        self,
        decoding: Decoding,
        client_window: int,
        metrics: RequestMetrics | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._decoding = decoding
        self._special_tokens = SpecialTokens(decoding.special_tokens, decoding.shown_text)
        self._window = client_window
        self._open: dict[int, Sequence] = {}
        self._clients: dict[bytes, Client] = {}
        self._cancels: list[int] = []
        self.metrics = RequestMetrics() if metrics is None else metrics
        self._clock = clock
        self._now_ns = 0  # when the newest step arrived
        self.num_tokens = 0
        self.num_outputs = 0
        self.num_finished = 0

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def num_clients(self) -> int:
        return len(self._clients)

    def num_undelivered(self) -> int:
        """Sequences with undelivered text that wait for credit."""
        return sum(len(client.ready) for client in self._clients.values())

    def handle(self, message: StepOutputs | ClientCredit | ClientGone) -> None:
        if isinstance(message, StepOutputs):
            self._step(message)
        elif isinstance(message, ClientCredit):
            client = self._clients.get(message.client)
            if client is not None:
                client.credit = min(self._window, client.credit + message.count)
                self._forget_if_idle(client)
        else:
            self._forget(message.client)

    def take_cancels(self) -> list[int]:
        """Keys of sequences that have ended here, at a stop string or an error, and that the scheduler still runs."""
        cancels, self._cancels = self._cancels, []
        return cancels

    # A step

    def _step(self, step: StepOutputs) -> None:
        self._now_ns = self._clock()
        for opened in step.opened:
            name = opened.route.client
            client = self._clients.get(name)
            if client is None:
                client = self._clients[name] = Client(name, self._window)
            request = Request(opened, client)
            client.num_open += request.num_open
            self._open_request(opened, request)
        for key, admitted_ns, num_cached in step.admitted:
            sequence = self._open.get(key)
            if sequence is not None:
                self.metrics.admitted(sequence, admitted_ns)
                if sequence.sample == sequence.request.samples[0]:  # the others find the blocks that it computed
                    sequence.request.num_cached_tokens = num_cached
        for key, part in step.prompt_logprobs:
            sequence = self._open.get(key)
            if sequence is not None:
                sequence.prompt_parts.append(part)
                sequence.has_news()
        self._add_tokens(step)
        for ended in step.ended:
            sequence = self._open.get(ended.key)
            if sequence is not None:
                try:
                    sequence.finish_text()
                except BaseException as error:
                    self._fail(sequence, _problem_of(error))
                else:
                    self._end(sequence, ended)

    def _add_tokens(self, step: StepOutputs) -> None:
        keys = np.frombuffer(step.keys, "<i8").tolist()
        token_ids = np.frombuffer(step.token_ids, "<i4").tolist()
        self.num_tokens += len(keys)
        find, now_ns = self._open.get, self._now_ns
        previous_ns: list[int] = []  # when each sequence that has a token had one before
        for index, (key, token_id, code) in enumerate(zip(keys, token_ids, step.finish, strict=True)):
            sequence = find(key)
            if sequence is None:  # a stop string ended it, or its client has gone
                continue
            sequence.token_ids.append(token_id)
            if sequence.last_token_ns:
                previous_ns.append(sequence.last_token_ns)
            else:
                self.metrics.first_token(sequence, now_ns)
            sequence.last_token_ns = now_ns
            if sequence.idle:
                sequence.idle = False
                sequence.client.ready.append(sequence)
            if code or not sequence.is_plain:
                try:
                    self._look_closer(sequence, token_id, code, step.logprobs, index)
                except BaseException as error:
                    self._fail(sequence, _problem_of(error))
        self.metrics.next_tokens(previous_ns, now_ns)

    def _open_request(self, opened: Opened, request: Request) -> None:
        prompt_tail = np.frombuffer(opened.prompt_tail, "<i4").tolist()
        for sample in request.samples:
            matcher = self._special_tokens.matcher(opened.text)
            sequence = Sequence(request, sample, opened, NO_DECODER, matcher)
            self._open[sequence.key] = sequence
            try:
                sequence.decoder = self._decoding.new_decoder(prompt_tail, opened.text)
                is_stopped = opened.resume is not None and sequence.resume(opened.resume.samples[sample])
            except BaseException as error:
                self._fail(sequence, _problem_of(error))
                continue
            if is_stopped:
                self._cancels.append(sequence.key)
                self._end(sequence, Ended(sequence.key, "stop"))

    def _look_closer(
        self, sequence: Sequence, token_id: int, code: int, logprobs: StepLogprobs | None, index: int
    ) -> None:
        """Handle a token of a sequence with stop strings or log-probabilities, or the last token of a sequence."""
        if sequence.logprobs is not None:
            assert logprobs is not None, f"sequence {sequence.key} wants log-probabilities and its step has none"
            sequence.logprobs.append(logprobs, index)
        sequence.hides_last = code == STOP and not sequence.shows_last
        matcher = sequence.matcher
        if matcher is not None and sequence.look_for_stop(matcher, token_id, is_last=code != RUNNING):
            if code == RUNNING:
                self._cancels.append(sequence.key)
            self._end(sequence, Ended(sequence.key, "stop"))
        elif code:
            self._end(sequence, Ended(sequence.key, "stop" if code == STOP else "length"))

    def _fail(self, sequence: Sequence, problem: str) -> None:
        """End a request whose tokens cannot be decoded: this sample with an error, its other samples as cancelled."""
        logger.warning("the tokens of request %d cannot be decoded: %s", sequence.key, problem)
        request = sequence.request
        keys = range(request.key, request.key + request.num_samples)
        self._cancels += [key for key in keys if key in self._open]  # the scheduler ignores those that have ended
        sequence.decoder, sequence.matcher, sequence.text, sequence.prompt_parts = NO_DECODER, None, "", []
        ended = Ended(
            sequence.key, "error", RequestFailed.code, f"the tokens of the answer cannot be decoded: {problem}"
        )
        if sequence.end is None:
            self._end(sequence, ended)
        else:
            sequence.end = ended

    def _end(self, sequence: Sequence, ended: Ended) -> None:
        sequence.end = ended
        self.metrics.ended(sequence, ended.finish_reason, self._now_ns)
        sequence.client.num_open -= 1
        del self._open[sequence.key]
        if sequence.idle or not sequence.request.stream:
            sequence.idle = False
            sequence.client.ready.append(sequence)

    # Clients

    def _forget(self, name: bytes) -> None:
        client = self._clients.pop(name, None)
        if client is None:
            return
        client.ready.clear()  # breaks the reference cycle client -> sequence -> client
        if client.num_open:
            self.metrics.client_gone(client.num_open)
            for key in [key for key, sequence in self._open.items() if sequence.client is client]:
                del self._open[key]

    def _forget_if_idle(self, client: Client) -> None:
        if not client.num_open and not client.ready and client.credit == self._window:
            del self._clients[client.name]

    # Outputs

    def deliveries(self) -> Iterator[tuple[Delivery, list[bytes]]]:
        """The messages that may be sent now: heads, each with its encoded `Outputs` frames."""
        clients: list[bytes] = []
        finished: list[list[int]] = []
        frames: list[bytes] = []
        for client in self._clients.values():
            while client.ready and client.credit:
                client.credit -= 1
                outputs, keys = self._next_outputs(client)
                clients.append(client.name)
                finished.append(keys)
                frames.append(encode(outputs))
                if len(clients) == frame_bounds.MAX_FRAME_ITEMS:
                    yield Delivery(clients=clients, finished=finished), frames
                    clients, finished, frames = [], [], []
        if clients:
            yield Delivery(clients=clients, finished=finished), frames

    def _next_outputs(self, client: Client) -> tuple[Outputs, list[int]]:
        """Take new text of the client's sequences, within the bounds of a frame, and the keys of requests that end."""
        frame = FrameBuilder()
        keys: list[int] = []
        ready = client.ready
        num_taken = 0
        for sequence in ready[: frame_bounds.MAX_FRAME_ITEMS]:
            if frame.is_full:
                break
            num_taken += 1
            prompt_parts: list[PromptLogprobs] = []
            if sequence.prompt_parts:
                prompt_parts = sequence.take_prompt_parts(frame_bounds.MAX_PROMPT_PARTS, frame_bounds.MAX_FRAME_WORDS)
            new, is_last = sequence.take_tokens(frame_bounds.MAX_ITEM_TOKENS)
            text = ""
            try:
                if new and sequence.is_plain and not is_last:
                    text = sequence.decoder.push(new)
                elif new or is_last:
                    text = sequence.take_text(new, is_last)
            except BaseException as error:
                self._fail(sequence, _problem_of(error))
                is_last = not sequence.token_ids
            sequence.idle = sequence.end is None and not sequence.token_ids and not sequence.prompt_parts
            frame.add(sequence, text, new, prompt_parts, is_last=is_last)
            if is_last and not sequence.request.num_open:
                keys.append(sequence.request.key)
        del ready[:num_taken]
        self.num_outputs += 1
        self.num_finished += len(keys)
        return frame.outputs(self._decoding.bytes_of), keys


def _problem_of(error: BaseException) -> str:
    """The error of `tokenizers` about a request's tokens, as one line. Re-raises any other exception."""
    if not is_foreign_failure(error) or isinstance(error, AssertionError):
        raise error
    return " ".join(str(error).split())[:MAX_PROBLEM_CHARS] or type(error).__name__
