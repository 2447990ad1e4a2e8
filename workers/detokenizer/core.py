"""Collects each sequence's tokens and turns them into news for its client, as much as the client's credit allows.

Owns text, stop strings, usage and the one final answer of every request. Knows no sockets.

While a client has credit, each of its sequences with new tokens gets an item in the next `Outputs`; while it has none,
tokens pile up as plain ints and go out as one item later. So the cost of a slow client falls, and nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from ipc.codec import encode
from ipc.messages import (
    ClientCredit,
    ClientGone,
    Delivery,
    Ended,
    FinishReason,
    Opened,
    Outputs,
    StepLogprobs,
    StepOutputs,
    TokenLogprobs,
)
from ipc.messages import (
    Final as FinalAnswer,
)
from ipc.records import FinishCode
from workers.detokenizer.decoding import TextDecoder
from workers.detokenizer.stop_strings import StopMatcher

MAX_FRAME_ITEMS: Final = 8_192  # in one Outputs
MAX_FRAME_TOKENS: Final = 131_072  # in one Outputs, before its last item: keeps it far below the largest frame
MAX_ITEM_TOKENS: Final = 65_536  # of one sequence in one Outputs

RUNNING: Final = int(FinishCode.RUNNING)
STOP: Final = int(FinishCode.STOP)


class Client:
    """One client's credit and what waits for it."""

    __slots__ = ("credit", "name", "num_open", "ready")

    def __init__(self, name: bytes, window: int) -> None:
        self.name = name
        self.credit = window
        self.num_open = 0
        self.ready: list[Sequence] = []  # have news


class Request:
    """What the samples of one request have in common."""

    __slots__ = ("client", "key", "num_cached_tokens", "num_open", "num_prompt_tokens", "request_id", "stream")

    def __init__(self, opened: Opened, client: Client) -> None:
        self.key = opened.key
        self.client = client
        self.request_id = opened.route.request_id
        self.stream = opened.route.stream
        self.num_prompt_tokens = opened.num_prompt_tokens
        self.num_cached_tokens = 0
        self.num_open = opened.num_samples  # whose ends are not delivered


class Sequence:
    """One sample of a request, between `Opened` and the delivery of its end."""

    __slots__ = (
        "client", "decoder", "end", "hides_last", "idle", "is_plain", "key", "logprobs", "matcher", "num_sent",
        "request", "sample", "text", "token_ids",
    )  # fmt: skip

    def __init__(self, request: Request, sample: int, opened: Opened, decoder: TextDecoder) -> None:
        self.key = request.key + sample
        self.request = request
        self.sample = sample
        self.client = request.client
        self.decoder = decoder
        self.matcher = StopMatcher(opened.stop) if opened.stop else None
        self.logprobs = None if opened.num_logprobs is None else _LogprobColumns(opened.num_logprobs)
        self.is_plain = self.matcher is None and self.logprobs is None
        self.token_ids: list[int] = []  # not sent yet
        self.text = ""  # not sent yet; only with stop strings, else it is decoded when it is sent
        self.num_sent = 0  # tokens
        self.idle = request.stream  # not in client.ready, and the next token puts it there
        self.end: Ended | None = None
        self.hides_last = False  # the last token ended the sequence: it has no text


