"""Calls the model for one step. Owns the prepared model and its KV cache; see ModelRunner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from workers.gpu.attention.backend import AttentionBackend
from workers.gpu.attention.interface import PagedAttention, handling_attention
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.memory.kv_cache import KVCache
from workers.gpu.model.decoder_output import DecoderOutput
from workers.gpu.model.head import replace_head
from workers.gpu.model.probed_model import ProbedModel
from workers.gpu.products.multiply import only_first_row_counts


class PagedModelRunner:
    """A prepared model with its cache. The model sees a step as one sequence of T tokens; only attention separates
    sequences."""

    def __init__(self, model: nn.Module, cache: KVCache, backend: AttentionBackend, facts: ProbedModel) -> None:
        self.vocab_size = facts.vocab_size
        self.logits_dtype = facts.logits_dtype
        self.row_states = facts.row_states
        self._model = model
        self._head = replace_head(model)
        self._decoder_output = DecoderOutput.of(model) if facts.replays_decoder else None
        self._cache = cache
        self._backend = backend

    @torch.inference_mode()
    def logits(self, batch: StepBatch, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return [S, vocab_size] logits_dtype. Row i follows sequence i's last token; rows of padding sequences are
        finite.

        The logits are in `out`, if that is given. Writes the step's K and V into the cache. Enqueues its work on the
        current stream.
        """
        attention = PagedAttention(self._cache, batch, self._backend.begin_step(batch))
        with self._step(attention, batch), self._head_writes_to(out):
            logits = self._forward(batch, batch.logits_index)
        if out is None:
            return logits
        if logits.data_ptr() != out.data_ptr():  # the model processes its head's output further
            out.copy_(logits)
        return out

    @torch.inference_mode()
    def prompt_logits(
        self, batch: StepBatch, index: torch.Tensor, max_rows: int, *, out: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        """Do what `logits` does; then yield the logits at the tokens `index` [N] int64 of the batch, at most `max_rows`
        rows at a time.

        The rows are the model's own, with all that its forward does to its head's output.
        """
        kept = self._decoder_output
        if kept is None:
            attention = PagedAttention(self._cache, batch, self._backend.begin_step(batch))
            with self._step(attention, batch):
                logits = self._forward(batch, torch.cat((batch.logits_index, index)))
            if out is not None:
                out.copy_(logits[: batch.num_seqs])
            yield from torch.split(logits[batch.num_seqs :], max_rows)
            return
        with kept.kept() as outputs:
            self.logits(batch, out=out)
        for part in torch.split(index, max_rows):
            with kept.replayed(outputs):
                logits = self._forward(batch, part)
            yield logits

    def _forward(self, batch: StepBatch, index: torch.Tensor) -> torch.Tensor:
        """The model's logits at these tokens of the batch, [len(index), vocab_size]."""
        output = self._model(
            input_ids=batch.input_ids.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=index,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    @staticmethod
    @contextmanager
    def _step(attention: PagedAttention, batch: StepBatch) -> Iterator[None]:
        with handling_attention(attention), only_first_row_counts(batch.is_one_token):
            yield

    @contextmanager
    def _head_writes_to(self, out: torch.Tensor | None) -> Iterator[None]:
        if self._head is None:
            yield
            return
        self._head.out = out
        try:
            yield
        finally:
            self._head.out = None
