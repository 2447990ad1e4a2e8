"""Turns a step record into a batch, on the device: applies what it changes, then lays out its tokens.

Everything here can be captured in a graph: the record is read at one address, sizes come from the bucket, and counts
are compared on the device, never looked at on the host. What lies beyond a count is sent to the trash row.
"""

from __future__ import annotations

from typing import Any

import torch

from ipc.layout import Layout
from workers.gpu.batch import StepBatch
from workers.gpu.device.base import Device
from workers.gpu.records import views
from workers.gpu.tables import RowTables

_ADMITTED_COLUMNS = ("max_len", "temperature", "top_k", "top_p", "min_p", "seed", "end_ids")


class Prepare:
    """The fixed buffers of every batch and the work that fills them. `step` are the views of the device's record."""

    def __init__(self, device: Device[Any, Any], tables: RowTables, step: Any) -> None:
        shape = tables.shape
        num_seqs, num_tokens = shape.max_num_seqs, shape.max_num_batched_tokens
        self._tables = tables
        self._step = step
        layout = Layout("batch", [
            ("input_ids", "<i8", (num_tokens,)),
            ("positions", "<i8", (num_tokens,)),
            ("slot_mapping", "<i8", (num_tokens,)),
            ("cu_seqlens", "<i4", (num_seqs + 1,)),
            ("seq_lens", "<i4", (num_seqs,)),
            ("seq_row", "<i4", (num_seqs,)),
            ("logits_index", "<i8", (num_seqs,)),
        ])  # fmt: skip
        self.buffers = device.zeros("batch", (layout.num_bytes,), torch.uint8)
        self._batch = views(layout, self.buffers)
        arange = torch.arange(max(num_seqs, num_tokens, shape.max_appends), device=device.torch_device)
        self._arange = arange
        self._arange32 = arange.to(torch.int32)

    def batch(self, num_seqs: int, num_tokens: int) -> StepBatch:
        """The batch of bucket (S, T): views of the fixed buffers, to be filled by `fill`."""
        buffers = self._batch
        return StepBatch(
            input_ids=buffers.input_ids[:num_tokens],
            positions=buffers.positions[:num_tokens],
            slot_mapping=buffers.slot_mapping[:num_tokens],
            cu_seqlens=buffers.cu_seqlens[: num_seqs + 1],
            seq_lens=buffers.seq_lens[:num_seqs],
            seq_row=buffers.seq_row[:num_seqs],
            logits_index=buffers.logits_index[:num_seqs],
            block_table=self._tables.block_table,
            block_size=self._tables.shape.block_size,
        )

    def admit(self) -> None:
        """Give the admitted rows their columns and an empty block table. Their ids are uploaded elsewhere."""
        tables, step = self._tables, self._step
        real = self._arange32[: step.admit_row.shape[0]] < step.num_admissions
        rows = torch.where(real, step.admit_row, tables.trash_row).to(torch.int64)
        tables.num_computed_tokens.index_copy_(0, rows, step.admit_num_computed)
        for column in _ADMITTED_COLUMNS:
            getattr(tables, column).index_copy_(0, rows, getattr(step, f"admit_{column}"))
        tables.block_table.index_fill_(0, rows, tables.trash_block)

    def append(self) -> None:
        """Add the step's entries to the block tables."""
        tables, step = self._tables, self._step
        real = self._arange32[: step.append_row.shape[0]] < step.num_appends
        rows = torch.where(real, step.append_row, tables.trash_row)
        indices = torch.where(real, step.append_index, 0)
        blocks = torch.where(real, step.append_block, tables.trash_block)
        tables.block_table.index_put_((rows, indices), blocks)

    def fill(self, batch: StepBatch) -> None:
        """Lay out the step's tokens: sequence after sequence, each from where its row stands."""
        tables, step = self._tables, self._step
        num_seqs, num_tokens = batch.num_seqs, batch.num_tokens

        real = self._arange32[:num_seqs] < step.num_seqs  # [S] bool
        batch.seq_row.copy_(torch.where(real, step.seq_row[:num_seqs], tables.trash_row))
        lengths = step.seq_num_tokens[:num_seqs] * real  # [S] int32
        cumulative = batch.cu_seqlens[1:]  # its first entry, 0, is never written
        torch.cumsum(lengths, 0, dtype=torch.int32, out=cumulative)
        computed = tables.num_computed_tokens.index_select(0, batch.seq_row)
        torch.mul(computed + lengths, real, out=batch.seq_lens)
        torch.sub(cumulative, 1, out=batch.logits_index)
        batch.logits_index.mul_(real)  # a padding sequence takes the logits of the first token

        tokens = self._arange[:num_tokens]
        sequence = torch.searchsorted(cumulative, tokens, right=True).clamp_(max=num_seqs - 1)  # [T] int64
        real = tokens < cumulative[-1]  # [T] bool
        first_position = computed - batch.cu_seqlens[:-1]  # [S], where token 0 of the batch would lie in each sequence
        torch.add(tokens, first_position.index_select(0, sequence), out=batch.positions)
        batch.positions.mul_(real)
        rows = batch.seq_row.index_select(0, sequence).to(torch.int64)  # [T]
        ids = tables.token_ids.view(-1).take(rows * tables.token_ids.shape[1] + batch.positions)
        torch.mul(ids, real, out=batch.input_ids)
        index = torch.div(batch.positions, batch.block_size, rounding_mode="floor")
        blocks = tables.block_table.view(-1).take(rows * tables.block_table.shape[1] + index)
        blocks = torch.where(real, blocks, tables.trash_block)
        torch.remainder(batch.positions, batch.block_size, out=batch.slot_mapping)
        batch.slot_mapping.add_(blocks.to(torch.int64), alpha=batch.block_size)
