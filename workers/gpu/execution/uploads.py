"""Copies what admissions bring in prompt rings to the admitted rows, on copy-in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ipc.long_values import long_layout, num_words, places
from ipc.records import PROMPT_RECORD_TOKENS, UPLOAD_RING, PromptRecord, StepRecord
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
        self._long_layout = long_layout(tables.shape)
        self._records = [[r.view(torch.int32) for r in device_records(device, ring)] for ring in rings]

    def enqueue(self, record: StepRecord, admission: int) -> None:
        """Enqueue copies of an admission's ids and long values to its row.

        No step under way reads or writes this row: the scheduler reassigns a row only after its last owner's last step.
        Raises RingError if a prompt record is not published.
        """
        admit = record.admit
        row, length = int(admit.row[admission]), int(admit.length[admission])
        self._copy(int(admit.ring[admission]), int(admit.ticket[admission]), 0, self._tables.token_ids[row, :length])
        if long_ticket := int(admit.long_ticket[admission]):
            for field, start in places(self._long_layout, int(admit.long_columns[admission])):
                column = field.of(self._tables.long_values)[row]
                self._copy(UPLOAD_RING, long_ticket, start, column.view(torch.int32))

    def read(self, record: StepRecord, admission: int) -> tuple[bytes, bytes]:
        """An admission's ids and the words of its long values, each empty if it brings none.

        The step's result must not be published yet: the scheduler releases these records when it has applied it.
        """
        admit = record.admit
        ids = self._read(int(admit.ring[admission]), int(admit.ticket[admission]), int(admit.length[admission]))
        if not (long_ticket := int(admit.long_ticket[admission])):
            return ids, b""
        bits = int(admit.long_columns[admission])
        return ids, self._read(UPLOAD_RING, long_ticket, num_words(self._long_layout, bits))

    def _read(self, ring_index: int, ticket: int, count: int) -> bytes:
        """The first `count` words of consecutive records."""
        ring = self._rings[ring_index]
        parts = [
            ring.record(ticket + start // PROMPT_RECORD_TOKENS).token_ids[: count - start]
            for start in range(0, count, PROMPT_RECORD_TOKENS)
        ]
        return b"".join(part.tobytes() for part in parts)

    def _copy(self, ring_index: int, ticket: int, start: int, target: torch.Tensor) -> None:
        """Copy words of consecutive records to `target` [n] int32. `start` counts from the first record's first."""
        ring, records = self._rings[ring_index], self._records[ring_index]
        done = 0
        while done < len(target):
            place, at = divmod(start + done, PROMPT_RECORD_TOKENS)
            ring.record(ticket + place)  # raises RingError if it is not published
            count = min(PROMPT_RECORD_TOKENS - at, len(target) - done)
            source = records[(ticket + place) % ring.num_slots]
            self._device.copy(self._copy_in, target[done : done + count], source[at : at + count])
            done += count
