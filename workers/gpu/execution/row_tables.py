"""The state of every request that holds a row, on the device.

Owns the memory, its layout, and what an admission does to it. `BatchBuilder` adds block-table entries, the sampler
writes tokens and lengths, the model writes its own row states, and uploads from the prompt rings write token ids.
Nothing else writes here, and nothing is read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from ipc.long_values import LongColumns
from ipc.record_layout import DeclaredField, Layout, declared_fields, field_names, int32, make_record, set_fields
from ipc.records import AdmittedColumns, Fill, StepShape
from workers.gpu.device.base import Device
from workers.gpu.execution.row_state import AdmitRows, Rebuild, RowState, reset_to
from workers.gpu.execution.tensor_views import StepTensors, tensor_view

_ADMITTED = field_names(AdmittedColumns)


@dataclass(frozen=True)
class RowBounds:
    """The numbers that a column's declaration may name, as a dimension or as a fill."""

    rows: int  # with the trash row
    max_model_len: int
    max_blocks_per_seq: int
    vocab_size: int
    trash_block: int
    mask_words: int

    @classmethod
    def of(cls, shape: StepShape, num_blocks: int, vocab_size: int) -> RowBounds:
        return cls(
            shape.max_num_seqs + 1, shape.max_model_len, shape.max_blocks_per_seq, vocab_size, num_blocks,
            shape.mask_words,
        )  # fmt: skip


class RowTables(AdmittedColumns[torch.Tensor]):
    """Tables indexed by row. The last row, `trash_row`, belongs to padding: any write to it is harmless.

    Its block table stays all `trash_block`, the KV cache's last block, which belongs to no sequence. The unused entries
    of all other rows hold `trash_block` as well.

    Each annotated field is a column [rows, ...] in `columns`, one allocation. An admission copies the fields of
    AdmittedColumns from the step record; it resets the other columns to their Fill or applies their Rebuild.
    `token_ids` and `long_values` are apart from the columns: the copy stream writes them.
    """

    block_table: Annotated[torch.Tensor, int32("max_blocks_per_seq"), Fill("trash_block")]
    """The KV blocks of the row in order; unused entries hold `trash_block`."""

    def __init__(
        self,
        device: Device[Any, Any],
        shape: StepShape,
        num_blocks: int,
        vocab_size: int,
        model_states: Sequence[RowState] = (),
    ) -> None:
        bounds = RowBounds.of(shape, num_blocks, vocab_size)
        rows = bounds.rows
        self.shape = shape
        self.trash_row = shape.max_num_seqs
        self.trash_block = num_blocks
        self.token_ids = device.zeros("token_ids", (rows, shape.max_model_len), torch.int32)
        # [rows, ...] each. A row holds values of its own in the columns that its `long_columns` names, else others'.
        self.long_memory = device.zeros("long_values", (_long_layout(bounds).num_bytes,), torch.uint8)
        self.long_values = make_record(
            _long_layout(bounds), LongColumns[torch.Tensor], lambda field: tensor_view(field, self.long_memory)
        )
        layout = _layout(type(self), bounds)
        self.columns = device.zeros("row_tables", (layout.num_bytes,), torch.uint8)
        set_fields(self, layout, lambda field: tensor_view(field, self.columns))
        self.model_states = {
            state.name: device.zeros(f"row_state.{state.name}", (rows, *state.shape), state.dtype)
            for state in model_states
        }
        self._on_admission: list[tuple[torch.Tensor, AdmitRows]] = []
        for column in declared_fields(type(self)):
            self._declare(column, bounds)
        for state in model_states:
            self.model_states[state.name].fill_(state.fill)
            self._on_admission.append((self.model_states[state.name], state.on_admission()))
        # Only then is the admitted rows' part of `token_ids` read by an admission.
        self.rebuilds = any(state.rebuild for state in model_states) or any(
            isinstance(mark, Rebuild) for column in declared_fields(type(self)) for mark in column.marks
        )
        self.flat_token_ids = self.token_ids.view(-1)
        self.flat_block_table = self.block_table.view(-1)
        # The same numbers as tensors [] int32: torch would make one of a plain number for each kernel that takes it.
        self.trash_row_tensor = torch.tensor(self.trash_row, dtype=torch.int32, device=device.torch_device)
        self.trash_block_tensor = torch.tensor(self.trash_block, dtype=torch.int32, device=device.torch_device)

    def _declare(self, column: DeclaredField, bounds: RowBounds) -> None:
        """Fill a column, and remember what an admission does to it."""
        name = column.path[0]
        tensor: torch.Tensor = getattr(self, name)
        fill: float = 0
        rule: AdmitRows | None = None
        for mark in column.marks:
            if isinstance(mark, Fill):
                fill = getattr(bounds, mark.value) if isinstance(mark.value, str) else mark.value
            elif isinstance(mark, Rebuild):
                rule = mark.by
        tensor.fill_(fill)
        if name not in _ADMITTED:
            self._on_admission.append((tensor, rule or reset_to(fill)))

    def admit(self, rows: torch.Tensor, step: StepTensors) -> None:
        """Enqueue what admissions do. `rows` [max_admissions] int64 are the admitted rows, then the trash row."""
        for name in _ADMITTED:
            getattr(self, name).index_copy_(0, rows, getattr(step.admit, name))
        for state, apply in self._on_admission:
            apply(state, rows, self.token_ids, step)


def table_bytes(shape: StepShape, vocab_size: int, model_states: Sequence[RowState] = ()) -> int:
    """The bytes that RowTables allocates on the device."""
    bounds = RowBounds.of(shape, 0, vocab_size)
    token_ids = bounds.rows * shape.max_model_len * torch.int32.itemsize
    states = sum(state.num_bytes(bounds.rows) for state in model_states)
    return token_ids + _layout(RowTables, bounds).num_bytes + _long_layout(bounds).num_bytes + states


def _layout(kind: type[RowTables], bounds: RowBounds) -> Layout[RowTables]:
    """One entry of each column for every row."""
    return Layout.of(kind, "row_tables", bounds, each="rows")


def _long_layout(bounds: RowBounds) -> Layout[LongColumns[torch.Tensor]]:
    return Layout.of(LongColumns[torch.Tensor], "long_tables", bounds, each="rows")
