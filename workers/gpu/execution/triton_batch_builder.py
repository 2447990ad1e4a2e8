"""What `BatchBuilder` does in torch for every step, as two Triton kernels for CUDA: a step has no time for dozens.

They write exactly what the torch code writes. No program reads the output of another program, so each program that lays
out tokens adds up the sequences' lengths itself.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from workers.gpu.execution.row_tables import RowTables
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.execution.tensor_views import StepTensors

_BLOCK_APPENDS: Final = 256
_MIN_BLOCK_S: Final = 32  # a smaller block would take as long, and each size is one more kernel to compile
_MAX_BLOCK_S: Final = 512
_MAX_BLOCK_T: Final = 128
_MAX_PAIRS: Final = 4096  # pairs of token and sequence that a program compares: 32 per thread


def append(tables: RowTables, step: StepTensors) -> None:
    """Add the step's entries to the block tables. `step` is the device's record."""
    max_appends = step.append_row.shape[0]
    _append[(triton.cdiv(max_appends, _BLOCK_APPENDS),)](
        tables.block_table,
        step.num_appends,
        step.append_row,
        step.append_index,
        step.append_block,
        tables.block_table.shape[1],
        BLOCK=_BLOCK_APPENDS,
        num_warps=4,
    )


def fill(batch: StepBatch, tables: RowTables, step: StepTensors) -> None:
    """Lay out a step's tokens: fill the batch's own tensors. Run `append` first.

    `step` is the device's record. Its sequences and tokens must fit the batch.
    """
    num_seqs, num_tokens = batch.num_seqs, batch.num_tokens
    block_s = min(max(triton.next_power_of_2(num_seqs), _MIN_BLOCK_S), _MAX_BLOCK_S)
    block_t = min(_MAX_PAIRS // block_s, _MAX_BLOCK_T)
    _fill[(triton.cdiv(num_tokens, block_t),)](
        batch.input_ids,
        batch.positions,
        batch.slot_mapping,
        batch.cu_seqlens,
        batch.seq_lens,
        batch.seq_row,
        batch.logits_index,
        step.num_seqs,
        step.seq_row,
        step.seq_num_tokens,
        tables.num_computed_tokens,
        tables.token_ids,
        tables.block_table,
        num_seqs,
        num_tokens,
        tables.token_ids.shape[1],
        tables.block_table.shape[1],
        tables.trash_row,
        tables.trash_block,
        BLOCK_SIZE=batch.block_size,
        PARTS=triton.cdiv(num_seqs, block_s),
        BLOCK_S=block_s,
        BLOCK_T=block_t,
        num_warps=4,
    )


@triton.jit
def _append(
    block_table: tl.tensor,
    num_appends: tl.tensor,
    append_row: tl.tensor,
    append_index: tl.tensor,
    append_block: tl.tensor,
    max_blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_real = entry < tl.load(num_appends)
    row = tl.load(append_row + entry, mask=is_real, other=0).to(tl.int64)
    index = tl.load(append_index + entry, mask=is_real, other=0)
    block = tl.load(append_block + entry, mask=is_real, other=0)
    tl.store(block_table + row * max_blocks + index, block, mask=is_real)


# These numbers differ among buckets and machines. Specialization would compile more kernels, none of them faster.
@triton.jit(do_not_specialize=["num_seqs", "num_tokens", "max_model_len", "max_blocks", "trash_row", "trash_block"])
def _fill(
    input_ids: tl.tensor,
    positions: tl.tensor,
    slot_mapping: tl.tensor,
    cu_seqlens: tl.tensor,
    seq_lens: tl.tensor,
    seq_row: tl.tensor,
    logits_index: tl.tensor,
    step_num_seqs: tl.tensor,
    step_seq_row: tl.tensor,
    step_seq_num_tokens: tl.tensor,
    num_computed_tokens: tl.tensor,
    token_ids: tl.tensor,
    block_table: tl.tensor,
    num_seqs: tl.tensor,
    num_tokens: tl.tensor,
    max_model_len: tl.tensor,
    max_blocks: tl.tensor,
    trash_row: tl.tensor,
    trash_block: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    num_real = tl.load(step_num_seqs)
    sequence = tl.zeros([BLOCK_T], tl.int32)  # of each token: how many end in front of it
    start = tl.zeros([BLOCK_T], tl.int32)  # of that sequence: where the last of those ends
    total = 0
    for part in range(PARTS):
        index = part * BLOCK_S + tl.arange(0, BLOCK_S)
        is_real = index < num_real
        length = tl.load(step_seq_num_tokens + index, mask=is_real, other=0)
        end = total + tl.cumsum(length, 0)
        total += tl.sum(length, 0)
        is_before = end[None, :] <= token[:, None]
        sequence += tl.sum(is_before.to(tl.int32), 1)
        start = tl.maximum(start, tl.max(tl.where(is_before, end[None, :], 0), 1))
        if tl.program_id(0) == 0:
            row = tl.load(step_seq_row + index, mask=is_real, other=trash_row)
            computed = tl.load(num_computed_tokens + row, mask=is_real, other=0)
            is_mine = index < num_seqs
            tl.store(seq_row + index, row, mask=is_mine)
            tl.store(cu_seqlens + 1 + index, end, mask=is_mine)
            tl.store(seq_lens + index, computed + length, mask=is_mine)
            tl.store(logits_index + index, tl.where(is_real, end - 1, 0), mask=is_mine)

    exists = token < total
    row = tl.load(step_seq_row + sequence, mask=exists, other=trash_row).to(tl.int64)
    computed = tl.load(num_computed_tokens + row, mask=exists, other=0)
    position = tl.where(exists, computed + token - start, 0)
    token_id = tl.load(token_ids + row * max_model_len + position, mask=exists, other=0)
    block = tl.load(block_table + row * max_blocks + position // BLOCK_SIZE, mask=exists, other=trash_block)
    is_mine = token < num_tokens
    tl.store(input_ids + token, token_id, mask=is_mine)
    tl.store(positions + token, position, mask=is_mine)
    tl.store(slot_mapping + token, block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE, mask=is_mine)
