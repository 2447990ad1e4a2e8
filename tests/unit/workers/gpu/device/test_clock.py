"""Times of a drifting clock come out as CLOCK_MONOTONIC, in order, with the steps as long as they were."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import pytest

from workers.gpu.device.clock import CREEP_PPM, MAX_SLEW_PPM, DriftingClock

US, MS, S = 1_000, 1_000_000, 1_000_000_000
BOOT_NS = 7 * S  # the host's clock where the device's shows 5000 s
WAKE_UP_NS = 15 * US  # the quickest
DRIFTS = [-50, -20, 0, 20, 50]  # ppm


@dataclass(frozen=True)
class Step:
    """A step's times, and the times at which the host saw them, all by the host's clock."""

    start_ns: int
    end_ns: int
    received_at_ns: int
    seen_at_ns: int


def device_time(host_ns: int, drift_ppm: int) -> int:
    """Return the time on a device's clock that runs faster by this much."""
    return 5000 * S + (host_ns - BOOT_NS) + (host_ns - BOOT_NS) * drift_ppm // 1_000_000


def steps(seed: int, seconds: int, *, depth: int, mean_gap_ns: int = 0) -> Iterator[Step]:
    """Steps of 1 to 12 ms; the host wakes up late by a little, now and then by milliseconds.

    `depth` of them are under way, or there are gaps in which nothing is.
    """
    random = Random(seed)
    ends = [BOOT_NS] * depth  # of the latest steps
    seen_at_ns = BOOT_NS
    while seen_at_ns < BOOT_NS + seconds * S:
        gap_ns = round(random.expovariate(1 / mean_gap_ns)) if mean_gap_ns else 0
        # The host hands a step out when it has seen the end of the one `depth` steps before.
        received_at_ns = ends[-depth] + gap_ns + round(random.expovariate(1 / (100 * US)))
        launched_at_ns = received_at_ns + round(random.uniform(40 * US, 400 * US))
        start_ns = max(launched_at_ns, ends[-1])
        end_ns = start_ns + random.randint(1 * MS, 12 * MS)
        wake_up_ns = WAKE_UP_NS + round(random.expovariate(1 / (40 * US)))
        if random.random() < 0.02:
            wake_up_ns += random.randint(0, 5 * MS)
        seen_at_ns = max(seen_at_ns, end_ns + wake_up_ns)  # results arrive in order
        ends = [*ends[1:], end_ns]
        yield Step(start_ns, end_ns, received_at_ns, seen_at_ns)


def converted(run: Iterator[Step], drift_ppm: int) -> Iterator[tuple[Step, int, int]]:
    clock = DriftingClock(device_time(BOOT_NS, drift_ppm) + 3 * US, BOOT_NS)  # calibrated to some microseconds
    for step in run:
        start, end = device_time(step.start_ns, drift_ppm), device_time(step.end_ns, drift_ppm)
        yield step, *clock.to_monotonic(start, end, step.received_at_ns, step.seen_at_ns)


@pytest.mark.parametrize("drift_ppm", DRIFTS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_steps_that_follow_on_each_other_are_right_within_a_wake_up_for_minutes(depth: int, drift_ppm: int) -> None:
    errors = [end - step.end_ns for step, _, end in converted(steps(1, 180, depth=depth), drift_ppm)]
    drifted = abs(180 * S * drift_ppm // 1_000_000)
    assert max(map(abs, errors)) < 120 * US, f"without a correction: {drifted / US:.0f} us"
    errors.sort()
    assert abs(errors[len(errors) // 2]) < 40 * US


@pytest.mark.parametrize("drift_ppm", DRIFTS)
@pytest.mark.parametrize("depth", [1, 2])
def test_after_a_pause_a_step_is_as_right_as_its_own_launch_and_wake_up_allow(depth: int, drift_ppm: int) -> None:
    last_end, num_checked = BOOT_NS, 0
    for step, _, end in converted(steps(2, 36_000, depth=depth, mean_gap_ns=60 * S), drift_ppm):
        if step.start_ns - last_end > 15 * S:  # in which any error of before can be mended
            launch_ns, wake_up_ns = step.start_ns - step.received_at_ns, step.seen_at_ns - step.end_ns
            assert -launch_ns - 2 * US <= end - step.end_ns <= wake_up_ns + 2 * US
            num_checked += 1
        last_end = step.end_ns
    assert num_checked > 100


@pytest.mark.parametrize("drift_ppm", DRIFTS)
@pytest.mark.parametrize("mean_gap_ns", [0, 2 * MS, 5 * S])
def test_time_never_runs_backwards_and_steps_keep_their_length(mean_gap_ns: int, drift_ppm: int) -> None:
    last_end, last_device_end = BOOT_NS, None
    for step, start, end in converted(steps(3, 60, depth=2, mean_gap_ns=mean_gap_ns), drift_ppm):
        device_start, device_end = device_time(step.start_ns, drift_ppm), device_time(step.end_ns, drift_ppm)
        assert last_end <= start < end
        assert abs((end - start) - (device_end - device_start)) <= (device_end - device_start) * MAX_SLEW_PPM * 1e-6 + 1
        if last_device_end == device_start:
            assert start == last_end, "a gap that was not there"
        last_end, last_device_end = end, device_end


def test_the_offset_creeps_faster_than_clocks_drift_apart_and_is_mended_faster_than_it_creeps() -> None:
    assert 2 * max(map(abs, DRIFTS)) <= CREEP_PPM
    assert CREEP_PPM + max(map(abs, DRIFTS)) < MAX_SLEW_PPM


def test_a_step_without_length_at_the_moment_of_calibration_is_there() -> None:
    assert DriftingClock(1000, 5000).to_monotonic(1000, 1000, 4000, 6000) == (5000, 5000)
