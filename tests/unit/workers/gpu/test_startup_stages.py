"""Start-up is timed by its stages, and a stage says how far it is."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ipc.stats_page import StatsPage
from workers.gpu import startup_stages
from workers.gpu.startup_stages import COUNTERS, IMPORTING, LOADING, Stages


def test_each_stage_is_timed_from_its_first_report_to_the_next_ones() -> None:
    times = iter([0.0, 0.5, 2.0, 3.25, 3.26, 4.0, 10.0])
    reports: list[tuple[str, float, int]] = []
    stages = Stages(lambda *report: reports.append(report), clock=lambda: round(next(times) * 1e9))
    for stage, fraction in (
        ("loading weights", 0.0),
        ("loading weights", 0.4),
        ("checking the model", 0.0),
        ("loading weights", 1.0),
        ("capturing graphs", 0.5),
    ):
        stages.progress(stage, fraction)
    assert str(stages) == "capturing graphs, 50% done"
    stages.serve()
    assert str(stages) == "running a step"
    assert stages.durations() == "starting 0.5 s, loading weights 3.5 s, capturing graphs 6.0 s"
    assert stages.total_s == 10
    assert reports[1] == ("loading weights", 0.4, 0)


def test_a_stage_that_counts_bytes_says_of_how_many() -> None:
    stages = Stages(lambda *_: None)
    stages.progress("loading weights", 0.25, 15 << 30)
    assert str(stages) == "loading weights, 25% of 15.00 GiB done"


def test_the_statistics_page_has_every_stage_from_the_birth_of_the_process_to_ready() -> None:
    times = iter([5, 7, 8, 20, 26])
    stages = Stages(lambda *_: None, begun_at_ns=1, clock=lambda: next(times))
    for stage in (IMPORTING, LOADING, "allocating the KV cache", "allocating tables"):
        stages.progress(stage, 0.0)
    stages.serve()
    handle = StatsPage.create("gpu", COUNTERS)
    page = StatsPage(handle)
    os.close(handle.fd)
    stages.count(page.values)
    found = {name: value for name, value in page.snapshot().items() if name.startswith("startup") and value}
    assert found == {
        "startup_begun_at_ns": 1,
        "startup_imports_ns": 6,  # torch and transformers
        "startup_weights_ns": 1,
        "startup_tables_ns": 18,
        "startup_ready_at_ns": 26,
    }


def test_every_stage_that_the_loading_code_reports_has_a_counter() -> None:
    reported = {
        stage
        for path in Path(startup_stages.__file__).parent.rglob("*.py")
        for stage in re.findall(r'progress\("([^"]+)"', path.read_text())
    }
    assert len(reported) > 5
    assert reported <= startup_stages.STAGE_COUNTERS.keys()
