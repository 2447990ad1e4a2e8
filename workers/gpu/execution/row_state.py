"""Row states: what a part of a step keeps on the device for each row, beside the row's token ids and its KV blocks.

A state is declared once, by the code that uses it. From the declaration derive its buffer, what an admission does to
it, the accesses that the simulated device checks, and the bytes that the memory account reserves. There are two places
to declare one:

- A state of the executor or the sampler is a field of `RowTables` (`row_tables.py`).
- A state of the model, whose shapes are known only once the model is loaded, is a `RowState` in the runner's
  `row_states`. The model reads and writes it as `batch.row_states[name]`, by `batch.seq_row`.

The model's and the sampler's work of all steps run in step order on one stream, so a state needs no copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from workers.gpu.execution.row_tables import RowTables

# (state [rows, ...], rows [n] int64, tables): enqueue work that sets the state of these rows from their token ids.
# `rows` are the admitted rows, and any number of times the trash row. May be captured: looks at no value on the host.
RebuildRows = Callable[[torch.Tensor, torch.Tensor, "RowTables"], None]


@dataclass(frozen=True)
class Rebuild:
    """Marks a field of RowTables that an admission computes anew from the row's ids, and does not reset."""

    by: RebuildRows


@dataclass(frozen=True)
class RowState:
    """A state of the model. An admission sets the row's part to `fill`, or calls `rebuild`.

    A preempted row is admitted again when it resumes, and computes its tokens again from `num_computed_tokens` on.
    """

    name: str
    shape: tuple[int, ...]  # of one row's part
    dtype: torch.dtype
    fill: float = 0
    rebuild: RebuildRows | None = None

    def num_bytes(self, num_rows: int) -> int:
        return num_rows * math.prod(self.shape) * self.dtype.itemsize

    def on_admission(self) -> RebuildRows:
        return self.rebuild or reset_to(self.fill)


def reset_to(fill: float) -> RebuildRows:
    """The admission of a state that starts each sequence with the same value."""

    def reset(state: torch.Tensor, rows: torch.Tensor, _: RowTables) -> None:
        state.index_fill_(0, rows, fill)

    return reset
