"""The parts of step and result records that are copied: only steps that use the rest of a record copy it."""

from __future__ import annotations

from typing import Any

import torch

from ipc.record_layout import Layout
from ipc.records import StepRecord
from workers.gpu.execution.accesses import Copied


def step_parts(layout: Layout[Any], memory: torch.Tensor) -> Copied:
    """The parts of a step record [num_bytes] uint8 that a step may need: without admissions, with them, and whole."""
    return _prefixes(layout, memory, "admit_row", "prompt_logprob_index")


def result_parts(layout: Layout[Any], memory: torch.Tensor) -> Copied:
    """The parts of a result record [num_bytes] uint8 that a step may fill: without log-probabilities, with those of its
    sampled tokens, and whole."""
    return _prefixes(layout, memory, "logprob", "prompt_logprob")


def needed_parts(record: StepRecord) -> tuple[int, int]:
    """Which of the `step_parts` of its record a step needs, and which of the `result_parts` it fills."""
    if record.num_prompt_logprobs[0]:
        return -1, -1
    return int(record.num_admissions[0] > 0), int(record.want_logprobs[0] > 0)


def _prefixes(layout: Layout[Any], memory: torch.Tensor, *fields: str) -> Copied:
    """What lies in front of each of these fields, and all of it."""
    return (*(memory[: layout.fields[field].offset] for field in fields), memory)
