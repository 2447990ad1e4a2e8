"""The timeline's file: the events that records become, and the readable part of a file that was cut off."""

from __future__ import annotations

import gzip
import json
import os
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ipc.errors import ConfigError
from ipc.trace import Span, TraceRing
from pipeline.timeline.chrome import ChromeEvents, Records
from pipeline.timeline.reader import load_events, load_timeline
from pipeline.timeline.recorder import Recorder

TRACKS = ("scheduler", "gpu", "tokenizer.0", "gateway", "gpu.completion")


def records(*rows: tuple[int, ...]) -> Records:
    return np.array([(*row, *([0] * (6 - len(row)))) for row in rows], np.int64).reshape(-1, 6)


def parsed(events: list[str]) -> list[dict[str, Any]]:
    return [json.loads(event) for event in events]


def of_phase(events: list[str], phase: str) -> list[dict[str, Any]]:
    return [event for event in parsed(events) if event["ph"] == phase]


def one_step(ticket: int, start_ns: int, duration_ns: int = 100) -> dict[str, Records]:
    plan_ns = start_ns - 90
    return {
        "scheduler": records(
            (Span.PLAN, plan_ns, 10, ticket, 5, 9),
            (Span.STEP, start_ns, duration_ns, ticket),
            (Span.APPLY, start_ns + 200, 20, ticket),
        ),
        "gpu": records((Span.LAUNCH, plan_ns + 30, 10, ticket, 8, 16)),
        "gpu.completion": records((Span.PUBLISH, start_ns + 150, 10, ticket)),
    }


def test_a_step_on_the_device_says_what_was_planned_and_launched() -> None:
    spans = of_phase(ChromeEvents(TRACKS, 0).events(one_step(3, 2_000)), "X")
    (step,) = [span for span in spans if span["name"] == "step"]
    assert (step["ts"], step["dur"]) == (2.0, 0.1)
    assert step["args"] == {
        "ticket": 3, "num_seqs": 5, "num_tokens": 9, "bucket_seqs": 8, "bucket_tokens": 16,
    }  # fmt: skip
    assert [span["name"] for span in spans] == ["plan", "launch", "step", "publish", "apply"]


def test_a_step_whose_plan_was_lost_is_shown_all_the_same() -> None:
    drained = one_step(3, 2_000)
    drained["scheduler"] = drained["scheduler"][1:]
    (step,) = [span for span in of_phase(ChromeEvents(TRACKS, 0).events(drained), "X") if span["name"] == "step"]
    assert step["args"] == {"ticket": 3, "bucket_seqs": 8, "bucket_tokens": 16}


def test_arrows_lead_from_a_plan_over_the_device_to_its_result() -> None:
    events = ChromeEvents(TRACKS, 0).events(one_step(3, 2_000))
    arrows = [event for event in parsed(events) if event["ph"] in "stf"]
    assert [arrow["ph"] for arrow in arrows] == ["s", "t", "t", "f"]
    assert {arrow["id"] for arrow in arrows} == {3}
    starts = {(span["pid"], span["tid"], span["ts"]) for span in of_phase(events, "X")}
    assert all((arrow["pid"], arrow["tid"], arrow["ts"]) in starts for arrow in arrows)


def test_steps_do_not_overlap_where_the_devices_clock_was_set_between_them() -> None:
    chrome = ChromeEvents(TRACKS, 0)
    spans = of_phase(chrome.events(one_step(1, 2_000)) + chrome.events(one_step(2, 2_050)), "X")
    first, second = [span for span in spans if span["name"] == "step"]
    assert second["ts"] == first["ts"] + first["dur"] == 2.1
    assert second["dur"] == 0.05


def test_threads_of_a_role_share_its_process_and_roles_have_their_own() -> None:
    events = parsed(ChromeEvents(TRACKS, 0).names("some engine"))
    processes = {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}
    threads = {(event["pid"], event["args"]["name"]) for event in events if event["name"] == "thread_name"}
    assert set(processes) == {"gateway", "tokenizer.0", "scheduler", "gpu", "device"}
    assert len(set(processes.values())) == len(processes)
    assert {name for pid, name in threads if pid == processes["gpu"]} == {"main", "completion"}
    assert [event["args"]["labels"] for event in events if event["name"] == "process_labels"] == ["some engine"]


