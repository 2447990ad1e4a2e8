"""The launcher's progress messages while the engine starts."""

from __future__ import annotations

import json
import logging
import os

import pytest

from ipc.messages import Progress
from pipeline.engine.announcer import Announcer


def test_weights_are_counted_in_bytes_and_other_stages_in_percent(caplog: pytest.LogCaptureFixture) -> None:
    announcer = Announcer("ipc:///nowhere", "model", "details")
    with caplog.at_level(logging.INFO):
        for fraction in (0.0, 0.01, 0.4, 1.0):
            announcer.progress(
                Progress(role="gpu", stage="loading weights", fraction=fraction, total_bytes=16_060_000_000)
            )
        announcer.progress(Progress(role="gpu", stage="loading", fraction=0.5, total_bytes=2_500_000))
        announcer.progress(Progress(role="gpu", stage="capturing graphs", fraction=0.5))
    assert caplog.messages == [
        "gpu: loading weights (0 %, 0.0 of 16.1 GB)",
        "gpu: loading weights (40 %, 6.4 of 16.1 GB)",
        "gpu: loading weights (100 %, 16.1 of 16.1 GB)",
        "gpu: loading (50 %, 1.2 of 2.5 MB)",
        "gpu: capturing graphs (50 %)",
    ]


def test_on_a_terminal_the_same_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    announcer = Announcer("ipc:///nowhere", "model", "details")
    announcer.progress(Progress(role="gpu", stage="loading weights", fraction=0.4, total_bytes=16_060_000_000))
    announcer.close()
    assert "6.4 of 16.1 GB" in capsys.readouterr().err


def test_a_program_that_reads_its_events_late_misses_no_process() -> None:
    reader, writer = os.pipe()
    announcer = Announcer("ipc:///nowhere", "model", "details", writer)
    rounds = 2_000  # far more than a pipe holds
    for number in range(rounds):
        announcer.spawned({f"worker.{number % 7}": number})
    chunks = os.read(reader, 1 << 20)
    announcer.spawned({"last": 1})
    announcer.close()
    with os.fdopen(reader, "rb") as rest:
        chunks += rest.read()
    pids: dict[str, int] = {}
    for line in chunks.splitlines():
        pids |= json.loads(line)["pids"]
    newest = {f"worker.{number % 7}": number for number in range(rounds)}
    assert pids == newest | {"last": 1}
