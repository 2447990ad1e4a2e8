"""The inputs of one step's model call, as tensors on the device.

`prepare` (the executor's) fills them from a step record and the row tables; the model runner and the attention
backends read them. Buffers are fixed: every step of the same bucket has the same addresses and sizes, so that the
model call can be captured once and replayed. S and T are the bucket's sizes; padding beyond the step's real sequences
and tokens points at the trash row and the trash block, and a padding sequence has no tokens and length 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepBatch:
    """One step. The trash row is the last row of `block_table`, all of it the trash block, the cache's last."""

    input_ids: torch.Tensor  # [T] int64; 0 = padding
    positions: torch.Tensor  # [T] int64; 0 = padding
    slot_mapping: torch.Tensor  # [T] int64, kv_slot = block * block_size + offset; in the trash block = padding
    cu_seqlens: torch.Tensor  # [S + 1] int32, first token of each sequence in the packed batch
    seq_lens: torch.Tensor  # [S] int32, KV length of each sequence after this step; 0 = padding
    seq_row: torch.Tensor  # [S] int32, index into `block_table`
    logits_index: torch.Tensor  # [S] int64, each sequence's last token in the packed batch; 0 = padding
    block_table: torch.Tensor  # [max_num_seqs + 1, max_blocks_per_seq] int32, of all rows; unused entries: trash block
    block_size: int

    @property
    def num_seqs(self) -> int:
        """S, with padding."""
        return self.seq_row.shape[0]

    @property
    def num_tokens(self) -> int:
        """T, with padding."""
        return self.input_ids.shape[0]
