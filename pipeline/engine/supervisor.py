"""Brings the workers up, watches them, and takes them down so that nothing is left.

    up      all are spawned; GPU process Ready -> Start(scheduler); all Ready -> Start(the others), the gateway last
    serve   sleep until a signal, a worker's death or its Failed
    down    told to end: Drain -> Drained (or time-out, then Abort) -> Stop;  a second signal: kill
            a worker lost:  Abort(message) -> Drained -> Stop, exit status 1

One poll covers the control socket, every worker's pidfd, signals, and the lifeline. What each worker is given is
settled in `pipeline/engine/wiring.py`; nothing here knows rings, or messages other than those of the lifecycle.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import zmq

from ipc.channels import bind_router, receive_from, send_to
from ipc.codec import encode
from ipc.errors import ConfigError
from ipc.messages import Abort, Drain, Drained, Failed, Progress, Ready, Start, Stop, WorkerToLauncher
from pipeline.engine.announcer import Announcer
from pipeline.engine.config import check_cache_holds_one_sequence
from pipeline.engine.wiring import GATEWAY, GPU, SCHEDULER, Wiring, WorkerPlan
from pipeline.environment.module_search import module_command, module_environment

logger = logging.getLogger(__name__)

ABORT_TIMEOUT_S: Final = 3.0  # for the gateway to tell its clients that it is over
STOP_TIMEOUT_S: Final = 3.0  # for workers to exit after Stop
LIFELINE_DRAIN_TIMEOUT_S: Final = 1.0  # the one who asked for us is gone
_LAST_WORDS_S: Final = 0.1  # for a dead worker's Failed to come out of its socket
_CONNECT_TIMEOUT_S: Final = 2.0
_POLL_S: Final = 0.02  # for what sends no event: connections coming to stand, while starting
_SS_CONNECTED: Final = "03"  # in /proc/net/unix
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _StopAtOnce(Exception):
    """Told to end a second time."""


class _Worker:
    """One child process."""

    def __init__(self, role: str, process: subprocess.Popen[bytes]) -> None:
        self.role = role
        self.process = process
        self.pidfd = os.pidfd_open(process.pid)
        self.is_ready = False

    def describe_exit(self) -> str:
        status = self.process.wait()
        if status >= 0:
            return f"exited with status {status}"
        return f"was killed by signal {-status} ({signal.strsignal(-status)})"


class Supervisor:
    """Runs one engine in the calling thread, the main one: workers die with the thread that spawned them.

    `signal_fd` yields the numbers of signals to end (`signal_pipe`); end of file on `lifeline_fd` asks for the same in
    haste. `wiring` and `announcer` are closed at the end. `run()` returns the exit status: 0 after an orderly end, 1
    after a loss, 128 + signal after a second signal.
    """

    def __init__(
        self,
        wiring: Wiring,
        announcer: Announcer,
        *,
        drain_timeout_s: float,
        signal_fd: int,
        lifeline_fd: int | None = None,
        package: str = "workers",
    ) -> None:
        self._wiring = wiring
        self._announcer = announcer
        self._drain_timeout_s = drain_timeout_s
        self._signal_fd = signal_fd
        self._lifeline_fd = lifeline_fd
        self._package = package
        self._workers: dict[str, _Worker] = {}
        self._info: dict[str, int] = {}
        self._end_requests: list[int | None] = []  # signals; None = the lifeline's end
        self._loss: str | None = None  # the first worker that was lost, and why
        self._failed_roles: set[str] = set()  # said themselves that they end
        self._drained = False
        self._going_down = False  # a first request to end is being met
        self._stopping = False  # workers are expected to exit
        self._poller = zmq.Poller()

    def run(self) -> int:
        context: zmq.Context[Any] = zmq.Context()
        try:
            self._control = bind_router(context, self._wiring.control_endpoint)
            for source in (self._control, self._signal_fd, self._lifeline_fd):
                if source is not None:
                    self._poller.register(source, zmq.POLLIN)
            self._spawn_all()
            if self._bring_up():
                self._wait_until(lambda: False)
            self._go_down()
        except _StopAtOnce:
            logger.warning("told to end again: stopping at once")
        finally:
            self._kill_all()
            context.destroy(linger=0)
            self._wiring.close()
            self._wiring.remove_run_folder()
            self._announcer.close()
        return self._exit_status()

    # Up

    def _spawn_all(self) -> None:
        environment = module_environment()
        for plan in self._wiring.plans:
            worker = _Worker(plan.role, self._spawn(plan, environment))
            self._workers[plan.role] = worker
            self._poller.register(worker.pidfd, zmq.POLLIN)
        self._wiring.close()
        self._announcer.spawned({role: worker.process.pid for role, worker in self._workers.items()})

    def _spawn(self, plan: WorkerPlan, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        bootstrap_fd = os.memfd_create(f"ringfeed-bootstrap-{plan.role}")
        with os.fdopen(bootstrap_fd, "wb") as file:
            file.write(encode(plan.bootstrap))
            file.flush()
            return subprocess.Popen(
                module_command(f"{self._package}.{plan.module}", "--bootstrap-fd", str(bootstrap_fd)),
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=(*plan.fds, bootstrap_fd),
                start_new_session=True,  # detached from the terminal: no Ctrl-C, and no stop by `stty tostop`
            )

    def _bring_up(self) -> bool:
        """True once the engine serves; False if it never will."""
        known_by = (GPU, *self._wiring.tokenizer_roles)  # the scheduler needs facts from these roles
        if not self._wait_until(lambda: all(map(self._is_ready, known_by))) or not self._check_cache():
            return False
        while not self._tell(SCHEDULER, Start(info=self._info)):  # it may not be connected yet, and says nothing before
            if self._wait_until(self._is_over, _POLL_S):
                return False
        if not self._wait_until(lambda: all(worker.is_ready for worker in self._workers.values())):
            return False
        self._unlink_sockets()
        if self._is_over():
            return False
        for role in self._workers:
            if role not in (SCHEDULER, GATEWAY):
                self._tell(role, Start(info=self._info))
        self._workers[GATEWAY].is_ready = False  # until it takes requests: nobody is told that we serve before it does
        self._tell(GATEWAY, Start(info=self._info))
        if not self._wait_until(lambda: self._is_ready(GATEWAY)):
            return False
        self._announcer.ready(self._info)
        return True

    def _is_ready(self, role: str) -> bool:
        """Whether the worker lives and has said so."""
        return role in self._workers and self._workers[role].is_ready

    def _check_cache(self) -> bool:
        """Whether the KV cache that the GPU process got holds the longest sequence."""
        shape = self._wiring.shape
        try:
            check_cache_holds_one_sequence(self._info["num_blocks"], shape.block_size, shape.max_model_len)
        except ConfigError as error:
            self._loss = str(error)
        return self._loss is None

    def _unlink_sockets(self) -> None:
        """Remove the internal sockets' names once everybody has found everybody.

        From then on even a SIGKILL of all processes leaves none behind. Where the kernel's table does not show all
        connections, they stay until the end.
        """
        expected = self._wiring.num_connections()
        deadline = time.monotonic() + _CONNECT_TIMEOUT_S
        while not connections_stand(expected):
            if time.monotonic() > deadline or self._wait_until(self._is_over, _POLL_S):
                logger.debug("internal sockets stay in %s: not all were seen connected", self._wiring.run_folder)
                return
        self._wiring.remove_run_folder()

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
        signum = self._end_requests[0]
        cause = "the launcher's parent is gone" if signum is None else signal.Signals(signum).name
        if not self._announcer.is_ready:
            logger.info("%s: stopping before the engine was ready", cause)
            return
        timeout_s = min(self._drain_timeout_s, LIFELINE_DRAIN_TIMEOUT_S) if signum is None else self._drain_timeout_s
        logger.info("%s: finishing open requests (at most %g s; a second signal stops at once)", cause, timeout_s)
        self._tell(GATEWAY, Drain())
        if not self._wait_until(lambda: self._drained, timeout_s) and self._loss is None:
            logger.warning("open requests are left after %g s: they are answered with an error", timeout_s)
            self._abort("the engine is stopping")

    def _abort(self, message: str) -> None:
        """Have every open request answered with an error. Returns when that is done or cannot be."""
        self._drained = False
        if self._tell(GATEWAY, Abort(error_message=message)):
            self._wait_until(lambda: self._drained or GATEWAY not in self._workers, ABORT_TIMEOUT_S, heed_loss=False)

    def _stop_all(self) -> None:
        """Stop, wait, kill. Returns when no worker is left."""
        self._stopping = True
        for worker in self._workers.values():
            if not worker.is_ready or not self._tell(worker.role, Stop()):
                worker.process.kill()  # still loading: it would hear us late, and holds nothing of anybody's
        if not self._wait_until(lambda: not self._workers, STOP_TIMEOUT_S, heed_loss=False):
            logger.warning("%s: no exit within %g s, killing", ", ".join(self._workers), STOP_TIMEOUT_S)

    def _kill_all(self) -> None:
        for worker in self._workers.values():
            worker.process.kill()
        for role in list(self._workers):
            self._bury(role)

    # Waiting

    def _is_over(self) -> bool:
        """Whether there is cause to go down."""
        return self._loss is not None or bool(self._end_requests)

    def _wait_until(
        self, condition: Callable[[], bool], timeout_s: float | None = None, *, heed_loss: bool = True
    ) -> bool:
        """Take in what happens until `condition` holds. False: out of time, or something ends the present phase.

        Going up or serving, that is a loss or a request to end; draining, a loss. A second request to end raises
        _StopAtOnce in any phase.
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
        """Sleep until something happens, and note it."""
        timeout_ms = None if timeout_s is None else int(timeout_s * 1000) + 1  # rounded up: no busy last millisecond
        readable = {source for source, _ in self._poller.poll(timeout_ms)}
        self._take_messages()
        for worker in [worker for worker in self._workers.values() if worker.pidfd in readable]:
            if not self._stopping:
                self._hear_last_words(worker.role)
                if worker.role not in self._failed_roles:
                    self._note_loss(f"{worker.role} {worker.describe_exit()}")
            self._bury(worker.role)
        if self._signal_fd in readable:
            self._end_requests += os.read(self._signal_fd, 64)
        if self._lifeline_fd in readable:
            self._poller.unregister(self._lifeline_fd)
            self._end_requests.append(None)

    def _take_messages(self) -> None:
        for _, message in receive_from(self._control, WorkerToLauncher):
            match message:
                case Progress():
                    self._announcer.progress(message)
                case Ready():
                    worker = self._workers.get(message.role)
                    if worker is not None:  # messages outlive their senders
                        worker.is_ready = True
                        self._info |= message.info
                        self._announcer.worker_ready(message.role)
                case Drained():
                    self._drained = True
                case Failed():
                    self._failed_roles.add(message.role)
                    self._note_loss(f"{message.role} failed: {message.error_message}")

    def _hear_last_words(self, role: str) -> None:
        """A dead worker's Failed says more than its exit status, and may still be on its way."""
        deadline = time.monotonic() + _LAST_WORDS_S
        while role not in self._failed_roles and (left := deadline - time.monotonic()) > 0:
            if self._control.poll(int(left * 1000) + 1):
                self._take_messages()

    def _note_loss(self, what: str) -> None:
        if self._loss is None:
            self._loss = what
        else:
            logger.warning("%s", what)

    def _bury(self, role: str) -> None:
        worker = self._workers.pop(role)
        worker.process.wait()
        if worker.pidfd in self._poller:
            self._poller.unregister(worker.pidfd)
        os.close(worker.pidfd)

    def _tell(self, role: str, message: Any) -> bool:
        return role in self._workers and send_to(self._control, role.encode(), message)

    def _exit_status(self) -> int:
        if self._loss is not None:
            return 1
        if len(self._end_requests) > 1:
            return 128 + (self._end_requests[-1] or signal.SIGTERM)
        return 0


def connections_stand(expected: dict[Path, int]) -> bool:
    """Whether each of these Unix sockets has at least so many established connections, by the kernel's own table."""
    connected: Counter[str] = Counter()
    try:
        lines = Path("/proc/net/unix").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    for line in lines:
        columns = line.split(None, 7)  # Num RefCount Protocol Flags Type St Inode Path
        if len(columns) == 8 and columns[5] == _SS_CONNECTED:
            connected[columns[7]] += 1
    return all(connected[str(path)] >= count for path, count in expected.items())


@contextmanager
def signal_pipe() -> Iterator[int]:
    """A descriptor that yields one byte per signal to end: its number.

    A signal that our parent ignored (nohup, `&` in a script) stays ignored. SIGTERM is the exception, because it always
    asks us to end. SIGCHLD gets its default handler, because the kernel keeps no exit status of a child while SIGCHLD
    is ignored.
    """
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    taken = [signum for signum in _SIGNALS if signum == signal.SIGTERM or signal.getsignal(signum) != signal.SIG_IGN]
    handlers = {signum: signal.signal(signum, lambda *_: None) for signum in taken}
    handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, taken)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(previous)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        os.close(reader)
        os.close(writer)
