"""Behaviour that all worker processes share, tested in this process."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipc.doorbell import Doorbell
from ipc.stats_page import StatsPage
from tests.unit.workers.private_sockets import PrivateSockets
from workers import process as worker_process
from workers.bootstrap import WorkerBootstrap
from workers.process import WorkerProcess


class Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def process(tmp_path: Path) -> Iterator[WorkerProcess]:
    bell, page, sockets = Doorbell.create(), StatsPage.create("gpu", ()), PrivateSockets(tmp_path)
    process = WorkerProcess(
        WorkerBootstrap(
            role="gpu", sockets=sockets.sockets, doorbell_fd=bell.fd, stats=page, launcher_pid=os.getpid(),
        )
    )  # fmt: skip
    try:
        yield process
    finally:
        gc.enable()
        gc.unfreeze()
        process.context.destroy(linger=0)
        bell.close()
        sockets.close()
        os.close(page.fd)


def counted(process: WorkerProcess) -> dict[str, Any]:
    return {name: value for name, value in process.stats_page.snapshot().items() if "num_" in name}


def make_cycles(count: int) -> None:
    for _ in range(count):
        Cycle()


def test_garbage_is_collected_once_the_process_is_idle(process: WorkerProcess) -> None:
    process.ready()
    make_cycles(2_000)
    process.doorbell.ring()
    process.wait(10_000)  # there is something to do
    process.wait(0)
    assert counted(process)["num_collections"] == 0
    process.wait(worker_process.IDLE_MS + 1)
    assert counted(process)["num_collections"] == 1
    assert counted(process)["num_garbage"] >= 2_000
    process.wait(worker_process.IDLE_MS + 1)
    assert counted(process)["num_collections"] == 1, "an idle process wakes for no second time"


def test_garbage_of_a_process_that_never_idles_is_bounded(
    process: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "MAX_UNCOLLECTED", 5_000)
    process.ready()
    for _ in range(4):
        make_cycles(2_000)
        process.wait(0)
    assert counted(process)["num_garbage"] >= 6_000


def test_a_process_that_is_started_again_counts_that_on_the_page_of_its_predecessor(process: WorkerProcess) -> None:
    assert counted(process)["num_starts"] == 1
    successor = WorkerProcess(process._bootstrap)
    successor.context.destroy(linger=0)
    assert counted(process)["num_starts"] == 2


def test_what_was_there_before_the_first_request_is_never_looked_at(process: WorkerProcess) -> None:
    loaded = [Cycle() for _ in range(1_000)]
    process.ready()
    assert gc.get_freeze_count() > 1_000
    assert not gc.isenabled()
    assert len(gc.get_objects()) < 1_000
    del loaded
