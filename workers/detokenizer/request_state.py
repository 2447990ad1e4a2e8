"""The detokenizer's state of a client, of a request, and of each of its samples."""

from __future__ import annotations

import numpy as np

from ipc.messages import (
    Ended,
    FinalOutput,
    FinishReason,
    Opened,
    PromptLogprobs,
    RequestTimes,
    ResumedSample,
    open_samples,
)
from workers.detokenizer.logprob_columns import LogprobColumns, words_of
from workers.detokenizer.stop_strings import StopMatcher
from workers.detokenizer.text_decoding import TextDecoder


class Client:
    """One client's credit, and its sequences that wait for credit."""

    __slots__ = ("credit", "name", "num_open", "ready")

    def __init__(self, name: bytes, window: int) -> None:
        self.name = name
        self.credit = window
        self.num_open = 0
        self.ready: list[Sequence] = []  # sequences with unsent tokens or an unsent end


class Request:
    """The state that the samples of one request share."""

    __slots__ = (
        "arrived_ns", "client", "has_failed", "key", "num_cached_tokens", "num_generated", "num_open",
        "num_prompt_tokens", "num_running", "num_samples", "request_id", "samples", "stream", "tokenized_ns",
        "was_admitted",
    )  # fmt: skip

    def __init__(self, opened: Opened, client: Client) -> None:
        self.key = opened.key
        self.client = client
        self.request_id = opened.route.request_id
        self.stream = opened.route.stream
        self.num_prompt_tokens = opened.num_prompt_tokens
        self.num_cached_tokens = 0
        self.num_samples = opened.num_samples
        received = [] if opened.resume is None else opened.resume.samples
        self.samples = list(open_samples(opened.num_samples, opened.resume))  # those that run
        self.num_open = len(self.samples)  # samples whose end is not delivered
        self.num_running = len(self.samples)  # samples that have not ended
        # Tokens of the samples that have ended.
        self.num_generated = sum(sample.num_tokens for sample in received if sample.has_ended)
        self.arrived_ns = opened.arrived_ns
        self.tokenized_ns = opened.tokenized_ns
        self.was_admitted = False  # one of its samples, at least
        self.has_failed = False


