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

import torch

from workers.gpu.execution.tensor_views import StepTensors

# (state [rows, ...], rows [max_admissions] int64, token_ids [rows, max_model_len] int32, step): enqueues work that sets
# the state of the admitted rows. `rows` are these rows in the order of `step.admit`; all further entries are the trash
# row. `token_ids` holds the rows' token ids already. An entry with `admit.length` 0 resumes: its row, ids and states
# are as they were when it was preempted. A graph can capture the work: it depends on no value on the host.
AdmitRows = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, StepTensors], None]


@dataclass(frozen=True)
class Rebuild:
    """Marks a field of RowTables for which an admission does `by`, and does not reset it to its Fill."""

    by: AdmitRows


@dataclass(frozen=True)
class RowState:
    """A state of the model. An admission sets the row's part to `fill`, or calls `rebuild`.

    A preempted row is admitted again when it resumes, and computes its tokens again from `num_computed_tokens` on.
    """

    name: str
    shape: tuple[int, ...]  # of one row's part
    dtype: torch.dtype
    fill: float = 0
    rebuild: AdmitRows | None = None

    def num_bytes(self, num_rows: int) -> int:
        return num_rows * math.prod(self.shape) * self.dtype.itemsize

    def on_admission(self) -> AdmitRows:
        return self.rebuild or reset_to(self.fill)


def reset_to(fill: float) -> AdmitRows:
    """The admission of a state that starts each sequence with the same value."""

    def reset(state: torch.Tensor, rows: torch.Tensor, _: torch.Tensor, __: StepTensors) -> None:
        state.index_fill_(0, rows, fill)

    return reset
