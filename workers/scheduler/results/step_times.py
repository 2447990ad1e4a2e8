"""When each step was planned, ran and was applied: the sums of the device's time, and a log of the latest steps.

The log is a ring of rows on the scheduler's statistics page, which any process may copy. Step k is in row
`k % num_rows`, so a reader can tell the steps apart by their tickets. `config.RECENT_STEP_FIELDS` names the columns.
"""

from __future__ import annotations

from struct import Struct

import numpy as np

from ipc.record_layout import HostArray
from ipc.records import ResultRecord
from workers.scheduler.config import RECENT_STEP_FIELDS
from workers.scheduler.planning.step import PlannedStep
from workers.scheduler.results.device_time import DeviceTime


class StepTimes:
    """Takes the times of each step when its result has been applied.

    Args:
        log: the rows of the latest steps, [num_rows, len(RECENT_STEP_FIELDS)] int64.
    """

    def __init__(self, log: HostArray | None) -> None:
        if log is None:
            log = np.zeros((1, len(RECENT_STEP_FIELDS)), np.int64)
        self.device = DeviceTime()
        self._log = log
        self._num_rows = len(log)
        self._bytes = log.data.cast("B")  # one pack is faster than the assignment of a numpy row
        self._row = Struct(f"{len(RECENT_STEP_FIELDS)}q")

    def replace_device(self) -> None:
        """Tickets begin at 1 again: forget the steps of the GPU process that has died."""
        self._log[:] = 0
        self.device.replace_device()

    def add(self, step: PlannedStep, work_since_ns: int, result: ResultRecord, apply_ns: int, applied_ns: int) -> float:
        """Add a step whose result was applied from `apply_ns` to `applied_ns`. Returns how long the device ran, in s.

        `work_since_ns`: since when there had been something to plan when the step was planned.
        """
        start_ns, end_ns = int(result.device_start_ns[0]), int(result.device_end_ns[0])
        received_ns = int(result.received_at_ns[0])
        pause_ns = resume_ns = 0
        if step.masks is not None:
            pause_ns, resume_ns = result.device_pause_ns.tolist()
        self.device.add_step(start_ns, end_ns, work_since_ns, received_ns, resume_ns - pause_ns)
        num_seqs = len(step.batch.rows)
        self._row.pack_into(
            self._bytes, step.ticket % self._num_rows * self._row.size,
            step.ticket, work_since_ns, step.plan_ns, step.planned_ns, received_ns, start_ns, end_ns,
            pause_ns, resume_ns, apply_ns, applied_ns, num_seqs, num_seqs + step.num_prompt_tokens,
        )  # fmt: skip
        return (end_ns - start_ns) / 1e9
