"""What the device did with its time, from the times in the result records.

    step k-1 ===|      no work      |   waits   |=== step k
             its end       work arrives       its start

A gap before a step counts as "no work" up to the moment at which there was something to plan again, and as waiting
for the host from then on.
"""

from __future__ import annotations


class DeviceTime:
    """Sums in ns of CLOCK_MONOTONIC."""

    def __init__(self) -> None:
        self.busy_ns = 0
        self.wait_ns = 0
        self.no_work_ns = 0
        self.last_end_ns = 0

    def add_step(self, start_ns: int, end_ns: int, work_since_ns: int) -> None:
        """A step ran from start to end; when it was planned, there had been work since `work_since_ns`."""
        if self.last_end_ns:
            gap = max(0, start_ns - self.last_end_ns)
            no_work = min(gap, max(0, work_since_ns - self.last_end_ns))
            self.no_work_ns += no_work
            self.wait_ns += gap - no_work
        self.busy_ns += end_ns - start_ns
        self.last_end_ns = end_ns
