"""The device's time by cause: the scheduler's sums, and their difference between two readings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pipeline.metrics import watch as metrics
from pipeline.metrics.figures import DeviceTime as DeviceFigures
from pipeline.metrics.figures import Roles, Window
from workers.scheduler.results.device_time import DeviceTime

SCHEDULER = {
    "num_steps": 0.0, "num_prefill_steps": 0.0, "num_sampled_tokens": 0.0, "num_prompt_tokens": 0.0,
    "plan_ns": 0.0, "apply_ns": 0.0,
    "device_busy_ns": 0.0, "device_no_work_ns": 0.0, "device_scheduler_ns": 0.0, "device_copies_ns": 0.0,
    "device_masks_ns": 0.0,
    "num_running": 0.0, "num_waiting": 0.0, "num_preempted": 0.0, "num_free_blocks": 0.0, "cpu_ns": 0.0,
    "num_free_rows": 0.0, "num_step_records": 0.0, "num_result_records": 0.0, "num_upload_records": 0.0,
}  # fmt: skip
TOKENIZER = {"cpu_ns": 0.0, "num_requests": 0.0, "num_tokens": 0.0, "num_prompt_records": 0.0}


def after_first_step() -> DeviceTime:
    device = DeviceTime()
    device.add_step(1_000, 2_000, work_since_ns=500, received_at_ns=900)
    return device


def causes(device: DeviceTime) -> tuple[int, int, int]:
    return device.no_work_ns, device.scheduler_ns, device.copies_ns


def test_the_time_between_two_gpu_processes_counts_for_no_cause() -> None:
    device = after_first_step()
    device.replace_device()
    device.add_step(9_000, 9_500, work_since_ns=2_500, received_at_ns=8_000)
    assert causes(device) == (0, 0, 0)
    assert device.busy_ns == 1_500
    device.add_step(9_600, 9_700, work_since_ns=2_500, received_at_ns=9_540)
    assert causes(device) == (0, 40, 60)


@pytest.mark.parametrize(
    ("start", "work_since", "received", "expected"),
    [
        (2_600, 2_100, 2_400, (100, 300, 200)),  # work came, its record was received, its copies ended
        (2_600, 500, 2_400, (0, 400, 200)),  # there had been work all the time
        (2_600, 500, 1_500, (0, 0, 600)),  # and its record lay there before the last step ended
        (2_000, 500, 1_500, (0, 0, 0)),  # and so did its inputs
        (2_600, 2_700, 2_800, (600, 0, 0)),  # the device's clock runs behind the host's
        (2_600, 2_300, 2_200, (300, 0, 300)),  # a record cannot be received before there is work for it
        (1_900, 500, 1_500, (0, 0, 0)),  # a step cannot start before the last one ends
    ],
)
def test_a_gap_is_split_where_work_came_and_where_its_record_was_received(
    start: int, work_since: int, received: int, expected: tuple[int, int, int]
) -> None:
    device = after_first_step()
    device.add_step(start, start + 1_000, work_since, received)
    assert causes(device) == expected


def test_nothing_is_known_of_the_time_before_the_first_step() -> None:
    assert causes(after_first_step()) == (0, 0, 0)


def test_a_pause_for_masks_within_a_step_is_not_busy() -> None:
    device = after_first_step()
    device.add_step(2_000, 3_000, 500, 1_500, pause_ns=300)
    assert (device.busy_ns, device.masks_ns, causes(device)) == (1_000 + 700, 300, (0, 0, 0))


@given(st.lists(st.tuples(*[st.integers(1, 10_000)] * 4, st.integers(-10, 10_000)), min_size=1, max_size=20))
def test_the_parts_add_up_to_all_of_the_time_whatever_the_clocks_say(steps: list[tuple[int, ...]]) -> None:
    device = DeviceTime()
    for step in steps:
        device.add_step(*step)
        assert min(device.busy_ns, *causes(device)) >= 0
    assert device.busy_ns + device.masks_ns + sum(causes(device)) == device.last_end_ns - steps[0][0]


def reading(**scheduler: float) -> Roles:
    return {"scheduler": {**SCHEDULER, **scheduler}}


def test_a_window_tells_waiting_for_the_scheduler_from_waiting_for_copies() -> None:
    window = Window(reading(device_busy_ns=5.0))
    figures = window.close(
        reading(
            num_steps=10, device_busy_ns=605.0, device_scheduler_ns=200.0, device_copies_ns=100.0, device_masks_ns=100.0
        )
    )
    assert figures.device_us_per_step == pytest.approx(0.06)
    assert figures.device_wait_share == pytest.approx(0.4)
    shares = {"busy": 0.6, "no work": 0.0, "scheduler": 0.2, "copies": 0.1, "masks": 0.1}
    assert figures.device.shares() == pytest.approx(shares)


def test_a_pause_that_began_before_the_window_fills_no_more_than_the_window() -> None:
    hour_ns = 3_600e9
    figures = Window(reading()).close(reading(num_steps=1, device_busy_ns=1.0, device_no_work_ns=hour_ns))
    assert figures.device.no_work_ns <= figures.seconds * 1e9


def test_the_live_view_shows_every_process_and_the_causes_of_idleness() -> None:
    readings = iter([
        {**reading(), "tokenizer.0": TOKENIZER},
        {
            **reading(num_running=3, device_busy_ns=6e3, device_scheduler_ns=3e3, device_copies_ns=1e3),
            "tokenizer.0": {**TOKENIZER, "num_prompt_records": 2.0},
        },
    ])  # fmt: skip
    shown = []
    metrics.watch(lambda: next(readings), shown.append, interval_s=0.0, count=1)
    console = Console(width=120)
    with console.capture() as captured:
        console.print(shown[0])
    text = captured.get()
    for expected in ("tokenizer.0", "prompt records 2", "scheduler", "running 3", "busy 60.00%", "scheduler 30.00%"):
        assert expected in text
    assert "copies 10.00%" in text


def test_an_engine_that_was_started_again_between_two_readings_begins_a_new_window() -> None:
    readings = iter([
        reading(num_steps=500, cpu_ns=9e9),
        reading(num_steps=3, cpu_ns=1e9),  # counts from 0 again
        {**reading(num_steps=9, cpu_ns=2e9), "tokenizer.1": TOKENIZER},  # and now with another process
        {**reading(num_steps=9, cpu_ns=2e9), "tokenizer.1": TOKENIZER},
    ])  # fmt: skip
    shown = []
    metrics.watch(lambda: next(readings), shown.append, interval_s=0.0, count=1)
    assert len(shown) == 1
    assert next(readings, None) is None


@pytest.mark.parametrize("option", ["--interval=-1", "--interval=0", "--interval=nan", "--interval=inf", "--count=-1"])
def test_an_interval_or_count_that_cannot_be_is_refused_before_an_engine_is_looked_for(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["metrics", "--endpoint", "ipc:///nowhere/x.sock", option])
    with pytest.raises(SystemExit) as stopped:
        metrics.main()
    assert stopped.value.code == 2
    assert option.partition("=")[0] in capsys.readouterr().err


def test_the_live_view_of_a_window_without_a_step_says_why() -> None:
    nothing = DeviceFigures(0.0, 0.0, 0.0, 0.0)
    assert "no work" in metrics.device_line(nothing, has_work=False).plain
    assert "no step ended" in metrics.device_line(nothing, has_work=True).plain
