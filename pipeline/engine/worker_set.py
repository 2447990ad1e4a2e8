"""The processes of a running engine and the launcher's control channel to them: spawn, tell, hear, rewire, bury."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import zmq

from ipc.channels import bind_private_router, receive_from, send_to
from ipc.identity import name_of
from ipc.messages import Start, WorkerToLauncher
from pipeline.engine.child_process import ChildProcess, SpareProcess
from pipeline.engine.instances import Process
from pipeline.engine.shared_resources import SharedResources
from pipeline.engine.topology import CONTROL
from pipeline.engine.wiring import Wiring

logger = logging.getLogger(__name__)


class WorkerSet:
    """The live processes by name. `wiring` is the present one; `poller` hears of messages and of deaths."""

    def __init__(
        self, wiring: Wiring, resources: SharedResources, context: zmq.Context[Any], poller: zmq.Poller
    ) -> None:
        self.wiring = wiring
        self.info: dict[str, int] = {}  # Ready.info of all processes
        self._resources = resources
        self._poller = poller
        self._workers: dict[str, ChildProcess] = {}
        self._spares: dict[str, SpareProcess | None] = {}  # by module; None: it cannot be spawned
        (listener,) = resources.descriptors([wiring.listener_key(CONTROL)])
        self._control = bind_private_router(context, listener)
        poller.register(self._control, zmq.POLLIN)

    def __iter__(self) -> Iterator[ChildProcess]:
        return iter(list(self._workers.values()))

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, name: str) -> ChildProcess | None:
        return self._workers.get(name)

    def spawn(self, processes: Iterable[Process]) -> dict[str, int]:
        """Start these processes, in order. Returns their ids by name."""
        pids = {}
        for process in processes:
            plan, spare = self.wiring.plan(process), self._take_spare(process.role.module)
            worker = self._workers[process.name] = ChildProcess(plan, self._resources.descriptors, spare)
            self._poller.register(worker.pidfd, zmq.POLLIN)
            pids[process.name] = worker.pid
        return pids

    def keep_spares(self) -> None:
        """Start a spare process for each role that has one and lacks it. A spare that died is not started again."""
        for role in self.wiring.table.roles:
            if role.has_spare(self.wiring.facts.config) and role.module not in self._spares:
                self._spares[role.module] = None
                try:
                    self._spares[role.module] = SpareProcess(role.module)
                except OSError as error:  # the engine serves without
                    logger.warning("no spare process of %s: %s", role.module, error)

    def _take_spare(self, module: str) -> SpareProcess | None:
        spare = self._spares.get(module)
        if spare is None or not spare.is_alive:
            return None
        return self._spares.pop(module)

    def replace(self, wiring: Wiring, started: tuple[Process, ...]) -> dict[str, int]:
        """Start processes again, and tell those that they meet. Those that still live are killed.

        Returns the new ids by name. Raises RingError or OSError if memory, descriptors or processes are used up, and
        EngineUnavailable if no socket can be made.
        """
        names = {process.name for process in started}
        self._end(worker for worker in self if worker.name in names)
        self._resources.renew(wiring, started)
        self.wiring = wiring
        for process in wiring.neighbours(names):
            self._rewire(process)
        return self.spawn(started)

    def _rewire(self, process: Process) -> None:
        worker = self._workers.get(process.name)
        if worker is None:
            return
        try:
            worker.send(self.wiring.plan(process))
        except OSError as error:  # it has just died; or it hangs, and has read nothing for many restarts
            logger.debug("%s cannot be told of its new peers: %s", process.name, error)
            worker.kill()

    def tell(self, name: str, message: Any) -> bool:
        """Whether the process lives and is connected."""
        return name in self._workers and send_to(self._control, self.wiring.identity(name), message)

    def start(self, worker: ChildProcess) -> bool:
        """Tell a process to begin. False: it is not connected yet, or has died."""
        worker.is_started = self.tell(worker.name, Start(info=self.info))
        worker.serves = worker.is_started and not worker.role.is_front and not worker.role.starts_after
        return worker.is_started

    def hear(self, timeout_ms: int = 0) -> Iterator[tuple[ChildProcess, Any]]:
        """Messages of live processes, in order. Those of processes that have been replaced are dropped."""
        if timeout_ms and not self._control.poll(timeout_ms):
            return
        for identity, message in receive_from(self._control, WorkerToLauncher):
            worker = self._workers.get(name_of(identity))
            if worker is not None and identity == self.wiring.identity(worker.name):
                yield worker, message

    def bury(self, name: str) -> None:
        """Wait for a process's end and forget it."""
        worker = self._workers.pop(name)
        if worker.pidfd in self._poller:
            self._poller.unregister(worker.pidfd)
        worker.bury()

    def kill_all(self) -> None:
        for spare in self._spares.values():
            if spare is not None:
                spare.end()
        self._spares.clear()
        self._end(self)

    def _end(self, workers: Iterable[ChildProcess]) -> None:
        """Kill processes, all at once, and wait for their ends."""
        ending = list(workers)
        for worker in ending:
            worker.kill()
        for worker in ending:
            self.bury(worker.name)
