"""The inputs of one step's model call, as tensors on the device.

`BatchBuilder` fills them from a step record and the row tables; the model runner and the attention backends read them.
Buffers are fixed: all steps of the same bucket have the same addresses and sizes, so that the model call can be
captured once and replayed. S and T are the bucket's sizes. Padding beyond the step's real sequences and tokens points
at the trash row and the trash block; a padding sequence has no tokens and length 0.

Where steps are padded, a batch of one token is a batch of two, whose second is always padding: torch.compile would else
compile the layers once more for one token. `backed_size_oblivious` prevents that, but makes torch 2.11's inductor fail
on a GPU: it no longer knows that the layers' first dimension is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch

from ipc.record_layout import Layout, int32, int64
from ipc.records import StepShape
from workers.gpu.execution.tensor_views import tensor_view


@dataclass(frozen=True)
class StepBatch:
    """One step. The trash row is the last row of `block_table`, all of it the trash block, the cache's last."""

    input_ids: Annotated[torch.Tensor, int64("num_tokens")]  # [T]; 0 = padding
    positions: Annotated[torch.Tensor, int64("num_tokens")]  # [T]; 0 = padding
    # [T], kv_slot = block * block_size + offset; in the trash block = padding
    slot_mapping: Annotated[torch.Tensor, int64("num_tokens")]
    # [S + 1], first token of each sequence in the packed batch
    cu_seqlens: Annotated[torch.Tensor, int32("num_bounds")]
    seq_lens: Annotated[torch.Tensor, int32("num_seqs")]  # [S], KV length of each sequence after this step; 0 = padding
    seq_row: Annotated[torch.Tensor, int32("num_seqs")]  # [S], index into `block_table` and `row_states`
    # [S], each sequence's last token in the packed batch; 0 = padding
    logits_index: Annotated[torch.Tensor, int64("num_seqs")]
    block_table: torch.Tensor  # [max_num_seqs + 1, max_blocks_per_seq] int32, of all rows; unused entries: trash block
    block_size: int  # tokens per KV block
    is_one_token: bool = False  # if so, products may leave out the second row
    # The model's own states by name, [max_num_seqs + 1, ...], of all rows
    row_states: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_seqs(self) -> int:
        """S, with padding."""
        return self.seq_row.shape[0]

    @property
    def num_tokens(self) -> int:
        """T, with padding."""
        return self.input_ids.shape[0]


@dataclass(frozen=True)
class BatchSize:
    """The bounds that StepBatch names."""

    num_seqs: int
    num_tokens: int

    @property
    def num_bounds(self) -> int:
        return self.num_seqs + 1

    def layout(self) -> Layout[StepBatch]:
        return Layout.of(StepBatch, "batch", self)


class BatchBuffers:
    """The memory of all batches, sized for the largest step. Batches share it: steps run one after the other.

    Args:
        zeros: makes the memory, [num_bytes] uint8.
        block_table, row_states: those of all batches.
        pads_one_token: whether a batch of one token gets a second one, if that fits.
    """

    def __init__(
        self,
        shape: StepShape,
        zeros: Callable[[int], torch.Tensor],
        block_table: torch.Tensor,
        row_states: Mapping[str, torch.Tensor],
        *,
        pads_one_token: bool = False,
    ) -> None:
        self._pads_one_token = pads_one_token and min(shape.max_num_seqs, shape.max_num_batched_tokens) > 1
        layout = BatchSize(shape.max_num_seqs, shape.max_num_batched_tokens).layout()
        self.memory = zeros(layout.num_bytes)
        self._fields = {field.name: tensor_view(field, self.memory) for field in layout.fields.values()}
        self._block_table = block_table
        self._block_size = shape.block_size
        self._row_states = row_states

    def batch(self, num_seqs: int, num_tokens: int) -> StepBatch:
        """The batch of bucket (S, T): views of the memory."""
        is_one_token = self._pads_one_token and (num_seqs, num_tokens) == (1, 1)
        if is_one_token:
            num_seqs = num_tokens = 2
        sizes = BatchSize(num_seqs, num_tokens).layout().fields
        tensors = {name: tensor[: sizes[name].shape[0]] for name, tensor in self._fields.items()}
        return StepBatch(
            **tensors, block_table=self._block_table, block_size=self._block_size, is_one_token=is_one_token,
            row_states=self._row_states,
        )  # fmt: skip
