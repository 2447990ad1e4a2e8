"""What the device did with its time, from the times in the result records.

    step k-1 ===|      no work      |   scheduler    |   copies    |=== step k
             its end        work arrives     record received     its start

A gap before a step counts as "no work" up to the moment at which there was something to plan again, as waiting for the
scheduler until the GPU process received the step's record, and as waiting for copies and launches from then on. The
sums add up to `last_end_ns` less the first step's start: no moment is counted twice, and none is left out.
"""

from __future__ import annotations


class DeviceTime:
    """Sums in ns of CLOCK_MONOTONIC."""

    def __init__(self) -> None:
        self.busy_ns = 0
        self.no_work_ns = 0
        self.scheduler_ns = 0
        self.copies_ns = 0
        self.last_end_ns = 0

    def add_step(self, start_ns: int, end_ns: int, work_since_ns: int, received_at_ns: int) -> None:
        """A step ran from start to end. When it was planned, there had been work since `work_since_ns`; its record was
        taken at `received_at_ns`.

        The device's clock is only close to the host's: what it puts out of order is clamped.
        """
        if self.last_end_ns:
            start_ns = max(start_ns, self.last_end_ns)
            arrived_ns = min(max(work_since_ns, self.last_end_ns), start_ns)
            received_ns = min(max(received_at_ns, arrived_ns), start_ns)
            self.no_work_ns += arrived_ns - self.last_end_ns
            self.scheduler_ns += received_ns - arrived_ns
            self.copies_ns += start_ns - received_ns
        end_ns = max(end_ns, start_ns)
        self.busy_ns += end_ns - start_ns
        self.last_end_ns = end_ns
