"""Starts processes again that have died, and kills those that hang. Decides when an engine cannot go on.

    died     new epochs for the processes that restart with it; those that they meet are rewired
    go_on    each Ready -> Start; pings; hanging processes are killed; the fronts hear whether the engine serves

`wiring.py` says which processes belong together.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Final

from ipc.errors import RingfeedError
from ipc.messages import Busy, Drain, EngineState, Failed, Ping, Pong, Ready
from pipeline.engine.announcer import Announcer
from pipeline.engine.child_process import ChildProcess
from pipeline.engine.heartbeats import Heartbeats
from pipeline.engine.restarts import RestartBudget
from pipeline.engine.role_settings import EngineFacts
from pipeline.engine.supervisor_config import SupervisorConfig
from pipeline.engine.worker_set import WorkerSet

logger = logging.getLogger(__name__)

_POLL_S: Final = 0.02  # until a process is connected that is started before it says anything


class Recovery:
    """Until the engine was ready for the first time, nothing is started again."""

    def __init__(self, workers: WorkerSet, announcer: Announcer, config: SupervisorConfig) -> None:
        self._workers = workers
        self._announcer = announcer
        self._heartbeats = Heartbeats(config)
        self._budget = RestartBudget(config)
        self._serves = True

    # What the supervisor hears

    def spawned(self, pids: dict[str, int]) -> None:
        """These processes have been spawned."""
        for name in pids:
            self._heartbeats.began(name, time.monotonic())
        self._announcer.spawned(pids)

    def ready(self, worker: ChildProcess, message: Ready) -> None:
        """A process has loaded, or serves."""
        # What the first GPU process has found out holds for its successors.
        self._workers.info = {**message.info, **self._workers.info}
        worker.is_ready, worker.serves = True, worker.is_started
        self._heartbeats.ready(worker.name, time.monotonic())
        self._announcer.worker_ready(worker.name)

    def answered(self, worker: ChildProcess, message: Pong) -> None:
        self._heartbeats.answered(worker.name, message.stalled_s, time.monotonic())

    def busy(self, worker: ChildProcess, message: Busy) -> None:
        self._heartbeats.busy(worker.name, message.seconds, time.monotonic())

    def failed(self, worker: ChildProcess, message: Failed) -> None:
        """A process says that it ends, and why."""
        worker.last_words = f"{worker.name} failed: {message.error_message}"
        self._heartbeats.ends(worker.name, time.monotonic())

    # What follows

    def timeout_s(self) -> float:
        """The longest time until the next `go_on`."""
        if self._announcer.is_ready and any(each.role.starts_after and not each.is_started for each in self._workers):
            return _POLL_S  # a new connection sends no event
        return self._heartbeats.timeout_s(time.monotonic())

    def died(self, name: str, what: str) -> str | None:
        """A process has died, and is buried. `what` says how. Returns why the engine cannot go on; None: it can."""
        if not self._announcer.is_ready:
            return what
        role = self._workers.wiring.process(name).role.name
        if why := self._budget.spend(role, time.monotonic()):
            return f"{what}; {why}"
        group = self._workers.wiring.restart_group(name)
        wiring, started = self._workers.wiring.after_death(name, self._facts(), self._heartbeats.starting(group))
        names = [process.name for process in started]
        for each in names:
            self._heartbeats.ended(each)
        logger.error("%s: starting %s again", what, ", ".join(names))
        self._tell_fronts(names)  # before their clients hear `Interrupted`, so that a front that drains waits for them
        try:
            pids = self._workers.replace(wiring, started)
        except (RingfeedError, OSError) as error:  # no memory, no descriptors, or no further process
            return f"{what}; it cannot be started again: {error}"
        self.spawned(pids)
        return None

    def go_on(self, *, drains: bool) -> None:
        """Do what is due. `drains`: the fronts are to finish open requests and take no new ones."""
        now = time.monotonic()
        if self._announcer.is_ready:
            for worker in self._workers:
                if not worker.is_started and (worker.is_ready or worker.role.starts_after):
                    self._workers.start(worker)
        for name in self._heartbeats.round_due(now):
            self._workers.tell(name, Ping())
        for name, why in self._heartbeats.hung(now).items():
            if (hanging := self._workers.get(name)) is not None:  # its death then counts like any other
                hanging.last_words = hanging.last_words or f"{why}, and was killed"
                hanging.serves = False
                hanging.kill()
            self._heartbeats.killed(name)
        if self._announcer.is_ready:
            self._tell_fronts()
            if self._serves and not drains:
                self._workers.keep_spares()
        for worker in self._workers:
            if drains and worker.role.is_front and worker.serves and not worker.is_draining:
                worker.is_draining = self._workers.tell(worker.name, Drain())

    def _facts(self) -> EngineFacts:
        """With what the first GPU process has found out: one that takes its place must do with the same."""
        facts, info = self._workers.wiring.facts, self._workers.info
        return dataclasses.replace(facts, num_blocks=info["num_blocks"], device_bytes=info.get("device_bytes", 0))

    def _tell_fronts(self, dead: Sequence[str] = ()) -> None:
        """Tell the fronts whether the engine serves, if that has changed or they are new. `dead` do not."""
        suspects = self._heartbeats.suspects(time.monotonic())
        waiting = [*dead, *(worker.name for worker in self._workers if not worker.serves and worker.name not in dead)]
        texts = [*suspects.values(), *([f"started again, not ready yet: {', '.join(waiting)}"] if waiting else [])]
        state = EngineState(state="recovering" if texts else "ready", detail="; ".join(texts))
        if not texts and not self._serves:
            logger.info("all processes serve again")
        self._serves = not texts
        for worker in self._workers:
            if worker.role.is_front and worker.is_started and worker.told_state != state:
                worker.told_state = state if self._workers.tell(worker.name, state) else None
