"""Turns a step record into a batch, on the device: applies what it changes, then lays out its tokens.

Everything here can be captured in a graph: the record is read at one address, sizes come from the bucket, and counts
are compared on the device, never looked at on the host. What lies beyond a count is sent to the trash row.

The torch code here defines the result, and runs on the CPU. On CUDA the kernels of `triton_batch_builder.py` do what
every step needs; admissions are rare and use torch there, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch

from workers.gpu.device.base import Device
from workers.gpu.execution.row_tables import RowTables
from workers.gpu.execution.step_batch import BatchBuffers, StepBatch
from workers.gpu.execution.tensor_views import StepTensors


class BatchBuilder:
    """The fixed buffers of every batch and the work that fills them. `step` is the device's step record.
    `pads_one_token`: see BatchBuffers."""

    def __init__(
        self, device: Device[Any, Any], tables: RowTables, step: StepTensors, *, pads_one_token: bool = False
    ) -> None:
        shape = tables.shape
        num_seqs, num_tokens = shape.max_num_seqs, shape.max_num_batched_tokens
        self._tables = tables
        self._step = step
        self._batches = BatchBuffers(
            shape,
            lambda num_bytes: device.zeros("batch", (num_bytes,), torch.uint8),
            tables.block_table,
            tables.model_states,
            pads_one_token=pads_one_token,
        )
        self.buffers = self._batches.memory  # [num_bytes] uint8
        arange = torch.arange(max(num_seqs, num_tokens, shape.max_appends), device=device.torch_device)
        self._arange = arange
        self._arange32 = arange.to(torch.int32)
        self._kernels: ModuleType | None = None
        if self.buffers.is_cuda:
            from workers.gpu.execution import triton_batch_builder  # needs triton, which only CUDA needs

            self._kernels = triton_batch_builder

    def batch(self, num_seqs: int, num_tokens: int) -> StepBatch:
        """The batch of bucket (S, T): views of the fixed buffers, to be filled by a `filler`."""
        return self._batches.batch(num_seqs, num_tokens)

    def admit(self) -> None:
        """Give the admitted rows their columns and an empty block table. Copies on copy-in bring their ids."""
        tables, step = self._tables, self._step
        real = self._arange32[: step.admit.row.shape[0]] < step.num_admissions
        tables.admit(torch.where(real, step.admit.row, tables.trash_row_tensor).to(torch.int64), step)

    def append(self) -> None:
        """Add the step's entries to the block tables."""
        tables, step = self._tables, self._step
        if self._kernels is not None:
            self._kernels.append(tables, step)
            return
        real = self._arange32[: step.append_row.shape[0]] < step.num_appends
        rows = torch.where(real, step.append_row, tables.trash_row_tensor)
        indices = step.append_index * real
        blocks = torch.where(real, step.append_block, tables.trash_block_tensor)
        entries = rows.to(torch.int64) * tables.block_table.shape[1] + indices
        tables.flat_block_table.index_copy_(0, entries, blocks)

    def filler(self, batch: StepBatch) -> Callable[[], None]:
        """The work that lays out a step's tokens: sequence after sequence, each from its row's next token to compute.

        Run `append` first.
        """
        tables, step, block_size = self._tables, self._step, batch.block_size
        if self._kernels is not None:
            return partial(self._kernels.fill, batch, tables, step)
        num_seqs, num_tokens = batch.num_seqs, batch.num_tokens
        max_model_len, max_blocks = tables.token_ids.shape[1], tables.block_table.shape[1]
        sequences, tokens = self._arange32[:num_seqs], self._arange[:num_tokens]
        seq_row, seq_num_tokens = step.seq_row[:num_seqs], step.seq_num_tokens[:num_seqs]
        starts, ends = batch.cu_seqlens[:-1], batch.cu_seqlens[1:]  # starts[0] is 0 and never written
        total = batch.cu_seqlens[-1]

        def fill() -> None:
            real = sequences < step.num_seqs  # [S] bool
            torch.where(real, seq_row, tables.trash_row_tensor, out=batch.seq_row)
            lengths = seq_num_tokens * real  # [S] int32
            torch.cumsum(lengths, 0, dtype=torch.int32, out=ends)
            computed = tables.num_computed_tokens.index_select(0, batch.seq_row)
            torch.mul(computed + lengths, real, out=batch.seq_lens)
            torch.sub(ends, 1, out=batch.logits_index)
            batch.logits_index.mul_(real)  # a padding sequence takes the logits of the first token

            sequence = torch.searchsorted(ends, tokens, right=True).clamp_(max=num_seqs - 1)  # [T] int64
            real = tokens < total  # [T] bool
            first_position = computed - starts  # [S], where the batch's first token would lie in each sequence
            torch.add(tokens, first_position.index_select(0, sequence), out=batch.positions)
            batch.positions.mul_(real)
            rows = batch.seq_row.index_select(0, sequence).to(torch.int64)  # [T]
            ids = tables.flat_token_ids.take(rows * max_model_len + batch.positions)
            torch.mul(ids, real, out=batch.input_ids)
            index = torch.div(batch.positions, block_size, rounding_mode="floor")
            blocks = tables.flat_block_table.take(rows * max_blocks + index)
            blocks = torch.where(real, blocks, tables.trash_block_tensor)
            torch.remainder(batch.positions, block_size, out=batch.slot_mapping)
            batch.slot_mapping.add_(blocks.to(torch.int64), alpha=block_size)

        return fill
