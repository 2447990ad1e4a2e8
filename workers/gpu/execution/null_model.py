"""A model that costs nothing: made-up tokens, so that only the host's work is left to measure.

Everything around it is real: rings, copies, batch builder, sampler, events.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch

from ipc.records import StepShape
from workers.gpu.execution.row_state import RowState
from workers.gpu.execution.step_batch import StepBatch

_VOCAB_SIZE: Final = 64
_MULTIPLIER: Final = 2_654_435_761  # 2**32 over the golden ratio: neighbours land far apart


class NullModel:
    """Each sequence's next token is a hash of its last token and position. Each step calls `spend`."""

    vocab_size = _VOCAB_SIZE
    logits_dtype = torch.float32
    row_states: Sequence[RowState] = ()

    def __init__(self, shape: StepShape, device: torch.device, spend: Callable[[], None]) -> None:
        self._spend = spend
        self._likeliest = torch.ones(shape.max_num_seqs, 1, device=device)

    def logits(self, batch: StepBatch, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """[S, 64] float32, in `out` if that is given: 1 for the made-up token, 0 for all others."""
        self._spend()
        last = batch.input_ids.index_select(0, batch.logits_index)
        tokens = ((last + batch.seq_lens) * _MULTIPLIER >> 16) & (_VOCAB_SIZE - 1)
        logits = self._likeliest.new_empty(batch.num_seqs, _VOCAB_SIZE) if out is None else out
        return logits.zero_().scatter_(1, tokens[:, None], self._likeliest[: batch.num_seqs])
