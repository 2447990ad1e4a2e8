"""Starts the workers, watches them, starts them again if they die or hang, and ends them so that nothing is left.

    up      spawn all; roles that others depend on Ready -> Start(the scheduler); all Ready -> Start(the others), the
            fronts last
    serve   sleep until a signal, a worker's death or its Failed, or until a worker hangs
            a death:        new epochs for the processes that restart with it; those that they meet are rewired;
                            each Ready -> Start; all serve again -> EngineState(ready) to the fronts
    down    told to end: Drain -> Drained (or time-out, then Abort) -> Stop;  a second signal: kill
            a worker lost for good:  Abort(message) -> Drained -> Stop, exit status 1

A worker is lost for good if it dies before the engine was ready for the first time, or too often. One poll covers the
control socket, every worker's pidfd, signals, and the lifeline. `recovery.py` decides about deaths and hangs,
`worker_set.py` has the processes, `topology.py` declares the roles, and `wiring.py` derives each worker's bootstrap.
This module names no role, ring or socket.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

import zmq

from ipc.errors import ConfigError
from ipc.messages import Abort, Busy, Drained, Failed, Pong, Progress, Ready, Stop
from pipeline.engine.announcer import Announcer
from pipeline.engine.child_process import ChildProcess
from pipeline.engine.config_combinations import check_cache_holds_one_sequence
from pipeline.engine.recovery import Recovery
from pipeline.engine.shared_resources import SharedResources
from pipeline.engine.signals import EndRequests
from pipeline.engine.supervisor_config import SupervisorConfig
from pipeline.engine.topology import Role
from pipeline.engine.wiring import Wiring
from pipeline.engine.worker_set import WorkerSet

logger = logging.getLogger(__name__)

ABORT_TIMEOUT_S: Final = 3.0  # for the fronts to tell their clients that the engine ends
STOP_TIMEOUT_S: Final = 3.0  # for workers to exit after Stop
LIFELINE_DRAIN_TIMEOUT_S: Final = 1.0  # the process that started the launcher is gone
_LAST_WORDS_S: Final = 0.1  # for a dead worker's Failed to arrive
_POLL_S: Final = 0.02  # while starting: new connections send no event


class _StopAtOnce(Exception):
    """A second request to end has arrived."""


class Supervisor:
    """Runs one engine in the calling thread, the main one: workers die with the thread that spawned them.

    `signal_fd` yields the numbers of signals to end (`signals.signal_pipe`); end of file on `lifeline_fd` asks for the
    same in haste. `run()` closes `resources` and `announcer` at the end and returns the exit status: 0 after an orderly
    end, 1 after a loss, 128 + signal after a second signal.
    """

    def __init__(
        self,
        wiring: Wiring,
        resources: SharedResources,
        announcer: Announcer,
        config: SupervisorConfig,
        *,
        drain_timeout_s: float,
        signal_fd: int,
        lifeline_fd: int | None = None,
    ) -> None:
        self._resources = resources
        self._announcer = announcer
        self._drain_timeout_s = drain_timeout_s
        self._loss: str | None = None  # the first worker that was lost for good, and why
        self._going_down = False  # a first request to end is being carried out
        self._is_draining = False  # the fronts are told to finish open requests
        self._stopping = False  # workers are expected to exit
        self._poller = zmq.Poller()
        self._end_requests = EndRequests(signal_fd, lifeline_fd, self._poller)
        self._context: zmq.Context[Any] = zmq.Context()
        self._workers = WorkerSet(wiring, resources, self._context, self._poller)
        self._recovery = Recovery(self._workers, announcer, config)

    def run(self) -> int:
        try:
            self._recovery.spawned(self._workers.spawn(self._wiring.start_sequence))
            if self._bring_up():
                self._wait_until(lambda: False)
            self._go_down()
        except _StopAtOnce:
            logger.warning("told to end again: stopping at once")
        finally:
            self._workers.kill_all()
            self._context.destroy(linger=0)
            self._resources.close()
            self._announcer.close()
        return self._exit_status()

    @property
    def _wiring(self) -> Wiring:
        return self._workers.wiring

    # Up

    def _bring_up(self) -> bool:
        """True once the engine serves; False if it never will."""
        wiring = self._wiring
        dependent = [role for role in wiring.table.roles if role.starts_after]
        if not all(self._start_dependent(role) for role in dependent):
            return False
        if not self._wait_until(lambda: all(worker.is_ready for worker in self._workers)):
            return False
        for worker in self._workers:
            if not worker.is_started and worker.name not in wiring.fronts:
                self._workers.start(worker)
        for front in wiring.fronts:  # the announcement must not come before they take requests
            started = self._workers.get(front)
            if started is None or not self._workers.start(started) or not self._wait_until(lambda: self._serves(front)):  # noqa: B023
                return False
        self._announcer.ready(self._workers.info)
        return True

    def _start_dependent(self, role: Role) -> bool:
        """Tell a role to start once the workers that it depends on are ready. False if the engine ends first."""
        needed = self._wiring.names(role.starts_after)
        if not self._wait_until(lambda: all(map(self._is_ready, needed))) or not self._check_cache():
            return False
        for name in self._wiring.names((role.name,)):
            # The worker may not be connected yet, and says nothing before it is started.
            while (worker := self._workers.get(name)) is None or not self._workers.start(worker):
                if self._wait_until(self._is_over, _POLL_S):
                    return False
        return True

    def _is_ready(self, name: str) -> bool:
        """Whether the worker lives and has said that it is ready."""
        worker = self._workers.get(name)
        return worker is not None and worker.is_ready

    def _serves(self, name: str) -> bool:
        worker = self._workers.get(name)
        return worker is not None and worker.serves

    def _check_cache(self) -> bool:
        """Whether the KV cache of the GPU process holds the longest sequence."""
        shape = self._wiring.facts.shape
        try:
            check_cache_holds_one_sequence(self._workers.info["num_blocks"], shape.block_size, shape.max_model_len)
        except ConfigError as error:
            self._loss = str(error)
        return self._loss is None

    # Down

    def _go_down(self) -> None:
        self._going_down = True
        if self._loss is None:
            self._drain()
        if self._loss is not None:
            logger.error("%s: the engine ends", self._loss)
            self._abort(self._loss)
        self._stop_all()

    def _drain(self) -> None:
        cause, timeout_s = self._end_requests.cause, self._drain_timeout_s
        if not self._announcer.is_ready:
            logger.info("%s: stopping before the engine was ready", cause)
            return
        if self._end_requests.is_hasty:
            timeout_s = min(timeout_s, LIFELINE_DRAIN_TIMEOUT_S)
        logger.info("%s: finishing open requests (at most %g s; a second signal stops at once)", cause, timeout_s)
        fronts = self._wiring.fronts
        self._is_draining = True  # a front that is started again meanwhile is told too
        if not self._wait_until(lambda: self._have_drained(fronts), timeout_s) and self._loss is None:
            logger.warning("open requests are left after %g s: they are answered with an error", timeout_s)
            self._abort("the engine is stopping")

    def _have_drained(self, fronts: Iterable[str]) -> bool:
        """Whether no front has open requests. One that was started again has to say so again."""
        return all((worker := self._workers.get(front)) is not None and worker.has_drained for front in fronts)

    def _abort(self, message: str) -> None:
        """Have the fronts answer every open request with an error. Returns when they have, or cannot."""
        for worker in self._workers:
            worker.has_drained = False
        told = {front for front in self._wiring.fronts if self._workers.tell(front, Abort(error_message=message))}
        self._wait_until(
            lambda: all(worker.has_drained for worker in self._workers if worker.name in told),
            ABORT_TIMEOUT_S, heed_loss=False,
        )  # fmt: skip

    def _stop_all(self) -> None:
        """Stop, wait, kill. Returns when no worker is left."""
        self._stopping = True
        for worker in self._workers:
            if not worker.is_ready or not self._workers.tell(worker.name, Stop()):
                worker.kill()  # it still loads: it would read Stop late, and holds no request
        if not self._wait_until(lambda: not self._workers, STOP_TIMEOUT_S, heed_loss=False):
            logger.warning(
                "%s: no exit within %g s, killing", ", ".join(worker.name for worker in self._workers), STOP_TIMEOUT_S
            )

    # Waiting

    def _is_over(self) -> bool:
        """Whether the engine must end."""
        return self._loss is not None or bool(self._end_requests)

    def _wait_until(
        self, condition: Callable[[], bool], timeout_s: float | None = None, *, heed_loss: bool = True
    ) -> bool:
        """Handle events until `condition` holds. False: the time is over, or an event ends the present phase.

        A loss or a request to end ends the phases of starting and serving; a loss ends draining. A second request to
        end raises _StopAtOnce in any phase.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not condition():
            if len(self._end_requests) > 1:
                raise _StopAtOnce
            if (heed_loss and self._loss is not None) or (self._end_requests and not self._going_down):
                return False
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            self._take_in(left)
        return True

    def _take_in(self, timeout_s: float | None) -> None:
        """Sleep until an event arrives, and handle it."""
        until_s = self._recovery.timeout_s()
        timeout_s = until_s if timeout_s is None else min(timeout_s, until_s)
        timeout_ms = int(timeout_s * 1000) + 1  # rounded up: no busy last millisecond
        readable = {source for source, _ in self._poller.poll(timeout_ms)}
        self._take_messages()
        for worker in [worker for worker in self._workers if worker.pidfd in readable]:
            if self._workers.get(worker.name) is not worker:  # it has been replaced meanwhile
                continue
            what = "" if self._stopping else self._last_words(worker)
            self._workers.bury(worker.name)
            if not self._stopping:
                self._lose(self._recovery.died(worker.name, what) if self._loss is None else what)
        self._end_requests.take_in(readable)
        if not self._stopping and self._loss is None:
            self._recovery.go_on(drains=self._is_draining)

    def _take_messages(self, timeout_ms: int = 0) -> None:
        for worker, message in self._workers.hear(timeout_ms):
            match message:
                case Progress():
                    self._announcer.progress(message)
                case Ready():
                    self._recovery.ready(worker, message)
                case Drained():
                    worker.has_drained = True
                case Pong():
                    self._recovery.answered(worker, message)
                case Busy():
                    self._recovery.busy(worker, message)
                case Failed():
                    self._recovery.failed(worker, message)
                    if not self._announcer.is_ready and self._loss is None:
                        self._loss = worker.last_words  # it may take long to end

    def _lose(self, why: str | None) -> None:
        """The engine cannot go on. None: it can."""
        if why is not None and self._loss is None:
            self._loss = why
        elif why is not None and why != self._loss:
            logger.warning("%s", why)

    def _last_words(self, worker: ChildProcess) -> str:
        """Why a dead worker has ended. Its Failed says more than its exit status, and may still be on its way.

        Only a worker that exits with status 1 says it. For the others nothing waits: masks that a dead grammar process
        owes would be late before anybody hears of its death.
        """
        deadline = time.monotonic() + (_LAST_WORDS_S if worker.process.wait() == 1 else 0.0)
        while not worker.last_words and (left := deadline - time.monotonic()) > 0:
            self._take_messages(int(left * 1000) + 1)
        return worker.last_words or f"{worker.name} {worker.describe_exit()}"

    def _exit_status(self) -> int:
        return 1 if self._loss is not None else self._end_requests.exit_status
