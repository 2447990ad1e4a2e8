"""Everything that the processes of one engine share: memory, doorbells, and the internal sockets.

Opens a descriptor for every key of a `Wiring` and keeps it until `close()`, so that the launcher can give it to a
worker at any time. The kernel frees the memory when the launcher and all workers have ended, however they end.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final

from ipc.doorbell import Doorbell
from ipc.private_socket import open_private_socket
from ipc.ring import Ring
from ipc.stats_page import StatsPage
from ipc.trace import TraceRing
from pipeline.client.endpoint import runtime_folder
from pipeline.engine.instances import Process
from pipeline.engine.wiring import Wiring, doorbell_key, ring_key, stats_key, trace_key

_REPLACED: Final = ("ring.", "listener.", "socket.")


class SharedResources:
    """Raises EngineUnavailable if no socket can be made, RingError if there is not enough memory.

    With `EngineFacts.traced`, `traces` has the reader's side of every thread's trace ring, in the order of the
    timeline. They stay valid after `close()`.
    """

    def __init__(self, wiring: Wiring) -> None:
        self.traces: list[TraceRing] = []
        self._numbers = dict(wiring.facts.lent)  # descriptors by key
        self._own: set[str] = set()  # keys of descriptors to close
        self._pages: dict[str, StatsPage] = {}
        try:
            self._open(wiring)
        except BaseException:
            self.close()
            raise

    def descriptors(self, keys: Iterable[str]) -> list[int]:
        """The numbers of these descriptors in this process."""
        return [self._numbers[key] for key in keys]

    def renew(self, wiring: Wiring, started: Iterable[Process]) -> None:
        """What processes need that are started again: rings and sockets of this wiring, and cleared pages.

        Our descriptors of what is replaced are closed. Raises RingError if there is not enough memory.
        """
        for process in started:
            self._pages[process.name].clear()
        rings = {ring_key(ring.name, wiring.ring_epoch(ring)): ring for ring in wiring.rings}
        sockets = {key(name): name for name in wiring.sockets for key in (wiring.listener_key, wiring.socket_key)}
        for key in self._own - rings.keys() - sockets.keys():
            if key.startswith(_REPLACED):
                self._close_key(key)  # first: the new rings need the memory
        self._open_missing(wiring)

    def close(self) -> None:
        """Close every descriptor."""
        self._pages.clear()
        for key in list(self._own):
            self._close_key(key)

    def _open(self, wiring: Wiring) -> None:
        for process in wiring.processes:
            self._keep(doorbell_key(process.name), Doorbell.create().fd)
            page = StatsPage.create(process.name, process.role.counters, process.role.arrays)
            self._keep(stats_key(process.name), page.fd)
            self._pages[process.name] = StatsPage(page)
        self._open_missing(wiring)
        for track in wiring.tracks if wiring.facts.traced else ():
            handle = TraceRing.create(track)
            self._keep(trace_key(track), handle.fd)
            self.traces.append(TraceRing(handle))

    def _open_missing(self, wiring: Wiring) -> None:
        """Open the rings and sockets of this wiring that are not open yet."""
        facts = wiring.facts
        for ring in wiring.rings:
            row, epoch = ring.row, wiring.ring_epoch(ring)
            if (key := ring_key(ring.name, epoch)) not in self._numbers:
                made = Ring.create(ring.name, row.layout(facts), row.num_records(facts), epoch)
                made.close()  # the launcher neither reads nor writes it
                self._keep(key, made.handle.fd)
        for name in wiring.sockets:
            if wiring.socket_key(name) not in self._numbers:
                listener, connector = open_private_socket(runtime_folder())
                self._keep(wiring.listener_key(name), listener)
                self._keep(wiring.socket_key(name), connector)

    def _keep(self, key: str, descriptor: int) -> None:
        self._numbers[key] = descriptor
        self._own.add(key)

    def _close_key(self, key: str) -> None:
        self._own.discard(key)
        os.close(self._numbers.pop(key))
