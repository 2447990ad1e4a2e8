"""Announces steps that keep the CPU busy for long.

On the CPU a step runs on the thread that also answers the launcher. So the launcher is told before a step that may take
longer than a hang would, and again when it is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch

from workers.gpu.execution.model_runner import ModelRunner
from workers.gpu.execution.row_state import RowState
from workers.gpu.execution.step_batch import StepBatch

MARGIN: Final = 4.0  # a step may take so much longer than the steps before it: longer contexts, other programs
MAX_STEP_S: Final = 600.0  # of a step while little is known
_SHORT_S: Final = 2.0  # steps that surely take less are not announced


class AnnouncedRunner:
    """A model on the CPU. `say_busy` tells the launcher for how many seconds the process may not answer; 0 = it answers
    again."""

    def __init__(
        self, runner: ModelRunner, say_busy: Callable[[float], None], clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self.vocab_size = runner.vocab_size
        self.logits_dtype = runner.logits_dtype
        self._runner = runner
        self._say_busy = say_busy
        self._clock_s = clock_s
        self._longest_s: dict[int, float] = {}  # of the steps of about so many tokens, by their number of bits

    @property
    def row_states(self) -> Sequence[RowState]:
        return self._runner.row_states

    def logits(self, batch: StepBatch, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """See ModelRunner."""
        with self._announced(batch.num_tokens):
            return self._runner.logits(batch, out=out)

    def prompt_logits(
        self, batch: StepBatch, index: torch.Tensor, max_rows: int, *, out: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        """See ModelRunner."""
        with self._announced(batch.num_tokens):
            yield from self._runner.prompt_logits(batch, index, max_rows, out=out)

    @contextmanager
    def _announced(self, num_tokens: int) -> Iterator[None]:
        expected_s = self._expected_s(num_tokens)
        if expected_s > _SHORT_S:
            self._say_busy(expected_s)
        begun_s = self._clock_s()
        yield
        size = num_tokens.bit_length()
        self._longest_s[size] = max(self._longest_s.get(size, 0.0), self._clock_s() - begun_s)
        if expected_s > _SHORT_S:
            self._say_busy(0.0)

    def _expected_s(self, num_tokens: int) -> float:
        """The longest step of about so many tokens. If there was none, what steps of other sizes say at most: n times
        the tokens take n times as long."""
        size = num_tokens.bit_length()
        if size in self._longest_s:
            return self._longest_s[size] * MARGIN
        known = ((1 << other - 1, longest_s) for other, longest_s in self._longest_s.items())
        expected_s = (longest_s * max(1.0, num_tokens / least) * MARGIN for least, longest_s in known)
        return min(MAX_STEP_S, max(expected_s, default=MAX_STEP_S))
