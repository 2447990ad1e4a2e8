"""A model that costs nothing: made-up tokens, so that only the host's work is left to measure.

Everything around it is real: rings, copies, batch builder, sampler, events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch

from ipc.records import StepShape
from workers.gpu.execution.row_state import RowState
from workers.gpu.execution.step_batch import StepBatch

_MULTIPLIER: Final = 2_654_435_761  # 2**32 over the golden ratio: neighbours land far apart


class NullModel:
    """Each sequence's next token is a hash of its last token and position. Each step calls `spend`."""

    logits_dtype = torch.float32
    row_states: Sequence[RowState] = ()

    def __init__(self, shape: StepShape, device: torch.device, spend: Callable[[], None], vocab_size: int = 64) -> None:
        self.vocab_size = vocab_size
        self._spend = spend
        self._likeliest = torch.ones(shape.max_num_seqs, 1, device=device)

    def logits(self, batch: StepBatch, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """[S, vocab_size] float32, in `out` if that is given: 1 for the made-up token, 0 for all others."""
        self._spend()
        tokens = self._next_tokens(batch.input_ids.index_select(0, batch.logits_index), batch.seq_lens)
        logits = self._likeliest.new_empty(batch.num_seqs, self.vocab_size) if out is None else out
        return logits.zero_().scatter_(1, tokens[:, None], self._likeliest[: batch.num_seqs])

    def prompt_logits(
        self, batch: StepBatch, index: torch.Tensor, max_rows: int, *, out: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        """See ModelRunner."""
        self.logits(batch, out=out)
        for part in torch.split(index, max_rows):
            lengths = batch.positions.index_select(0, part) + 1
            tokens = self._next_tokens(batch.input_ids.index_select(0, part), lengths)
            yield torch.zeros(len(part), self.vocab_size, device=index.device).scatter_(1, tokens[:, None], 1.0)

    def _next_tokens(self, last: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The made-up tokens that follow sequences with these last tokens and lengths."""
        return ((last + lengths) * _MULTIPLIER >> 16) % self.vocab_size
