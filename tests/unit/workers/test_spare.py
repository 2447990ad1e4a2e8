"""A spare process does what needs no bootstrap, and waits for its bootstrap as long as its launcher lives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import zmq

from ipc.channels import receive_from, send_to
from ipc.codec import encode
from ipc.descriptor_passing import descriptor_channel, send_with_descriptors
from ipc.doorbell import Doorbell
from ipc.messages import Ready, Stop, WorkerToLauncher
from ipc.stats_page import StatsPage
from tests.unit.workers.private_sockets import PrivateSockets
from workers.bootstrap import WorkerBootstrap

DEADLINE_S = 20.0
WORKER = """
import msgspec
from workers.bootstrap import WorkerBootstrap
from workers.process import run_worker

class Bootstrap(msgspec.Struct):
    worker: WorkerBootstrap

def run(process, bootstrap):
    process.ready(begun_at_ns=process.begun_at_ns)
    while True:
        process.wait()

run_worker(Bootstrap, run, prepare=lambda: print("prepared", flush=True))
"""


class Bootstrap(msgspec.Struct):
    worker: WorkerBootstrap


@pytest.fixture
def spare() -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
    """The process, prepared, and the launcher's end of its channel."""
    ours, theirs = descriptor_channel()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, "--bootstrap-fd", str(theirs.fileno()), "--spare"],
            pass_fds=(theirs.fileno(),), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    with process, closing(ours):
        assert process.stdout is not None
        assert process.stdout.readline() == "prepared\n"
        yield process, ours
        process.kill()


def test_a_spare_process_begins_when_its_bootstrap_comes(
    spare: tuple[subprocess.Popen[str], socket.socket], tmp_path: Path
) -> None:
    process, channel = spare
    bell, page = Doorbell.create(), StatsPage.create("spare", ())
    sockets = PrivateSockets(tmp_path)
    with zmq.Context() as context, closing(sockets.bind(context, "control")) as control:
        worker = WorkerBootstrap(
            role="spare", sockets={"control": 2}, doorbell_fd=0, stats=msgspec.structs.replace(page, fd=1),
            launcher_pid=os.getpid(), descriptors=["doorbell.spare", "stats.spare", "socket.control@1"],
        )  # fmt: skip
        sent_at_ns = time.monotonic_ns()
        send_with_descriptors(channel, encode(Bootstrap(worker=worker)), [bell.fd, page.fd, sockets.sockets["control"]])
        assert control.poll(DEADLINE_S * 1_000)
        ((identity, message),) = receive_from(control, WorkerToLauncher)
        assert isinstance(message, Ready)
        assert sent_at_ns <= message.info["begun_at_ns"] <= time.monotonic_ns(), "its wait counts as its start"
        send_to(control, identity, Stop())
        assert process.wait(DEADLINE_S) == 0
    bell.close()
    sockets.close()
    os.close(page.fd)


def test_a_spare_process_ends_with_a_launcher_that_never_needed_it(
    spare: tuple[subprocess.Popen[str], socket.socket],
) -> None:
    process, channel = spare
    channel.close()
    assert process.wait(DEADLINE_S) == 1
