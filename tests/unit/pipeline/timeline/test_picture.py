"""Pictures of timelines, read back as SVG text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ipc.errors import ConfigError
from pipeline.timeline.__main__ import main
from pipeline.timeline.picture import Window, draw, middle_window
from pipeline.timeline.reader import Bar, Timeline

IDLE = "#e63946"


START = Window(0.0, 0.04)


def timeline(label: str, period_ms: float, num_steps: int = 20) -> Timeline:
    """Steps of 3 ms, one each `period_ms`, from 5 s on; each was planned 1 ms before it started."""
    steps, scheduler = [], []
    for ticket in range(1, num_steps + 1):
        start_s = 5 + ticket * period_ms * 1e-3
        steps.append(Bar("step", start_s, start_s + 3e-3, {"ticket": ticket}))
        scheduler.append(Bar("awake", start_s - 1.4e-3, start_s - 0.9e-3, {}))
        scheduler.append(Bar("plan", start_s - 1.2e-3, start_s - 1e-3, {"ticket": ticket}))
    return Timeline(label, {"scheduler": scheduler, "tokenizer.0": [Bar("encode", 1.0, 1.1, {})], "device": steps})


def svg(path: Path, *timelines: Timeline, window: Window | None = START) -> str:
    draw(timelines, window, path)
    return path.read_text()


def texts(picture: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture)


def test_the_caption_says_how_idle_the_device_is_in_the_window(tmp_path: Path) -> None:
    picture = svg(tmp_path / "p.svg", timeline("sync", 4.0))
    assert "device idle 25.0% of 40 ms  ·  4.00 ms from step to step" in texts(picture)
    assert {"sync", "step 1", "step 10", "scheduler", "device"} <= set(texts(picture))
    assert "step 11" not in texts(picture)


def test_gaps_are_red_and_a_device_without_any_shows_none(tmp_path: Path) -> None:
    legend = svg(tmp_path / "none.svg", timeline("async", 3.0)).count(f"fill: {IDLE}")
    picture = svg(tmp_path / "some.svg", timeline("sync", 4.0))
    assert picture.count(f"fill: {IDLE}") - legend == 10
    assert "device idle 0.0% of 40 ms  ·  3.00 ms from step to step" in texts((tmp_path / "none.svg").read_text())


def test_a_gap_that_leaves_the_window_counts_as_far_as_it_lies_in_it(tmp_path: Path) -> None:
    picture = svg(tmp_path / "p.svg", timeline("sync", 8.0), window=Window(0.004, 0.01))
    # 4 ms of the first gap, a step, and 3 ms of the second gap
    assert "device idle 70.0% of 10 ms" in texts(picture)


def test_several_timelines_stand_above_each_other_on_one_scale(tmp_path: Path) -> None:
    picture = svg(tmp_path / "p.svg", timeline("sync", 4.0), timeline("async", 3.0))
    found = texts(picture)
    assert found.index("sync") < found.index("async")
    assert found.count("40 ms") == 1
    assert found.count("device") == 2


def test_processes_that_do_nothing_in_the_window_have_no_row(tmp_path: Path) -> None:
    assert "tokenizer.0" not in texts(svg(tmp_path / "p.svg", timeline("sync", 4.0)))


def test_without_a_window_the_middle_of_the_run_is_shown(tmp_path: Path) -> None:
    run = timeline("sync", 4.0)
    window = middle_window(run)
    assert window.start_s == pytest.approx(6 * 4e-3)
    assert window.length_s == pytest.approx(7 * 4e-3 + 3e-3)
    assert {f"step {ticket}" for ticket in range(7, 15)} <= set(texts(svg(tmp_path / "p.svg", run, window=None)))


def test_the_same_timeline_gives_the_same_picture(tmp_path: Path) -> None:
    first = svg(tmp_path / "a.svg", timeline("sync", 4.0))
    assert svg(tmp_path / "b.svg", timeline("sync", 4.0)) == first


def test_a_timeline_without_steps_and_an_unknown_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no step ran"):
        draw([Timeline("empty", {})], None, tmp_path / "p.svg")
    for name in ("p.doc", "p"):  # matplotlib would add an ending to the second
        with pytest.raises(ConfigError, match=rf"-o .*{name}: "):
            draw([timeline("sync", 4.0)], None, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_window_behind_the_last_step_is_refused_with_the_runs_length(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends 0\.079 s after"):
        draw([timeline("sync", 4.0)], Window(1.0, 0.1), tmp_path / "p.svg")


def test_each_step_has_an_arrow_from_its_plan_unless_there_are_too_many(tmp_path: Path) -> None:
    def num_arrows(window: Window) -> int:
        return svg(tmp_path / "p.svg", timeline("sync", 4.0, num_steps=100), window=window).count("opacity: 0.55") // 2

    assert num_arrows(Window(0.0, 0.02)) == num_arrows(Window(0.0, 0.04)) - 5
    assert num_arrows(Window(0.0, 0.4)) == 0


def test_the_command_refuses_what_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.json"), "-o", str(tmp_path / "p.svg")]) == 2
    assert "none.json: cannot be read" in capsys.readouterr().err
    for window in ("1", "1,0", "-1,1", "a,b", "0,inf"):
        with pytest.raises(SystemExit):
            main(["t.json", "--window", window, "-o", "p.svg"])
    assert "START_S" in capsys.readouterr().err


def test_the_command_draws_what_a_recorder_wrote(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(
        '[\n{"name":"process_name","ph":"M","pid":1,"tid":1,"ts":0,"args":{"name":"device"}},\n'
        '{"name":"process_labels","ph":"M","pid":1,"tid":1,"ts":0,"args":{"labels":"recorded"}},\n'
        '{"name":"step","ph":"X","pid":1,"tid":1,"ts":1000.0,"dur":3000.0,"args":{"ticket":1}},\n'
        '{"name":"step","ph":"X","pid":1,"tid":1,"ts":5000.0,"dur":3000.0,"args":{"ticket":2}}'
    )
    assert main([str(path), "--window", "0,0.007", "-o", str(tmp_path / "p.svg")]) == 0
    assert {"recorded", "step 2", "idle 1.0 ms"} <= set(texts((tmp_path / "p.svg").read_text()))
