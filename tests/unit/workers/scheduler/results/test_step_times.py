"""The log of the latest steps, as another process reads it from the statistics page."""

from __future__ import annotations

import os

import numpy as np

from ipc.records import ResultRecord, StepShape, result_layout
from ipc.stats_page import StatsPage
from workers.scheduler.config import ARRAYS, COUNTERS, RECENT_STEP_FIELDS, RECENT_STEPS
from workers.scheduler.planning.step import Batch, PlannedStep, StepMasks
from workers.scheduler.results.step_times import StepTimes

ROWS, SEQS = np.arange(3), np.zeros(3, np.int32)
BATCH = Batch(ROWS, SEQS, 0, 0, 0, None)


def step(ticket: int, masks: StepMasks | None = None, num_prompt_tokens: int = 0) -> PlannedStep:
    return PlannedStep(ticket, 1_010, 1_020, BATCH, np.ones(3, np.bool_), num_prompt_tokens, [], masks)


def result(start_ns: int, end_ns: int, pause: tuple[int, int] = (0, 0)) -> ResultRecord:
    layout = result_layout(StepShape(4, 16, 64, 16))
    record = layout.views(memoryview(bytearray(layout.num_bytes)))
    record.device_start_ns[0], record.device_end_ns[0], record.received_at_ns[0] = start_ns, end_ns, 1_100
    record.device_pause_ns[:] = pause
    return record


def test_another_process_reads_the_times_and_the_size_of_a_step() -> None:
    handle = StatsPage.create("scheduler", COUNTERS, ARRAYS)
    writer, reader = StatsPage(handle), StatsPage(handle)
    times = StepTimes(writer.values.recent_steps)
    device_s = times.add(step(7, num_prompt_tokens=20), 1_000, result(1_200, 1_500), 1_600, 1_610)
    assert device_s == 300e-9
    row = dict(zip(RECENT_STEP_FIELDS, reader.copy_arrays([RECENT_STEPS])[RECENT_STEPS][7].tolist(), strict=True))
    assert row == {
        "ticket": 7, "work_since_ns": 1_000, "plan_ns": 1_010, "planned_ns": 1_020, "received_ns": 1_100,
        "start_ns": 1_200, "end_ns": 1_500, "pause_ns": 0, "resume_ns": 0, "apply_ns": 1_600, "applied_ns": 1_610,
        "num_seqs": 3, "num_tokens": 23,
    }  # fmt: skip
    os.close(handle.fd)


def test_the_log_keeps_the_latest_steps_and_only_steps_with_masks_have_a_pause() -> None:
    log = np.zeros((3, len(RECENT_STEP_FIELDS)), np.int64)
    times = StepTimes(log)
    for ticket in range(1, 6):
        masks = StepMasks({}, {}) if ticket == 5 else None
        times.add(step(ticket, masks), 0, result(1_200, 1_500, pause=(1_300, 1_350)), 0, 0)
    assert sorted(log[:, 0].tolist()) == [3, 4, 5]
    pauses = log[:, [RECENT_STEP_FIELDS.index(name) for name in ("ticket", "pause_ns", "resume_ns")]]
    assert sorted(pauses.tolist()) == [[3, 0, 0], [4, 0, 0], [5, 1_300, 1_350]]


def test_the_log_forgets_the_steps_of_a_gpu_process_that_is_replaced() -> None:
    log = np.zeros((3, len(RECENT_STEP_FIELDS)), np.int64)
    times = StepTimes(log)
    for ticket in (1, 2):
        times.add(step(ticket), 0, result(1_200, 1_500), 0, 0)
    times.replace_device()
    times.add(step(1), 0, result(9_200, 9_500), 0, 0)
    assert log[:, 0].tolist() == [0, 1, 0]
