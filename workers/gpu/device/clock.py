"""Converts the times that a device writes to CLOCK_MONOTONIC, although the two clocks drift apart.

Two crystals differ by about 20 millionths, which is 1.2 ms a minute. Each step shows at no cost how far they are apart:

    host     received|-- launch --|                             |-- copy-out, wake-up --|seen
    device                        |start ====== step ====== end|

The step started after the host received its record, and ended before the host saw its result. So the offset lies
between the bounds `received - start` and `seen - end`. When steps queue behind each other, the first bound is loose,
but the second is as tight as the quickest wake-up. After a pause both bounds are tight. The clock keeps the last offset
and moves it into these bounds. This is a minimum filter of one-way delays, as in the clock filters of NTP and PTP. Only
the first bound shows that the device's clock is slower. So while steps queue, the offset creeps upwards until a quick
wake-up limits it.
"""

from __future__ import annotations

from typing import Final, Protocol

MAX_SLEW_PPM: Final = 500  # the most by which a step's times are stretched to correct a wrong offset
CREEP_PPM: Final = 100  # more than the drift between two clocks


class Clock(Protocol):
    """The clock of one device. Call `to_monotonic` for every step, in order."""

    def to_monotonic(self, start_ns: int, end_ns: int, received_at_ns: int, seen_at_ns: int) -> tuple[int, int]:
        """Convert a step's start and end, in ns of the device, to CLOCK_MONOTONIC in ns.

        received_at_ns: CLOCK_MONOTONIC when the host received the step's record.
        seen_at_ns: CLOCK_MONOTONIC when the host saw that the step was complete.
        """
        ...


class HostClock:
    """The clock of a device that reads CLOCK_MONOTONIC itself."""

    def to_monotonic(self, start_ns: int, end_ns: int, received_at_ns: int, seen_at_ns: int) -> tuple[int, int]:
        return start_ns, end_ns


class DriftingClock:
    """A device's own clock, which runs at about the host's rate and showed `device_ns` at `host_ns` of CLOCK_MONOTONIC.

    The converted times are a continuous function of the device's times. They never run backwards, and a second of the
    device is one second +- MAX_SLEW_PPM. They are late by the duration of the quickest recent wake-up.
    """

    def __init__(self, device_ns: int, host_ns: int) -> None:
        self._offset_ns = host_ns - device_ns
        # The last time that was converted, on both clocks.
        self._device_ns = device_ns
        self._host_ns = host_ns

    def to_monotonic(self, start_ns: int, end_ns: int, received_at_ns: int, seen_at_ns: int) -> tuple[int, int]:
        elapsed_ns = end_ns - self._device_ns
        offset_ns = self._offset_ns + (end_ns - start_ns) * CREEP_PPM // 1_000_000
        self._offset_ns = min(max(offset_ns, received_at_ns - start_ns), seen_at_ns - end_ns)

        slack_ns = elapsed_ns * MAX_SLEW_PPM // 1_000_000
        wanted_ns = end_ns + self._offset_ns - self._host_ns
        host_elapsed_ns = min(max(wanted_ns, elapsed_ns - slack_ns), elapsed_ns + slack_ns)
        before_start_ns = (start_ns - self._device_ns) * host_elapsed_ns // max(elapsed_ns, 1)
        start_at_ns, end_at_ns = self._host_ns + before_start_ns, self._host_ns + host_elapsed_ns
        self._device_ns, self._host_ns = end_ns, end_at_ns
        return start_at_ns, end_at_ns