class Sequence:
    """One sample of a request, between `Opened` and the delivery of its end."""

    __slots__ = (
        "admitted_ns", "client", "decoder", "end", "first_token_ns", "hides_last", "idle", "is_plain", "key",
        "last_token_ns", "logprobs", "matcher", "min_tokens", "num_known", "num_known_chars", "num_sent",
        "prompt_parts", "request", "sample", "shows_last", "text", "token_ids",
    )  # fmt: skip

    def __init__(
        self, request: Request, sample: int, opened: Opened, decoder: TextDecoder, matcher: StopMatcher | None
    ) -> None:
        self.key = request.key + sample
        self.request = request
        self.sample = sample
        self.client = request.client
        self.decoder = decoder
        self.matcher = matcher
        self.logprobs = LogprobColumns.of(opened)
        self.min_tokens = opened.text.min_tokens
        self.shows_last = opened.text.include_stop_str_in_output
        self.is_plain = self.matcher is None and self.logprobs is None
        self.prompt_parts: list[PromptLogprobs] = []  # not sent yet; sent before the first token
        self.token_ids: list[int] = []  # not sent yet
        self.text = ""  # not sent yet; only with stop strings, else it is decoded when it is sent
        self.num_sent = 0  # tokens, with those that the client of a resumed request has
        self.num_known = 0  # tokens that the client of a resumed request has
        self.num_known_chars = 0  # characters that the client has and that are not decoded yet
        self.idle = request.stream  # not in client.ready; the next token adds it
        self.end: Ended | None = None
        self.hides_last = False  # the last token ended the sequence and has no text
        self.admitted_ns = self.first_token_ns = self.last_token_ns = 0  # CLOCK_MONOTONIC; 0 = not yet

    def resume(self, received: ResumedSample) -> bool:
        """Continue behind what the client has received. Returns whether a stop string ends the text within that.

        Text that the client lacks, though it has the tokens, is sent with the next item.
        """
        token_ids = np.frombuffer(received.token_ids, "<i4").tolist()
        self.num_known = len(token_ids)
        is_stopped = False
        if self.matcher is None:
            self.num_sent = len(token_ids)
            self.text = self.decoder.push(token_ids) if token_ids else ""
        else:
            for token_id in token_ids:
                self.num_sent += 1
                if self.look_for_stop(self.matcher, token_id, is_last=False):
                    is_stopped = True
                    break
        self.num_known_chars = received.num_chars
        self.text = self._unknown(self.text)
        self.is_plain = self.is_plain and not self.text and not self.num_known_chars
        return is_stopped

    def _unknown(self, text: str) -> str:
        """The part of the next text that the client does not have."""
        unknown = text[self.num_known_chars :]
        self.num_known_chars -= len(text) - len(unknown)
        return unknown

    def has_news(self) -> None:
        """Wait for credit with what is not sent yet, unless it waits already or its request is answered as a whole."""
        if self.idle:
            self.idle = False
            self.client.ready.append(self)

    def take_prompt_parts(self, max_parts: int, max_words: int) -> list[PromptLogprobs]:
        """The next log-probabilities of the prompt: at most `max_parts`, of 4 * `max_words` bytes before the last."""
        num_words = num_parts = 0
        for part in self.prompt_parts[:max_parts]:
            if num_words >= max_words:
                break
            num_words += words_of(part)
            num_parts += 1
        taken, self.prompt_parts = self.prompt_parts[:num_parts], self.prompt_parts[num_parts:]
        return taken

    def take_tokens(self, limit: int) -> tuple[list[int], bool]:
        """At most `limit` of the unsent tokens, and whether the end goes with them. If there are more, it stays ready.

        Tokens come after all log-probabilities of the prompt.
        """
        new = self.token_ids
        limit = 0 if self.prompt_parts else limit
        self.token_ids = new[limit:]
        if self.token_ids or self.prompt_parts:
            self.client.ready.append(self)
            return new[:limit], False
        return new, self.end is not None

    def take_text(self, new: list[int], is_last: bool) -> str:
        """The text of an item; `new` are its tokens."""
        text, self.text = self.text, ""
        if self.matcher is None:
            visible = new[:-1] if is_last and self.hides_last else new
            if visible:
                text += self.decoder.push(visible)
            if is_last:
                text += self.decoder.flush()
        return self._unknown(text)

    def look_for_stop(self, matcher: StopMatcher, token_id: int, *, is_last: bool) -> bool:
        """Decode the newest token at once. Returns whether a stop string ends the text with it."""
        may_match = self._may_stop()
        if self.hides_last:
            self.text += matcher.feed(self.decoder.flush(), may_match=may_match)
            if not matcher.matched:
                self.text += matcher.feed_hidden(matcher.names.get(token_id, ""), may_match=may_match)
            return bool(matcher.matched)
        text = self.decoder.push([token_id])
        if matcher.marks:
            text += matcher.marks.get(token_id, "")
        self.text += matcher.feed(text, may_match=may_match)
        if is_last and not matcher.matched:
            self.finish_text()
        return bool(matcher.matched)

    def finish_text(self) -> None:
        """Decode the end of a text that is decoded eagerly; a stop string may be complete only here."""
        matcher = self.matcher
        if matcher is not None:
            self.text += matcher.feed(self.decoder.flush(), may_match=self._may_stop()) + matcher.finish()

    def _may_stop(self) -> bool:
        """Whether a stop string that is complete now ends the text: with the first `min_tokens` tokens, none does."""
        return self.num_sent + len(self.token_ids) > self.min_tokens

    def take_final(self) -> FinalOutput:
        """Also counts the sequence as ended in its request, so call this once, on delivery."""
        request, end = self.request, self.end
        assert end is not None, f"sequence {self.key} has not ended"
        request.num_open -= 1
        reason: FinishReason = end.finish_reason
        return FinalOutput(
            reason,
            request.num_prompt_tokens,
            self.num_sent,
            end.error_code,
            end.error_message,
            request.num_cached_tokens,
            request.num_open,
            end.retry_after_s,
            self._times(),
            stop_string=self.matcher.matched if self.matcher is not None and reason == "stop" else "",
            suspected=end.suspected,
        )

    def _times(self) -> RequestTimes:
        return RequestTimes(
            self.request.arrived_ns,
            self.request.tokenized_ns or None,
            self.admitted_ns or None,
            self.first_token_ns or None,
            self.last_token_ns or None,
        )


class _NoDecoder:
    """The decoder of a sequence that cannot be decoded: its tokens have no text."""

    def push(self, token_ids: list[int]) -> str:
        return ""

    def flush(self) -> str:
        return ""


NO_DECODER = _NoDecoder()