class Detokenizer:
    """The role's whole behaviour. Feed it messages, then collect `deliveries()` and `take_cancels()`."""

    def __init__(self, new_decoder: Callable[[], TextDecoder], client_window: int) -> None:
        self._new_decoder = new_decoder
        self._window = client_window
        self._open: dict[int, Sequence] = {}
        self._clients: dict[bytes, Client] = {}
        self._cancels: list[int] = []
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
        """Sequences with news that wait for credit."""
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
        """Keys that a stop string has ended and the scheduler still runs."""
        cancels, self._cancels = self._cancels, []
        return cancels

    # A step

    def _step(self, step: StepOutputs) -> None:
        for opened in step.opened:
            name = opened.route.client
            client = self._clients.get(name)
            if client is None:
                client = self._clients[name] = Client(name, self._window)
            client.num_open += opened.num_samples
            request = Request(opened, client)
            for sample in range(opened.num_samples):
                self._open[opened.key + sample] = Sequence(request, sample, opened, self._new_decoder())
        for key, num_cached in step.cached:
            sequence = self._open.get(key)
            if sequence is not None and sequence.sample == 0:  # the others find what it has just computed
                sequence.request.num_cached_tokens = num_cached
        keys = np.frombuffer(step.keys, "<i8").tolist()
        token_ids = np.frombuffer(step.token_ids, "<i4").tolist()
        self.num_tokens += len(keys)
        find = self._open.get
        for index, (key, token_id, code) in enumerate(zip(keys, token_ids, step.finish, strict=True)):
            sequence = find(key)
            if sequence is None:  # a stop string ended it, or its client has gone
                continue
            sequence.token_ids.append(token_id)
            if sequence.idle:
                sequence.idle = False
                sequence.client.ready.append(sequence)
            if code or not sequence.is_plain:
                self._look_closer(sequence, token_id, code, step.logprobs, index)
        for ended in step.ended:
            sequence = find(ended.key)
            if sequence is not None:
                self._finish_text(sequence)
                self._end(sequence, ended)

    def _look_closer(
        self, sequence: Sequence, token_id: int, code: int, logprobs: StepLogprobs | None, index: int
    ) -> None:
        """What a token may mean besides being one: a stop string's end, log-probabilities, the end of the sequence."""
        if sequence.logprobs is not None:
            assert logprobs is not None, f"sequence {sequence.key} wants log-probabilities and its step has none"
            sequence.logprobs.append(logprobs, index)
        sequence.hides_last = code == STOP
        matcher = sequence.matcher
        if matcher is not None:
            if not sequence.hides_last:
                sequence.text += matcher.feed(sequence.decoder.push([token_id]))
            if code and not matcher.matched:
                self._finish_text(sequence)
            if matcher.matched:
                if code == RUNNING:
                    self._cancels.append(sequence.key)
                self._end(sequence, Ended(sequence.key, "stop"))
                return
        if code:
            self._end(sequence, Ended(sequence.key, "stop" if code == STOP else "length"))

    @staticmethod
    def _finish_text(sequence: Sequence) -> None:
        """Decode the end of a text that is decoded eagerly; a stop string may be complete only here."""
        matcher = sequence.matcher
        if matcher is not None:
            sequence.text += matcher.feed(sequence.decoder.flush()) + matcher.finish()

    def _end(self, sequence: Sequence, ended: Ended) -> None:
        sequence.end = ended
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
        client.ready.clear()  # no cycle, client to sequence to client, may be left for the garbage collector
        if client.num_open:
            for key in [key for key, sequence in self._open.items() if sequence.client is client]:
                del self._open[key]

    def _forget_if_idle(self, client: Client) -> None:
        if not client.num_open and not client.ready and client.credit == self._window:
            del self._clients[client.name]

    # News

    def deliveries(self) -> Iterator[tuple[Delivery, list[bytes]]]:
        """All that may be sent now: heads, each with its encoded `Outputs` frames."""
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
                if len(clients) == MAX_FRAME_ITEMS:
                    yield Delivery(clients=clients, finished=finished), frames
                    clients, finished, frames = [], [], []
        if clients:
            yield Delivery(clients=clients, finished=finished), frames

    def _next_outputs(self, client: Client) -> tuple[Outputs, list[int]]:
        """Take news of the client's sequences, within the bounds of a frame, and the keys of requests that it ends."""
        request_ids: list[str] = []
        samples: list[int] = []
        texts: list[str] = []
        counts: list[int] = []
        token_ids: list[int] = []
        finals: list[tuple[int, FinalAnswer]] = []
        logprobs: list[tuple[int, TokenLogprobs]] = []
        keys: list[int] = []
        ready = client.ready
        num_taken = 0
        for sequence in ready[:MAX_FRAME_ITEMS]:
            if len(token_ids) >= MAX_FRAME_TOKENS:
                break
            num_taken += 1
            new = sequence.token_ids
            if len(new) > MAX_ITEM_TOKENS:
                sequence.token_ids = new[MAX_ITEM_TOKENS:]
                new = new[:MAX_ITEM_TOKENS]
                ready.append(sequence)
                is_last = False
            else:
                sequence.token_ids = []
                sequence.idle = sequence.end is None
                is_last = sequence.end is not None
            texts.append(
                sequence.decoder.push(new) if sequence.is_plain and not is_last else _text_of(sequence, new, is_last)
            )
            sequence.num_sent += len(new)
            if sequence.logprobs is not None and new:
                logprobs.append((len(request_ids), sequence.logprobs.take(len(new))))
            if is_last:
                finals.append((len(request_ids), _end_of(sequence)))
                if not sequence.request.num_open:
                    keys.append(sequence.request.key)
            request_ids.append(sequence.request.request_id)
            samples.append(sequence.sample)
            counts.append(len(new))
            token_ids += new
        del ready[:num_taken]
        self.num_outputs += 1
        self.num_finished += len(keys)
        outputs = Outputs(
            request_ids=request_ids,
            texts=texts,
            num_token_ids=np.array(counts, "<i4").tobytes(),
            token_ids=np.array(token_ids, "<i4").tobytes(),
            finals=finals,
            logprobs=logprobs,
            samples=np.array(samples, "<i4").tobytes() if any(samples) else b"",
        )
        return outputs, keys


