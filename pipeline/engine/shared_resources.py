"""Everything that the processes of one engine share: memory, doorbells, and the folder of the internal sockets.

Opens a descriptor for every key of a `Wiring` and keeps it until `close()`, so that the launcher can give it to a
worker at any time. The kernel frees the memory when the launcher and all workers have ended, however they end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable

from ipc.doorbell import Doorbell
from ipc.errors import EngineUnavailable
from ipc.ring import Ring
from ipc.stats_page import StatsPage
from ipc.trace import TraceRing
from pipeline.engine.wiring import Wiring, doorbell_key, ring_key, stats_key, trace_key


class SharedResources:
    """Raises EngineUnavailable if the run folder cannot be made, RingError if there is not enough memory.

    With `EngineFacts.traced`, `traces` has the reader's side of every thread's trace ring, in the order of the
    timeline. They stay valid after `close()`.
    """

    def __init__(self, wiring: Wiring) -> None:
        facts = wiring.facts
        self.run_folder = facts.run_folder
        self.traces: list[TraceRing] = []
        self._numbers = dict(facts.lent)  # descriptors by key
        self._opened = contextlib.ExitStack()
        try:
            self.run_folder.mkdir(mode=0o700)
        except OSError as error:
            raise EngineUnavailable(
                f"cannot make a folder for the engine's internal sockets in {self.run_folder.parent}: "
                f"{error.strerror}: set XDG_RUNTIME_DIR to a folder that can be written to"
            ) from None
        try:
            self._open(wiring)
        except BaseException:
            self.close()
            raise

    def descriptors(self, keys: Iterable[str]) -> list[int]:
        """The numbers of these descriptors in this process."""
        return [self._numbers[key] for key in keys]

    def remove_run_folder(self) -> None:
        """Remove the internal sockets from the file system. Connections that stand are not affected."""
        shutil.rmtree(self.run_folder, ignore_errors=True)

    def close(self) -> None:
        """Close every descriptor and remove the run folder."""
        self._opened.close()
        self.remove_run_folder()

    def _open(self, wiring: Wiring) -> None:
        for process in wiring.processes:
            self._keep(doorbell_key(process.name), Doorbell.create().fd)
            page = StatsPage.create(process.name, process.role.counters, process.role.arrays)
            self._keep(stats_key(process.name), page.fd)
        for ring in wiring.rings:
            row, facts = ring.row, wiring.facts
            made = Ring.create(ring.name, row.layout(facts), row.num_records(facts), wiring.epoch(ring.name))
            made.close()  # the launcher neither reads nor writes it
            self._keep(ring_key(ring.name), made.handle.fd)
        for track in wiring.tracks if wiring.facts.traced else ():
            handle = TraceRing.create(track)
            self._keep(trace_key(track), handle.fd)
            self.traces.append(TraceRing(handle))

    def _keep(self, key: str, descriptor: int) -> None:
        self._numbers[key] = descriptor
        self._opened.callback(os.close, descriptor)
