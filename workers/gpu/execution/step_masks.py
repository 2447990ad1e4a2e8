"""The masks of a step on their way from the grammar workers' rings to the device.

Owns the mask rings' read cursors and the one buffer of masks. It decides which masks are used and which count as
closed: a closed mask allows no token, so its sequence ends with an error and the step goes on. A mask is closed if its
record is late, names another step, or holds another number of masks or none.

One buffer serves all steps, because step k's masks are copied only after result k-1 has been published:

    adjustment k-1 reads the buffer -> step_done[k-1] -> outputs_done[k-1] -> result k-1 published -> copies of k

The launching thread sees the publication (acquire) before it enqueues the copies. The event `ready` is single for the
same reason. Step k's mask records are released when its result is published: outputs_done[k] comes after the copies.
Records are addressed by ticket, so a late one is never taken for another. It is released as soon as it is there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch

from ipc.mask_records import MaskRecord, mask_layout
from ipc.records import StepRecord, StepShape
from ipc.ring import Ring
from workers.gpu.device.base import Device
from workers.gpu.execution.rings import device_records
from workers.gpu.execution.steps import OwedMasks, Submitted
from workers.gpu.execution.tensor_views import tensor_view

logger = logging.getLogger(__name__)


class StepMasks:
    """The launching thread calls the methods; `finish` alone may run on another thread."""

    def __init__(
        self,
        device: Device[Any, Any],
        rings: Sequence[Ring[MaskRecord]],
        shape: StepShape,
        copy_in: Any,
        buffer: torch.Tensor,
    ) -> None:
        """`buffer`: [max_num_seqs, mask_words] int32, on the device."""
        self._device = device
        self._rings = rings
        self._copy_in = copy_in
        self._buffer = buffer
        field = mask_layout(shape).fields["masks"]
        self._sources = [[tensor_view(field, record) for record in device_records(device, ring)] for ring in rings]
        self.ready = device.event("masks_ready")
        self._reported: set[int] = set()
        self._finished = [0] * len(rings)  # by worker: the newest ticket of a step whose result is published
        self._cursors = threading.Lock()  # two threads release records

    def owed_by(self, record: StepRecord) -> tuple[OwedMasks, ...]:
        """What the step needs of each grammar worker, in the order of the workers."""
        if not self._rings:
            return ()
        owed: tuple[OwedMasks, ...] = ()
        for worker, ticket in enumerate(record.mask_ticket.tolist()):
            if ticket:
                start = owed[-1].start + owed[-1].num_masks if owed else 0
                owed += (OwedMasks(worker, ticket, start, int(record.num_masks[worker])),)
        return owed

    def are_there(self, owed: Sequence[OwedMasks]) -> bool:
        """Whether all of the masks are there."""
        return all(map(self._is_published, owed))

    def copy(self, step: Submitted) -> None:
        """Enqueue the copies of the step's masks, and zeros for the closed ones, and record `ready`.

        All earlier results must have been published. Sets the step's `closed`.
        """
        for part in step.owed:
            target = self._buffer[part.start : part.start + part.num_masks]
            if self._is_published(part) and self._is_for(step, part):
                self._device.copy(self._copy_in, target, self._source(part))
            else:
                step.closed += (part,)
                self._close(target)
        self._device.record(self.ready, self._copy_in)

    def read(self, part: OwedMasks) -> bytes:
        """The masks that `copy` has copied, [num_masks, mask_words] int32, until `finish`."""
        return self._rings[part.worker].record(part.ticket).masks[: part.num_masks].tobytes()

    def finish(self, owed: Sequence[OwedMasks]) -> None:
        """Release the records of a step whose outputs are copied."""
        for part in owed:
            self._finished[part.worker] = part.ticket
        self.release_late()

    def release_late(self) -> None:
        """Release records that came after their steps had gone on without them."""
        for ring, finished in zip(self._rings, self._finished, strict=True):
            if ring.next_ticket <= finished:
                with self._cursors:
                    while ring.next_ticket <= finished and ring.is_published(ring.next_ticket):
                        ring.release_through(ring.next_ticket)
                        ring.next_ticket += 1

    def _is_published(self, part: OwedMasks) -> bool:
        return self._rings[part.worker].is_published(part.ticket)

    def _source(self, part: OwedMasks) -> torch.Tensor:
        """[num_masks, mask_words] int32, in the record."""
        return self._sources[part.worker][part.ticket % self._rings[part.worker].num_slots][: part.num_masks]

    def _is_for(self, step: Submitted, part: OwedMasks) -> bool:
        """Whether a record is what the step needs. Reports the first that is not, of each worker.

        A record without masks is not reported: its worker was started again and does not know the sequences.
        """
        record = self._rings[part.worker].record(part.ticket)
        found = int(record.step[0]), int(record.num_masks[0])
        if found == (step.ticket, part.num_masks):
            return True
        if found[1] and part.worker not in self._reported:
            self._reported.add(part.worker)
            logger.error(
                "grammar worker %d: mask record %d holds %d masks of step %d, not %d masks of step %d; "
                "the sequences that need them end with an error",
                part.worker, part.ticket, found[1], found[0], part.num_masks, step.ticket,
            )  # fmt: skip
        return False

    def _close(self, target: torch.Tensor) -> None:
        def close() -> None:
            target.zero_()

        self._device.launch(self._copy_in, close, lambda: ((), (target,)))


def mask_bytes(shape: StepShape) -> int:
    """The bytes of the buffer of masks."""
    return shape.max_num_seqs * shape.mask_words * torch.int32.itemsize
