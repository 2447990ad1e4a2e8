"""The rings as the executor uses them: their records, page-locked for the device's copies, and what follows their
tickets.

Everything that knows an address or a ticket of a ring is here. So when the other ends of the rings are new processes,
new rings take the place of the old ones as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ipc.errors import RingFull
from ipc.records import ResultRecord, result_layout, step_layout
from ipc.ring import Ring
from workers.gpu.device.base import Device
from workers.gpu.execution.accesses import Copied
from workers.gpu.execution.record_parts import result_parts, step_parts
from workers.gpu.execution.rings import GpuRings, device_records
from workers.gpu.execution.row_tables import RowTables
from workers.gpu.execution.step_masks import StepMasks
from workers.gpu.execution.steps import Submitted
from workers.gpu.execution.uploads import Uploads


class AttachedRings:
    """One set of rings, from its first step to its last."""

    def __init__(
        self, device: Device[Any, Any], rings: GpuRings, tables: RowTables, copy_in: Any, masks: torch.Tensor
    ) -> None:
        """`masks`: the device's buffer of masks, [max_num_seqs, mask_words] int32."""
        shape = tables.shape
        steps, results = step_layout(shape), result_layout(shape)
        self._device = device
        self._rings = rings
        self.step = rings.step
        self.result = rings.result
        self._steps = [step_parts(steps, record) for record in device_records(device, rings.step)]
        self._results = [result_parts(results, record) for record in device_records(device, rings.result)]
        self.uploads = Uploads(device, rings.prompts, tables, copy_in)
        self.masks = StepMasks(device, rings.masks, shape, copy_in, masks)

    def step_record(self, ticket: int) -> Copied:
        """The step record of this ticket."""
        return self._steps[ticket % self.step.num_slots]

    def result_record(self, ticket: int) -> Copied:
        """The result record for a step's outputs; the step's ticket claims it, ahead of publishing. Raises RingFull."""
        ring = self.result
        if ticket - ring.read_cursor >= ring.num_slots:
            raise RingFull(f"ring {ring.name}: step {ticket} came before result {ring.read_cursor} was read")
        return self._results[ticket % ring.num_slots]

    def close(self) -> None:
        """Release the page locks and the mappings. The device must have finished all copies of these records."""
        rings: list[Ring[Any]] = [self.step, self.result, *self._rings.prompts, *self._rings.masks]
        for ring in rings:
            self._device.unregister_host(ring.buffer)
            ring.close()


# Sees each complete result before anything that its step has read is released.
Tap = Callable[[AttachedRings, Submitted, ResultRecord], None]


def no_tap(rings: AttachedRings, step: Submitted, result: ResultRecord) -> None:
    """Steps are not recorded."""
