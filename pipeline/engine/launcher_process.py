"""Owns the launcher process of a Pipeline. Knows neither configurations nor clients.

The engine ends when this process ends, even if this process is killed: the launcher watches the other end of a pipe,
the lifeline.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final

from pipeline.engine.config import STANDARD_INPUT
from pipeline.environment import forks
from pipeline.environment.descriptors import check_room, hold_standard_descriptors
from pipeline.environment.module_search import module_command, module_environment

HASTE_S: Final = 15.0  # time for the engine to end, besides the time for draining
_LONGEST_POLL_MS: Final = 1e6
_STATUS_BYTES: Final = 65_536
_NUM_DESCRIPTORS: Final = 16  # that this process opens to start an engine
_live: Final[weakref.WeakSet[EngineProcess]] = weakref.WeakSet()


class EngineProcess:
    """A launcher process with `config` (TOML) as its standard input.

    Its output goes to `log`. `folder`, if given, is removed after the launcher has ended. Dropping the last reference
    stops the engine at once, and so does the exit of the interpreter. The copy of this object in a forked child owns
    nothing.
    """

    def __init__(self, config: str, arguments: Sequence[str], *, log: IO[bytes], folder: Path | None) -> None:
        hold_standard_descriptors()
        check_room(_NUM_DESCRIPTORS, "starting an engine")
        self.owner_pid = os.getpid()
        self._folder = folder
        self._lifeline: IO[bytes] | None = None
        self._status: IO[bytes] | None = None
        self._heard: deque[dict[str, Any]] = deque()  # events that nobody has taken yet
        self._half_line = b""
        self._status_lock = threading.Lock()
        forks.register(self)
        with contextlib.ExitStack() as started, contextlib.ExitStack() as failed:
            # A file instead of a pipe: if another thread forks meanwhile, the child would keep a pipe open.
            stdin = started.enter_context(tempfile.TemporaryFile())
            stdin.write(config.encode())
            stdin.seek(0)
            self._status, status_writer = _pipe()
            failed.enter_context(self._status)
            os.set_blocking(self._status.fileno(), False)
            started.enter_context(status_writer)
            lifeline_reader, self._lifeline = _pipe()
            failed.enter_context(self._lifeline)
            started.enter_context(lifeline_reader)
            status_fd, lifeline_fd = status_writer.fileno(), lifeline_reader.fileno()
            self.process = subprocess.Popen(
                module_command(
                    "pipeline.launch", "--config", STANDARD_INPUT,
                    "--status-fd", str(status_fd), "--lifeline-fd", str(lifeline_fd), *arguments,
                ),
                stdin=stdin, stdout=log, stderr=log, pass_fds=(status_fd, lifeline_fd), env=module_environment(),
                process_group=0,
            )  # fmt: skip
            failed.pop_all()
        pipes = (self._lifeline, self._status)
        weakref.finalize(self, _end_dropped, self.process, pipes, folder, os.getpid()).atexit = False
        _live.add(self)

    def events(self, timeout_s: float | None) -> Iterator[dict[str, Any]]:
        """The launcher's events until it ends. Raises TimeoutError after `timeout_s` seconds."""
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        with contextlib.ExitStack() as stack:
            pidfd = os.pidfd_open(self.process.pid)
            stack.callback(os.close, pidfd)
            poller = select.poll()  # not select(): the user's process may have more than 1,024 descriptors open
            if self._status is not None:
                poller.register(self._status, select.POLLIN)
            poller.register(pidfd, select.POLLIN)
            while True:
                left_ms = min(max(0.0, deadline - time.monotonic()) * 1e3, _LONGEST_POLL_MS)
                ready = [fd for fd, _ in poller.poll(left_ms)]
                if not ready and time.monotonic() >= deadline:
                    raise TimeoutError
                if not ready:
                    continue
                yield from self.pending_events()
                if pidfd in ready or self._status is None:
                    return

    def pending_events(self) -> Iterator[dict[str, Any]]:
        """The launcher's events that have arrived already. None in a forked child: they belong to its parent."""
        if self.owner_pid == os.getpid():
            self._read_status()
        while self._heard:
            yield self._heard.popleft()

    def _read_status(self) -> None:
        with self._status_lock:
            while self._status is not None and (chunk := self._status.read(_STATUS_BYTES)) is not None:
                if not chunk:
                    self._close_status()
                *lines, self._half_line = (self._half_line + chunk).split(b"\n")
                self._heard += map(json.loads, lines)

    def poll(self) -> int | None:
        """The launcher's exit status, or None while it runs."""
        return self.process.poll()

    def has_ended(self) -> bool:
        """Whether the launcher has ended. Any thread may ask, and so may a forked child, which cannot `poll()` it."""
        if self.process.returncode is not None:
            return True
        try:
            pidfd = os.pidfd_open(self.process.pid)
        except ProcessLookupError:
            return True
        except OSError:  # no descriptor is free
            return False
        try:
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            return bool(poller.poll(0))
        finally:
            os.close(pidfd)

    def wait(self, timeout_s: float | None) -> int:
        """Wait until the engine ends by itself, and return its exit status. Raises TimeoutError."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the engine still runs after {timeout_s:g} s") from None
        _remove(self._folder)
        return status

    def end(self, drain_s: float | None = None) -> int:
        """End the engine and return its exit status.

        The engine may take `drain_s` seconds to finish open requests. None = it stops at once; open requests fail.
        """
        timeout_s = HASTE_S
        try:
            if drain_s is None:
                self._cut_lifeline()
            elif self.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                timeout_s += drain_s
            status = _end(self.process, timeout_s, self._folder)
        finally:  # after an interrupted wait the engine stops at once
            self._cut_lifeline()
        return status

    def forget_parent(self) -> None:
        self._cut_lifeline()  # our copy would keep the engine alive after the parent's end
        self._close_status()

    def _cut_lifeline(self) -> None:
        if self._lifeline is not None:
            self._lifeline.close()

    def _close_status(self) -> None:
        if self._status is not None:
            self._status.close()
            self._status = None


def _pipe() -> tuple[IO[bytes], IO[bytes]]:
    reader, writer = os.pipe()
    return open(reader, "rb", buffering=0), open(writer, "wb", buffering=0)


def _end(process: subprocess.Popen[bytes], timeout_s: float, folder: Path | None) -> int:
    """Wait for the process, kill it after `timeout_s` seconds, and remove its folder. Returns the exit status."""
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    _remove(folder)
    return status


def _remove(folder: Path | None) -> None:
    """Remove the folder of a launcher that was killed. A launcher that ends in order removes it itself."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _end_dropped(
    process: subprocess.Popen[bytes], pipes: Sequence[IO[bytes]], folder: Path | None, owner_pid: int
) -> None:
    """The finalizer. It must not wait, because it may run in any thread at any time."""
    if os.getpid() != owner_pid:
        return
    for pipe in pipes:
        pipe.close()
    if process.poll() is not None:
        _remove(folder)
        return
    if sys.is_finalizing():  # the new thread would never run
        return
    with contextlib.suppress(RuntimeError):  # no thread can start: the engine still ends, by its lifeline
        threading.Thread(target=_end, args=(process, HASTE_S, folder), name="ringfeed-reaper").start()


@atexit.register
def _end_all() -> None:
    for engine in list(_live):
        if engine.owner_pid == os.getpid():
            engine.end()