def test_counters_and_lost_records_are_marked() -> None:
    chrome = ChromeEvents(TRACKS, 1_000)
    (counter,) = parsed(chrome.events({"scheduler": records((Span.SEQUENCES, 3_500, 0, 4, 2))}))
    assert (counter["ph"], counter["ts"], counter["args"]) == ("C", 2.5, {"running": 4, "waiting": 2})
    mark = json.loads(chrome.dropped("gpu", 5_000, 17))
    assert (mark["ph"], mark["args"]) == ("i", {"records": 17})


def record_steps(path: Path, num_steps: int) -> None:
    handles = [TraceRing.create(track, num_records=64) for track in TRACKS]
    rings = {handle.track: TraceRing(handle) for handle in handles}
    with Recorder(path) as recorder:
        recorder.start([TraceRing(handle) for handle in handles], "a test")
        for handle in handles:
            os.close(handle.fd)
        for ticket in range(1, num_steps + 1):
            for track, rows in one_step(ticket, 1_000 * ticket).items():
                for row in rows.tolist():
                    rings[track].write(*row)


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_a_closed_file_is_json_with_everything_that_was_recorded(name: str, tmp_path: Path) -> None:
    record_steps(tmp_path / name, 20)
    data = (tmp_path / name).read_bytes()
    events = json.loads(gzip.decompress(data) if name.endswith(".gz") else data)
    assert all({"name", "ph", "pid", "tid", "ts"} <= set(event) for event in events)
    assert events == load_events(tmp_path / name)
    timeline = load_timeline(tmp_path / name)
    assert timeline.label == "a test"
    assert [bar.args["ticket"] for bar in timeline.steps] == list(range(1, 21))


def test_a_file_that_is_cut_off_anywhere_gives_all_events_before_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    record_steps(path, 2)
    whole, data = load_events(path), path.read_bytes()
    for length in range(2, len(data), 11):
        path.write_bytes(data[:length])
        events = load_events(path)
        assert events == whole[: len(events)]
        assert len(events) >= data[:length].count(b"}},\n")


def test_a_packed_file_that_is_cut_off_gives_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "t.json.gz"
    record_steps(path, 20)
    whole, data = load_events(path), path.read_bytes()
    first = zlib.decompressobj(wbits=31)
    first.decompress(data)
    for length in range(len(data) - len(first.unused_data), len(data), 7):
        path.write_bytes(data[:length])
        events = load_events(path)
        assert events == whole[: len(events)]


def test_lost_records_are_reported_in_the_file_and_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.timeline.recorder.DRAIN_INTERVAL_S", threading.TIMEOUT_MAX)
    record_steps(tmp_path / "t.json", 30)  # 90 records of the scheduler, room for 64
    marks = [event for event in load_events(tmp_path / "t.json") if event["name"] == "dropped"]
    assert [mark["args"]["records"] for mark in marks] == [26]
    assert "26 records were lost" in caplog.text


def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--timeline .*cannot be written"):
        Recorder(tmp_path / "no such folder" / "t.json")


def test_a_file_that_another_recorder_writes_to_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with Recorder(path) as first:
        first.start([], "a test")
        with pytest.raises(ConfigError, match=r"--timeline .*t\.json: another engine writes to it"):
            Recorder(path)
    assert any(event["name"] == "process_labels" for event in load_events(path))
    with Recorder(path) as again:  # the earlier contents are gone
        again.start([], "later")
    assert load_timeline(path).label == "later"


def test_a_disk_that_is_full_and_a_pipe_that_nobody_reads_are_refused_before_anything_is_recorded(
    tmp_path: Path,
) -> None:
    with Recorder("/dev/full") as recorder, pytest.raises(ConfigError, match=r"--timeline /dev/full: .*No space left"):
        recorder.start([], "a test")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"--timeline .*pipe: cannot be written"):
        Recorder(tmp_path / "pipe")


@pytest.mark.parametrize(
    "content",
    [
        b"", b'{"traceEvents": []}', b"[\nnonsense\n]\n", b"\x1f\x8bnonsense",
        b"[\n1,\n2\n]\n", b'[\n{"temperature": 0.5}\n]\n', b'[\n{"name": "step", "ph": "X", "pid": 1, "ts": 1}\n]\n',
    ],
)  # fmt: skip
def test_a_file_that_is_no_timeline_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"t\.json"):
        load_timeline(path)
