"""Start-up is timed by its stages, and a stage says how far it is."""

from __future__ import annotations

from workers.gpu.startup_stages import Stages


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
    assert reports[1] == ("loading weights", 0.4, 0)


def test_a_stage_that_counts_bytes_says_of_how_many() -> None:
    stages = Stages(lambda *_: None)
    stages.progress("loading weights", 0.25, 15 << 30)
    assert str(stages) == "loading weights, 25% of 15.00 GiB done"
