"""Death, signals and misuse: every open request is answered, the exit status says so, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ipc.errors import EngineUnavailable
from pipeline import Client, Output, Pipeline, SamplingParams
from pipeline.client.endpoint import default_endpoint
from tests.integration.conftest import TINY_CONFIG

ENDLESS = SamplingParams(ignore_eos=True)
NULL = {"model.load_format": "null", "model.null_step_ms": 5.0}  # starts fast, and is busy as long as one likes


@pytest.fixture
def runtime_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where engines put their sockets, for one test alone; a short path, because sockets want one. It ends empty."""
    folder = Path(tempfile.mkdtemp(prefix="rf-"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    yield folder
    deadline = time.monotonic() + 10
    while (left := list(folder.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.02)
    shutil.rmtree(folder)
    assert not left, "an engine left something behind"


def open_streams(pipeline: Pipeline, count: int) -> list[threading.Thread]:
    """Streams under way, each consumed by a thread that records how it ended in `.result`."""

    def consume(thread: list[object]) -> None:
        try:
            last: Output | None = None
            for output in pipeline.client.generate("A module is", ENDLESS, stream=True):
                last = output
                begun.release()
            thread.append(last)
        except Exception as error:
            thread.append(error)

    begun = threading.Semaphore(0)
    threads = []
    for _ in range(count):
        result: list[object] = []
        thread = threading.Thread(target=consume, args=(result,))
        thread.result = result  # type: ignore[attr-defined]
        thread.start()
        threads.append(thread)
    for _ in range(2 * count):
        assert begun.acquire(timeout=60)
    return threads


def ends(threads: list[threading.Thread]) -> list[object]:
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive(), "a stream hangs"
    return [thread.result[0] for thread in threads]  # type: ignore[attr-defined]


@pytest.mark.parametrize("role", ["gpu", pytest.param("gateway", marks=pytest.mark.slow)])
def test_an_engine_that_may_restart_nothing_ends_with_a_worker_and_every_request_is_told(
    role: str, runtime_folder: Path
) -> None:
    with Pipeline(TINY_CONFIG, NULL | {"supervisor.max_restarts": 0}) as pipeline:
        pids = dict(pipeline.pids)
        threads = open_streams(pipeline, 6)
        os.kill(pids[role], signal.SIGKILL)
        for end in ends(threads):
            assert isinstance(end, EngineUnavailable), end
        assert pipeline.wait(timeout_s=20) == 1
    assert not [pid for pid in pids.values() if psutil.pid_exists(pid)]


def test_a_killed_launcher_takes_everything_with_it(runtime_folder: Path) -> None:
    with Pipeline(TINY_CONFIG, NULL) as pipeline:
        pids = dict(pipeline.pids)
        threads = open_streams(pipeline, 6)
        os.kill(pids["launcher"], signal.SIGKILL)
        for end in ends(threads):
            assert isinstance(end, EngineUnavailable), end
    workers = [psutil.Process(pid) for pid in pids.values() if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


@pytest.mark.slow
@pytest.mark.parametrize("is_named", [False, True])
def test_a_killed_launchers_endpoint_goes_with_its_folder_unless_the_user_named_it(
    is_named: bool, runtime_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    named = tmp_path_factory.mktemp("n")
    command = [sys.executable, "-m", "pipeline.launch", "--config", str(TINY_CONFIG)]
    command += ["--set", "model.load_format=null", "--set", "model.null_step_ms=5"]
    endpoint = f"ipc://{named}/s" if is_named else default_endpoint()
    if is_named:
        command += ["--set", f"frontend.endpoint={endpoint}"]
    with subprocess.Popen(command) as launcher:
        try:
            with Client(endpoint) as client:
                client.wait_ready(timeout_s=60)
            workers = psutil.Process(launcher.pid).children()
        finally:
            launcher.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    assert list((named if is_named else runtime_folder).iterdir()) == []


def test_an_engine_without_standard_streams_serves(runtime_folder: Path) -> None:
    command = [sys.executable, "-m", "pipeline.launch", "--config", str(TINY_CONFIG), "--set", "model.load_format=null"]
    with subprocess.Popen(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]) as launcher:
        try:
            with Client(default_endpoint()) as client:
                client.wait_ready(timeout_s=60)
                assert client.generate("A module is", SamplingParams(max_tokens=3)).error is None
        finally:
            launcher.terminate()
    assert launcher.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_open_requests_to_their_end(number: signal.Signals, runtime_folder: Path) -> None:
    with Pipeline(TINY_CONFIG, NULL) as pipeline:
        stream = pipeline.client.generate("A module is", SamplingParams(max_tokens=100, ignore_eos=True), stream=True)
        first = next(stream)
        os.kill(pipeline.pids["launcher"], number)
        pieces = [first, *stream]
        assert pieces[-1].finish_reason == "length"
        assert sum(len(piece.token_ids) for piece in pieces) == 100
        assert pipeline.wait(timeout_s=20) == 0


def test_a_second_signal_stops_at_once(runtime_folder: Path) -> None:
    with Pipeline(TINY_CONFIG, {**NULL, "model.null_step_ms": 100.0}) as pipeline:
        threads = open_streams(pipeline, 2)
        os.kill(pipeline.pids["launcher"], signal.SIGINT)
        while pipeline.client.health().state != "draining":
            pass
        os.kill(pipeline.pids["launcher"], signal.SIGINT)
        assert all(isinstance(end, EngineUnavailable) for end in ends(threads))
        assert pipeline.wait(timeout_s=10) == 130


def test_an_endpoint_in_use_is_refused_and_not_stolen() -> None:
    with Pipeline(TINY_CONFIG, NULL) as pipeline:
        command = [sys.executable, "-m", "pipeline.launch", "--config", str(TINY_CONFIG)]
        command += ["--set", "model.load_format=null", "--set", f"frontend.endpoint={pipeline.endpoint}"]
        second = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert second.returncode != 0
        assert pipeline.endpoint in second.stderr
        assert pipeline.client.generate("A module is", SamplingParams(max_tokens=3)).error is None


def test_a_timeline_that_cannot_be_written_ends_the_launch_and_leaves_nothing(runtime_folder: Path) -> None:
    command = [sys.executable, "-m", "pipeline.launch", "--config", str(TINY_CONFIG), "--timeline", "/dev/full"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--timeline /dev/full: cannot be written" in done.stderr
