"""Which device memory each kind of launch reads and writes. Only a device that checks the order of accesses uses it.

Row states and columns need no line here: they are in `RowTables.columns` and `RowTables.model_states`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ipc.record_layout import HostArray
from workers.gpu.device.base import Accesses
from workers.gpu.execution.row_tables import RowTables

Copied = tuple[torch.Tensor, ...]  # of a record, [n] uint8: the part that every step needs, longer ones, and all of it


@dataclass(frozen=True)
class LaunchAccesses:
    """`rows` are those of the step, or of its admissions. `token_ids` is named row by row: uploads write other rows
    meanwhile."""

    tables: RowTables
    record: Copied
    batch: torch.Tensor
    logits: torch.Tensor
    masks: torch.Tensor
    adjusted: torch.Tensor
    output: Copied

    def admit(self, rows: HostArray) -> Accesses:
        ids = self._ids(rows) if self.tables.rebuilds else []
        return [self.record[-1], *ids], [self.tables.columns, *self.tables.model_states.values()]

    def append(self) -> Accesses:
        return [self.record[-1]], [self.tables.columns]

    def model(self, rows: HostArray) -> Accesses:
        read = [self.record[0], self.tables.columns, *self._ids(rows)]
        return read, [self.batch, self.logits, *self.tables.model_states.values()]

    def prompt_logprobs(self, rows: HostArray) -> Accesses:
        """Of the model, in a step that computes log-probabilities of prompts too."""
        read, written = self.model(rows)
        return [*read, self.record[-1]], [*written, self.output[-1]]

    def adjust(self, rows: HostArray) -> Accesses:
        read = [self.record[0], self.batch, self.logits, self.masks, self.tables.columns, *self._ids(rows)]
        return [*read, *self._long_values(rows)], [self.adjusted]

    def sampler(self, rows: HostArray) -> Accesses:
        read = [self.record[0], self.batch, self.logits, self.adjusted, *self._long_values(rows)]
        return read, [self.tables.columns, self.output[-1], *self._ids(rows)]

    def warm_up(self) -> Accesses:
        """Of everything above, on padding."""
        tables = self.tables
        written = [tables.columns, tables.token_ids, *tables.model_states.values()]
        return [self.record[-1], self.masks], [*written, self.batch, self.logits, self.adjusted, self.output[-1]]

    def _long_values(self, rows: HostArray) -> list[torch.Tensor]:
        """Named row by row, too."""
        columns = vars(self.tables.long_values).values()
        return [column[row] for column in columns for row in (*rows.tolist(), self.tables.trash_row)]

    def _ids(self, rows: HostArray) -> list[torch.Tensor]:
        return [self.tables.token_ids[row] for row in (*rows.tolist(), self.tables.trash_row)]
