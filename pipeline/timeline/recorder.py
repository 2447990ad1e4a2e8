"""Drains the workers' trace rings into a file while the engine runs, in a thread of the launcher.

The file lacks only a final "]" after every write, and its readers accept that. So a launcher that is killed leaves a
readable file. If the name ends in ".gz", each write adds a complete gzip member. If a write fails, the recording ends,
but the engine continues.
"""

from __future__ import annotations

import gzip
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

from ipc.errors import ConfigError
from ipc.trace import TraceRing
from pipeline.environment.claimed_file import open_claimed
from pipeline.timeline.chrome import ChromeEvents

logger = logging.getLogger(__name__)

DRAIN_INTERVAL_S: Final = 0.25  # a ring holds several seconds
_COMPRESSION: Final = 4
_NICENESS: Final = 10  # the engine goes first if there are few cores


class Recorder:
    """Records to one file. It is opened at once, so that a path that cannot be written is a ConfigError before any
    process starts."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._is_compressed = self.path.suffix == ".gz"
        self._origin_ns = time.monotonic_ns()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._num_dropped: dict[str, int] = {}
        self._file = open_claimed(self.path, "--timeline")

    def start(self, rings: Sequence[TraceRing], label: str) -> None:
        """Record from now on. `rings` are in the order of the timeline, from top to bottom.

        The scheduler's ring must come before the GPU process's: see ChromeEvents.events. Raises ConfigError if not even
        the beginning can be written.
        """
        self._rings = rings
        self._events = ChromeEvents([ring.track for ring in rings], self._origin_ns)
        try:
            self._write("[\n" + ",\n".join(self._events.names(label)))
        except OSError as error:
            raise self._unwritable(error) from None
        self._thread = threading.Thread(target=self._run, name="timeline", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Drain the rings a last time, end the file, and log the number of lost records."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._file.close()
        if lost := sum(self._num_dropped.values()):
            logger.warning("%s: %d records were lost: the launcher could not keep up", self.path, lost)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(f"--timeline {self.path}: cannot be written: {error.strerror}")

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            while not self._stop.wait(DRAIN_INTERVAL_S):
                self._drain()
            self._drain()
            self._write("\n]\n")
        except OSError as error:
            logger.error("%s: cannot be written any more (%s): the timeline ends here", self.path, error.strerror)

    def _drain(self) -> None:
        records = {ring.track: ring.drain() for ring in self._rings}
        events = self._events.events(records)
        for ring in self._rings:
            if (num_dropped := ring.num_dropped) != self._num_dropped.get(ring.track, 0):
                self._num_dropped[ring.track] = num_dropped
                events.append(self._events.dropped(ring.track, time.monotonic_ns(), num_dropped))
        if events:
            self._write("".join(f",\n{event}" for event in events))

    def _write(self, text: str) -> None:
        data: Any = text.encode()
        if self._is_compressed:
            data = gzip.compress(data, _COMPRESSION)
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]
