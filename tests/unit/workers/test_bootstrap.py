"""Bootstraps and descriptors on their way to a worker, at birth and afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from ipc.codec import encode
from ipc.descriptor_passing import descriptor_channel, send_with_descriptors
from ipc.errors import EngineUnavailable
from ipc.stats_page import StatsHandle
from workers.bootstrap import BootstrapChannel, WorkerBootstrap


class Bootstrap(msgspec.Struct, frozen=True, kw_only=True):
    worker: WorkerBootstrap


class Launcher:
    """The other end. A descriptor is a file whose size is the number in its key."""

    def __init__(self) -> None:
        self.channel, theirs = descriptor_channel()
        self.worker = BootstrapChannel(theirs, Bootstrap)
        self.theirs = theirs
        self.before = set(os.listdir("/proc/self/fd"))

    def send(self, *keys: str, new: list[str]) -> None:
        """A bootstrap that names these keys, with the descriptors of `new`."""
        files = [os.memfd_create(key) for key in new]
        for key, file in zip(new, files, strict=True):
            os.ftruncate(file, int(key.rpartition("@")[2]))
        sockets = {key: place for place, key in enumerate(keys)}
        worker = WorkerBootstrap(
            role="gpu", descriptors=list(keys), sockets=sockets, doorbell_fd=0, stats=StatsHandle("gpu", 0, ()),
            launcher_pid=1,
        )  # fmt: skip
        send_with_descriptors(self.channel, encode(Bootstrap(worker=worker)), files)
        for file in files:
            os.close(file)

    def receive(self) -> dict[str, int]:
        """The worker's descriptors by key."""
        numbers: dict[str, int] = self.worker.receive().worker.sockets
        assert {key: os.fstat(fd).st_size for key, fd in numbers.items()} == {
            key: int(key.rpartition("@")[2]) for key in numbers
        }
        return numbers

    def num_open(self) -> int:
        return len(set(os.listdir("/proc/self/fd")) - self.before)


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    made = Launcher()
    try:
        yield made
    finally:
        made.channel.close()
        made.theirs.close()
        for fd in made.worker._numbers.values():
            os.close(fd)


def test_only_new_descriptors_travel_and_those_that_are_not_named_any_more_are_closed(launcher: Launcher) -> None:
    launcher.send("ring@1", "bell@7", new=["ring@1", "bell@7"])
    first = launcher.receive()
    launcher.worker.close_unnamed()
    launcher.send("bell@7", "ring@2", new=["ring@2"])
    second = launcher.receive()
    assert second["bell@7"] == first["bell@7"]
    assert os.fstat(first["ring@1"]).st_size == 1, "it must stay open until the role has let go of it"
    launcher.worker.close_unnamed()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first["ring@1"])
    assert launcher.num_open() == 2


def test_several_bootstraps_wait_for_a_worker_that_is_late(launcher: Launcher) -> None:
    assert not launcher.worker.has_more()
    launcher.send("ring@1", "bell@7", new=["ring@1", "bell@7"])
    launcher.send("ring@2", "bell@7", new=["ring@2"])
    launcher.send("ring@3", "bell@7", new=["ring@3"])
    seen: list[Any] = []
    while launcher.worker.has_more():
        seen.append(list(launcher.receive()))
        launcher.worker.close_unnamed()
    assert seen == [["ring@1", "bell@7"], ["ring@2", "bell@7"], ["ring@3", "bell@7"]]
    assert launcher.num_open() == 2


def test_a_launcher_that_has_ended_is_noticed_behind_its_last_bootstrap(launcher: Launcher) -> None:
    launcher.send("ring@1", new=["ring@1"])
    launcher.channel.close()
    assert list(launcher.receive()) == ["ring@1"]
    assert launcher.worker.has_more()
    with pytest.raises(EngineUnavailable, match="the launcher ended"):
        launcher.worker.receive()
