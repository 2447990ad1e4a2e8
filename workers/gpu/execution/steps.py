"""A step on its way through the executor, and the buffers and events that it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ipc.records import StepRecord
from workers.gpu.execution.accesses import Copied


@dataclass(frozen=True)
class StepBuffers:
    """The buffers and events that each of D steps under way has for itself."""

    staging: Copied  # a step record
    outputs: Copied  # a result record
    inputs_ready: Any
    step_done: Any
    outputs_done: Any


@dataclass(frozen=True)
class OwedMasks:
    """The masks that a step needs of one grammar worker: the record that brings them, and their rows in the buffer."""

    worker: int
    ticket: int  # of the worker's mask ring
    start: int
    num_masks: int


@dataclass(slots=True)
class Submitted:
    """A step whose record has been taken. When `outputs_done` fires, its result record is complete, except for the
    times that `publish` writes. It does not change once its second half is enqueued."""

    ticket: int
    record: StepRecord  # until `publish`
    received_at_ns: int
    num_seqs: int
    outputs_done: Any
    bucket: tuple[int, int]  # sequences and tokens that it runs as
    owed: tuple[OwedMasks, ...] = ()
    begun_at_ns: int = 0  # when its first half was enqueued; only of steps that owe masks
    enqueued_at_ns: int = 0  # when it was enqueued as a whole
    mask_wait_ns: int = 0  # from there, or from the result before it, to its second half
    closed: tuple[OwedMasks, ...] = ()  # those of `owed` that did not come in time, or not for this step

    @property
    def num_closed_masks(self) -> int:
        return sum(part.num_masks for part in self.closed)
