"""What the executor asks of a model: logits for a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from workers.gpu.execution.row_state import RowState
from workers.gpu.execution.step_batch import StepBatch


class ModelRunner(Protocol):
    """Owns weights and KV cache. Called within `torch.inference_mode()`, on the current stream."""

    vocab_size: int
    logits_dtype: torch.dtype

    @property
    def row_states(self) -> Sequence[RowState]:
        """The states that the model keeps for each row. RowTables makes and resets them; the model reads and writes
        them in `batch.row_states`."""
        ...

    def logits(self, batch: StepBatch, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """[S, vocab_size] logits_dtype: row i follows the last token of sequence i; padding is arbitrary but finite.

        If `out`, of that shape and dtype, is given, the logits are written there, and it is returned. Enqueues work and
        looks at no value on the host, so that it can be captured in a graph.
        """
        ...

    def prompt_logits(
        self, batch: StepBatch, index: torch.Tensor, max_rows: int, *, out: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        """Do what `logits` does; then yield logits at further tokens of the batch, `index` [N] int64, in this order.

        Each piece is [at most max_rows, vocab_size]; the caller uses it before it asks for the next. Never captured in
        a graph.
        """
        ...
