"""Keeps the log-probabilities of tokens that are not sent yet."""

from __future__ import annotations

from typing import Any

from ipc.messages import StepLogprobs, TokenLogprobs


class LogprobColumns:
    """Log-probabilities of one sequence's unsent tokens, with the `num_top` alternatives that it asked for."""

    __slots__ = ("_logprobs", "_num_top", "_top_ids", "_top_logprobs")

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._logprobs = bytearray()
        self._top_ids = bytearray()
        self._top_logprobs = bytearray()

    def append(self, step: StepLogprobs, index: int) -> None:
        """Append the row of the step's token `index`. The step has at least `num_top` alternatives."""
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
