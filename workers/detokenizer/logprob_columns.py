"""Keeps the log-probabilities of tokens that are not sent yet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ipc.messages import Opened, PromptLogprobs, StepLogprobs, TokenLogprobs


class LogprobColumns:
    """Log-probabilities of one sequence's unsent tokens, with the alternatives and tokens that it asked for."""

    __slots__ = ("_extra_ids", "_extra_logprobs", "_logprobs", "_num_extra", "_num_top", "_top_ids", "_top_logprobs")

    def __init__(self, num_top: int, extra_ids: Sequence[int] = ()) -> None:
        self._num_top = num_top
        self._num_extra = len(extra_ids)
        self._extra_ids = np.array(extra_ids, "<i4").tobytes()
        self._logprobs = bytearray()
        self._top_ids = bytearray()
        self._top_logprobs = bytearray()
        self._extra_logprobs = bytearray()

    @classmethod
    def of(cls, opened: Opened) -> LogprobColumns | None:
        """Empty columns as a request wants them; None: it wants none."""
        return None if opened.num_logprobs is None else cls(opened.num_logprobs, opened.logprob_token_ids)

    @property
    def words_per_token(self) -> int:
        """Size of one token's log-probabilities, in units of 4 bytes."""
        return 1 + 2 * self._num_top + self._num_extra

    def append(self, step: StepLogprobs, index: int) -> None:
        """Append the row of the step's token `index`. The step is at least as wide as this sequence needs."""
        assert step.num_top >= self._num_top, f"{step.num_top} alternatives, {self._num_top} wanted"
        assert step.num_extra >= self._num_extra, f"{step.num_extra} more tokens, {self._num_extra} wanted"
        self._logprobs += step.logprobs[4 * index : 4 * index + 4]
        self._top_ids += _row(step.top_ids, index, step.num_top, self._num_top)
        self._top_logprobs += _row(step.top_logprobs, index, step.num_top, self._num_top)
        self._extra_logprobs += _row(step.extra_logprobs, index, step.num_extra, self._num_extra)

    def take(self, num_tokens: int) -> TokenLogprobs:
        return TokenLogprobs(
            self._num_top,
            _cut(self._logprobs, 4 * num_tokens),
            _cut(self._top_ids, 4 * num_tokens * self._num_top),
            _cut(self._top_logprobs, 4 * num_tokens * self._num_top),
            self._extra_ids,
            _cut(self._extra_logprobs, 4 * num_tokens * self._num_extra),
        )


def words_of(part: PromptLogprobs) -> int:
    """Size of the log-probabilities of a prompt's tokens, in units of 4 bytes."""
    num_tokens = len(part.token_ids) // 4
    return num_tokens * (2 + 2 * part.columns.num_top)


def _row(column: bytes, index: int, width: int, wanted: int) -> bytes:
    start = 4 * width * index
    return column[start : start + 4 * wanted]


def _cut(column: bytearray, num_bytes: int) -> bytes:
    part = bytes(column[:num_bytes])
    del column[:num_bytes]
    return part
