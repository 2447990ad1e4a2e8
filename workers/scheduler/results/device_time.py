"""How the device spent its time, from the times in the result records.

    step k-1 ===|      no work      |   scheduler    |   copies    |=== step k
             its end        work arrives     record received     its start

A gap before a step has up to three parts. The device had no work until there was something to plan. From then on it
waited for the scheduler, until the GPU process received the step's record. After that it waited for copies and
launches. A step that owes grammar masks may also pause between its model and its sampler, until they are there. Every
moment from the first step's start to `last_end_ns` counts in exactly one sum, except the time from the last step of one
GPU process to the first of the next.
"""

from __future__ import annotations


class DeviceTime:
    """Sums in ns of CLOCK_MONOTONIC."""

    def __init__(self) -> None:
        self.busy_ns = 0
        self.no_work_ns = 0
        self.scheduler_ns = 0
        self.copies_ns = 0
        self.masks_ns = 0
        self.last_end_ns = 0
        self._is_new = True  # no step of this GPU process has been added

    def add_step(self, start_ns: int, end_ns: int, work_since_ns: int, received_at_ns: int, pause_ns: int = 0) -> None:
        """Add a step that ran from `start_ns` to `end_ns`, and waited for masks for `pause_ns` of that time.

        `work_since_ns`: since when there had been something to plan when the step was planned. `received_at_ns`: when
        the GPU process took the step's record. The device's clock differs slightly from the host's, so times that are
        out of order are clamped.
        """
        if not self._is_new:
            start_ns = max(start_ns, self.last_end_ns)
            arrived_ns = min(max(work_since_ns, self.last_end_ns), start_ns)
            received_ns = min(max(received_at_ns, arrived_ns), start_ns)
            self.no_work_ns += arrived_ns - self.last_end_ns
            self.scheduler_ns += received_ns - arrived_ns
            self.copies_ns += start_ns - received_ns
        self._is_new = False
        end_ns = max(end_ns, start_ns)
        pause_ns = min(max(pause_ns, 0), end_ns - start_ns)
        self.masks_ns += pause_ns
        self.busy_ns += end_ns - start_ns - pause_ns
        self.last_end_ns = end_ns

    def replace_device(self) -> None:
        """The next step is the first of another GPU process."""
        self._is_new = True

    def gauges(self) -> dict[str, int]:
        """The sums by their names on the statistics page."""
        return {
            "device_busy_ns": self.busy_ns,
            "device_no_work_ns": self.no_work_ns,
            "device_scheduler_ns": self.scheduler_ns,
            "device_copies_ns": self.copies_ns,
            "device_masks_ns": self.masks_ns,
            "device_last_end_ns": self.last_end_ns,
        }
