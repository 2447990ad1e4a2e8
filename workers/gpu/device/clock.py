"""Turns the times that a device writes into CLOCK_MONOTONIC, also while the two clocks drift apart.

Two crystals differ by some 20 millionths: 1.2 ms a minute. Each step says again how far they are apart, at no cost:

    host     received|-- launch --|                             |-- copy-out, wake-up --|seen
    device                        |start ====== step ====== end|

Its start was not before the host received it, and its end not after the host saw the result. So the offset lies between
`received - start` and `seen - end`. Behind other steps the first says little, but the second is as near as the quickest
wake-up; after a pause both are near. What is kept is the last offset, moved into these bounds: a minimum filter of
one-way delays, as NTP's and PTP's clock filters have it. The device's clock being slower shows in the first bound
alone, so while steps follow on each other the offset creeps upwards until a quick wake-up holds it down.
"""

from __future__ import annotations

from typing import Final, Protocol

MAX_SLEW_PPM: Final = 500  # by how much the times of a step may be stretched, and a wrong offset mended
CREEP_PPM: Final = 100  # more than two clocks drift apart


class Clock(Protocol):
    """Of one device. `to_monotonic` is told of every step, in order; the host's times are CLOCK_MONOTONIC, in ns."""

    def to_monotonic(self, start_ns: int, end_ns: int, received_at_ns: int, seen_at_ns: int) -> tuple[int, int]:
        """The start and end of a step that was received by the host at one time and seen to be complete at another."""
        ...


class HostClock:
    """The clock of a device that reads CLOCK_MONOTONIC itself."""

    def to_monotonic(self, start_ns: int, end_ns: int, received_at_ns: int, seen_at_ns: int) -> tuple[int, int]:
        return start_ns, end_ns


class DriftingClock:
    """A clock of its own, at about the host's rate, which showed `device_ns` at `host_ns` of CLOCK_MONOTONIC.

    The times it gives are a continuous function of the device's: they never run backwards, and a second of the device
    is one second +- MAX_SLEW_PPM. They are late by as much as the quickest of recent wake-ups took.
    """

    def __init__(self, device_ns: int, host_ns: int) -> None:
        self._offset_ns = host_ns - device_ns
        # Up to where times have been given.
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
