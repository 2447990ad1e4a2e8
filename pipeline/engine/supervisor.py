"""Starts the workers, watches them, and ends them so that nothing is left.

    up      spawn all; roles that others depend on Ready -> Start(the scheduler); all Ready -> Start(the others), the
            fronts last
    serve   sleep until a signal, a worker's death or its Failed
    down    told to end: Drain -> Drained (or time-out, then Abort) -> Stop;  a second signal: kill
            a worker lost:  Abort(message) -> Drained -> Stop, exit status 1; a dispensable one: Lost to the others

One poll covers the control socket, every worker's pidfd, signals, and the lifeline. `topology.py` declares the roles,
and `wiring.py` derives each worker's bootstrap. This module names no role, ring or socket besides the control socket.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

import zmq

from ipc.channels import bind_router, receive_from, send_to
from ipc.errors import ConfigError
from ipc.messages import Abort, Drain, Drained, Failed, Lost, Progress, Ready, Start, Stop, WorkerToLauncher
from pipeline.engine.announcer import Announcer
from pipeline.engine.child_process import ChildProcess
from pipeline.engine.config_combinations import check_cache_holds_one_sequence
from pipeline.engine.shared_resources import SharedResources
from pipeline.engine.signals import EndRequests
from pipeline.engine.topology import CONTROL, Role
from pipeline.engine.unix_sockets import connections_stand
from pipeline.engine.wiring import Wiring

logger = logging.getLogger(__name__)

ABORT_TIMEOUT_S: Final = 3.0  # for the fronts to tell their clients that the engine ends
STOP_TIMEOUT_S: Final = 3.0  # for workers to exit after Stop
LIFELINE_DRAIN_TIMEOUT_S: Final = 1.0  # the process that started the launcher is gone
_LAST_WORDS_S: Final = 0.1  # for a dead worker's Failed to arrive
_CONNECT_TIMEOUT_S: Final = 2.0
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
        *,
        drain_timeout_s: float,
        signal_fd: int,
        lifeline_fd: int | None = None,
    ) -> None:
        self._wiring = wiring
        self._resources = resources
        self._announcer = announcer
        self._drain_timeout_s = drain_timeout_s
        self._workers: dict[str, ChildProcess] = {}
        self._info: dict[str, int] = {}
        self._loss: str | None = None  # the first worker that was lost, and why
        self._failed: set[str] = set()  # workers that have announced their end themselves
        self._drained: set[str] = set()  # fronts without open requests
        self._going_down = False  # a first request to end is being carried out
        self._stopping = False  # workers are expected to exit
        self._poller = zmq.Poller()
        self._end_requests = EndRequests(signal_fd, lifeline_fd, self._poller)

    def run(self) -> int:
        context: zmq.Context[Any] = zmq.Context()
        try:
            self._control = bind_router(context, self._wiring.endpoint(CONTROL))
            self._poller.register(self._control, zmq.POLLIN)
            self._spawn_all()
            if self._bring_up():
                self._wait_until(lambda: False)
            self._go_down()
        except _StopAtOnce:
            logger.warning("told to end again: stopping at once")
        finally:
            self._kill_all()
            context.destroy(linger=0)
            self._resources.close()
            self._announcer.close()
        return self._exit_status()

    # Up

    def _spawn_all(self) -> None:
        for process in self._wiring.start_sequence:
            plan = self._wiring.plan(process)
            worker = ChildProcess(plan, self._resources.descriptors(plan.descriptors))
            self._workers[plan.name] = worker
            self._poller.register(worker.pidfd, zmq.POLLIN)
        self._announcer.spawned({name: worker.pid for name, worker in self._workers.items()})

    def _bring_up(self) -> bool:
        """True once the engine serves; False if it never will."""
        wiring = self._wiring
        dependent = [role for role in wiring.table.roles if role.starts_after]
        if not all(self._start_dependent(role) for role in dependent):
            return False
        if not self._wait_until(lambda: all(worker.is_ready for worker in self._workers.values())):
            return False
        self._unlink_sockets()
        if self._is_over():
            return False
        started = {*wiring.names(role.name for role in dependent), *wiring.fronts}
        for name in sorted(self._workers.keys() - started):
            self._tell(name, Start(info=self._info))
        for front in wiring.fronts:
            self._workers[front].is_ready = False  # until it takes requests: the announcement must not come earlier
            self._tell(front, Start(info=self._info))
            if not self._wait_until(lambda front=front: self._is_ready(front)):  # type: ignore[misc]
                return False
        self._announcer.ready(self._info)
        return True

    def _start_dependent(self, role: Role) -> bool:
        """Tell a role to start once the workers that it depends on are ready. False if the engine ends first."""
        needed = self._wiring.names(role.starts_after)
        if not self._wait_until(lambda: all(map(self._is_ready, needed))) or not self._check_cache():
            return False
        for name in self._wiring.names((role.name,)):
            # The worker may not be connected yet, and says nothing before it is started.
            while not self._tell(name, Start(info=self._info)):
                if self._wait_until(self._is_over, _POLL_S):
                    return False
        return True

    def _is_ready(self, name: str) -> bool:
        """Whether the worker lives and has said that it is ready."""
        return name in self._workers and self._workers[name].is_ready

    def _check_cache(self) -> bool:
        """Whether the KV cache of the GPU process holds the longest sequence."""
        shape = self._wiring.facts.shape
        try:
            check_cache_holds_one_sequence(self._info["num_blocks"], shape.block_size, shape.max_model_len)
        except ConfigError as error:
            self._loss = str(error)
        return self._loss is None

    def _unlink_sockets(self) -> None:
        """Remove the names of the internal sockets once every worker has made its connections.

        From then on even a SIGKILL of all processes leaves no socket behind. If the kernel's table does not show all
        connections, the names stay until the end.
        """
        expected = self._wiring.num_connections()
        deadline = time.monotonic() + _CONNECT_TIMEOUT_S
        while not connections_stand(expected):
            if time.monotonic() > deadline or self._wait_until(self._is_over, _POLL_S):
                logger.debug("internal sockets stay in %s: not all were seen connected", self._resources.run_folder)
                return
        self._resources.remove_run_folder()

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
        for front in fronts:
            self._tell(front, Drain())
        if not self._wait_until(lambda: self._drained.issuperset(fronts), timeout_s) and self._loss is None:
            logger.warning("open requests are left after %g s: they are answered with an error", timeout_s)
            self._abort("the engine is stopping")

    def _abort(self, message: str) -> None:
        """Have the fronts answer every open request with an error. Returns when they have, or cannot."""
        self._drained.clear()
        told = {front for front in self._wiring.fronts if self._tell(front, Abort(error_message=message))}
        self._wait_until(lambda: self._drained >= (told & self._workers.keys()), ABORT_TIMEOUT_S, heed_loss=False)

    def _stop_all(self) -> None:
        """Stop, wait, kill. Returns when no worker is left."""
        self._stopping = True
        for worker in self._workers.values():
            if not worker.is_ready or not self._tell(worker.name, Stop()):
                worker.kill()  # it still loads: it would read Stop late, and holds no request
        if not self._wait_until(lambda: not self._workers, STOP_TIMEOUT_S, heed_loss=False):
            logger.warning("%s: no exit within %g s, killing", ", ".join(self._workers), STOP_TIMEOUT_S)

    def _kill_all(self) -> None:
        for worker in self._workers.values():
            worker.kill()
        for name in list(self._workers):
            self._bury(name)

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
        timeout_ms = None if timeout_s is None else int(timeout_s * 1000) + 1  # rounded up: no busy last millisecond
        readable = {source for source, _ in self._poller.poll(timeout_ms)}
        self._take_messages()
        for worker in [worker for worker in self._workers.values() if worker.pidfd in readable]:
            if not self._stopping and not self._has_said_why(worker.name):
                self._note_loss(worker.name, f"{worker.name} {worker.describe_exit()}")
            self._bury(worker.name)
        self._end_requests.take_in(readable)

    def _take_messages(self) -> None:
        for identity, message in receive_from(self._control, WorkerToLauncher):
            match message:
                case Progress():
                    self._announcer.progress(message)
                case Ready():
                    worker = self._workers.get(message.role)
                    if worker is not None:  # a message may arrive after its sender's death
                        worker.is_ready = True
                        self._info |= message.info
                        self._announcer.worker_ready(message.role)
                case Drained():
                    self._drained.add(identity.decode())
                case Failed():
                    self._failed.add(message.role)
                    self._note_loss(message.role, f"{message.role} failed: {message.error_message}")

    def _has_said_why(self, name: str) -> bool:
        """Whether a dead worker has sent Failed, which says more than its exit status and may still be on its way."""
        deadline = time.monotonic() + _LAST_WORDS_S
        while name not in self._failed and (left := deadline - time.monotonic()) > 0:
            if self._control.poll(int(left * 1000) + 1):
                self._take_messages()
        return name in self._failed

    def _note_loss(self, name: str, what: str) -> None:
        process = self._wiring.process(name)
        if process.role.is_dispensable and self._announcer.is_ready:
            logger.error("%s: the engine goes on without it", what)
            for other in self._workers:
                self._tell(other, Lost(role=process.role.name, index=process.index))
        elif self._loss is None:
            self._loss = what
        else:
            logger.warning("%s", what)

    def _bury(self, name: str) -> None:
        worker = self._workers.pop(name)
        if worker.pidfd in self._poller:
            self._poller.unregister(worker.pidfd)
        worker.bury()

    def _tell(self, name: str, message: Any) -> bool:
        return name in self._workers and send_to(self._control, name.encode(), message)

    def _exit_status(self) -> int:
        return 1 if self._loss is not None else self._end_requests.exit_status
