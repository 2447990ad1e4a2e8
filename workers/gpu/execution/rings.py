"""The GPU process's rings, and their records as the device copies them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ipc.mask_records import MaskRecord
from ipc.records import PromptRecord, ResultRecord, StepRecord
from ipc.ring import Ring
from workers.gpu.device.base import Device


@dataclass(frozen=True)
class GpuRings:
    """The GPU process's view of its rings.

    `prompts[0]` is the scheduler's upload ring, the others are the tokenizers'. `masks[w]` is grammar worker w's.
    """

    step: Ring[StepRecord]
    result: Ring[ResultRecord]
    prompts: Sequence[Ring[PromptRecord]]
    masks: Sequence[Ring[MaskRecord]] = ()


def device_records(device: Device[Any, Any], ring: Ring[Any]) -> list[torch.Tensor]:
    """Each ring slot's record as [layout.num_bytes] uint8, for the device's copies. Page-locks the ring."""
    segment = device.register_host(ring.name, ring.buffer)
    return [segment[offset : offset + ring.layout.num_bytes] for offset in ring.record_offsets]
