"""Copies what admissions bring in prompt rings to the admitted rows, on copy-in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ipc.records import PROMPT_RECORD_TOKENS, PromptRecord, StepRecord
from ipc.ring import Ring
from workers.gpu.device.base import Device
from workers.gpu.execution.rings import device_records
from workers.gpu.execution.row_tables import RowTables


class Uploads:
    """`rings[0]` is the scheduler's upload ring, the others are the tokenizers'."""

    def __init__(
        self, device: Device[Any, Any], rings: Sequence[Ring[PromptRecord]], tables: RowTables, copy_in: Any
    ) -> None:
        self._device = device
        self._rings = rings
        self._tables = tables
        self._copy_in = copy_in
        self._records = [[r.view(torch.int32) for r in device_records(device, ring)] for ring in rings]

    def enqueue(self, record: StepRecord, admission: int) -> None:
        """Enqueue copies of an admission's ids to its row.

        No step under way reads or writes this row: the scheduler reassigns a row only after its last owner's last step.
        Raises RingError if a prompt record is not published.
        """
        admit = record.admit
        row, length = int(admit.row[admission]), int(admit.length[admission])
        ring_index, ticket = int(admit.ring[admission]), int(admit.ticket[admission])
        for start in range(0, length, PROMPT_RECORD_TOKENS):
            ring = self._rings[ring_index]
            ring.record(ticket)  # raises RingError if it is not published
            end = min(start + PROMPT_RECORD_TOKENS, length)
            source = self._records[ring_index][ticket % ring.num_slots]
            self._device.copy(self._copy_in, self._tables.token_ids[row, start:end], source[: end - start])
            ticket += 1