def _text_of(sequence: Sequence, new: list[int], is_last: bool) -> str:
    """The text of an item; `new` are its tokens."""
    if sequence.matcher is not None:
        text, sequence.text = sequence.text, ""
        return text
    visible = new[:-1] if is_last and sequence.hides_last else new
    text = sequence.decoder.push(visible) if visible else ""
    return text + sequence.decoder.flush() if is_last else text


def _end_of(sequence: Sequence) -> FinalAnswer:
    """Counts the sequence out of its request: once, when this is delivered."""
    request, end = sequence.request, sequence.end
    assert end is not None, f"sequence {sequence.key} has not ended"
    request.num_open -= 1
    reason: FinishReason = end.finish_reason
    return FinalAnswer(
        reason,
        request.num_prompt_tokens,
        sequence.num_sent,
        end.error_code,
        end.error_message,
        request.num_cached_tokens,
        request.num_open,
        end.retry_after_s,
    )


class _LogprobColumns:
    """Log-probabilities of one sequence's unsent tokens, with the `num_top` alternatives that it asked for."""

    __slots__ = ("_logprobs", "_num_top", "_top_ids", "_top_logprobs")

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._logprobs = bytearray()
        self._top_ids = bytearray()
        self._top_logprobs = bytearray()

    def append(self, step: StepLogprobs, index: int) -> None:
        """Take the row of the step's token `index`. The step has at least `num_top` alternatives."""
        assert step.num_top >= self._num_top, f"{step.num_top} alternatives, {self._num_top} wanted"
        row, num_bytes = 4 * step.num_top * index, 4 * self._num_top
        self._logprobs += step.logprobs[4 * index : 4 * index + 4]
        self._top_ids += step.top_ids[row : row + num_bytes]
        self._top_logprobs += step.top_logprobs[row : row + num_bytes]

    def take(self, num_tokens: int) -> TokenLogprobs:
        return TokenLogprobs(
            self._num_top,
            _cut(self._logprobs, 4 * num_tokens),
            _cut(self._top_ids, 4 * num_tokens * self._num_top),
            _cut(self._top_logprobs, 4 * num_tokens * self._num_top),
        )


def _cut(column: bytearray, num_bytes: int) -> bytes:
    part: Any = bytes(column[:num_bytes])
    del column[:num_bytes]
    return part  # type: ignore[no-any-return]
