"""The life that all worker processes share: receive the bootstrap, announce readiness, wait, and exit.

Owns signals, the launcher's control channel, the process's doorbell, its statistics page, its trace and its exit
status. Knows nothing of the work of any role.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import zmq

from ipc.channels import bind_private_router, connect_dealer, receive, send
from ipc.doorbell import Doorbell
from ipc.errors import EngineUnavailable, RingfeedError
from ipc.messages import Busy, Failed, LauncherToWorker, Ping, Pong, Progress, Ready, Stop
from ipc.private_socket import endpoint_through
from ipc.stats_page import StatsPage
from ipc.trace import Span
from ipc.tracer import Tracer, tracer
from workers.bootstrap import MAIN, BootstrapChannel, WorkerBootstrap

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG: Final = 1
IDLE_MS: Final = 200  # without an event: then collect garbage, if there are at least MIN_UNCOLLECTED new containers
MIN_UNCOLLECTED: Final = 1_000
MAX_UNCOLLECTED: Final = 250_000  # collect even if busy, for about 10 ms at most; rare, as requests leave no cycles
LOG_FORMAT: Final = "%(asctime)s %(levelname)s {role}: %(message)s"

B = TypeVar("B")


class StopWorker(Exception):
    """The launcher said Stop: unwind and exit with status 0."""


class WorkerProcess:
    """One worker's own process. One poll covers the control channel, the doorbell and the role's own sockets."""

    def __init__(self, bootstrap: WorkerBootstrap, channel: BootstrapChannel[Any] | None = None) -> None:
        self.role = bootstrap.role
        self._bootstrap = bootstrap
        self.context: zmq.Context[Any] = zmq.Context()
        self.doorbell = Doorbell(bootstrap.doorbell_fd)
        self.stats_page = StatsPage(bootstrap.stats)
        self.stats = self.stats_page.values
        self.stats.pid[0] = os.getpid()
        self.stats.num_starts[0] += 1
        self.trace = self.tracer_of(MAIN)
        self._awake_since_ns = time.monotonic_ns()
        self.begun_at_ns = self._awake_since_ns  # CLOCK_MONOTONIC: when the start of this process's work began
        self._control = self.connect("control")
        self._poller = zmq.Poller()
        self._poller.register(self._control, zmq.POLLIN)
        self._poller.register(self.doorbell.fd, zmq.POLLIN)
        self._on_control: Callable[[Any], None] | None = None
        self._channel = channel
        self._on_rewire: Callable[[Any], None] | None = None
        if channel is not None:
            self._poller.register(channel.fd, zmq.POLLIN)
        self.stalled_s: Callable[[], float] = float  # see `Pong`; a role may set it

    def bind(self, name: str) -> zmq.Socket[Any]:
        """A ROUTER, bound to the engine's socket of this name. Raises EngineUnavailable if it cannot be bound."""
        return bind_private_router(self.context, self._bootstrap.listeners[name])

    def connect(self, name: str) -> zmq.Socket[Any]:
        """A DEALER, connected to the engine's socket of this name under our identity."""
        endpoint = endpoint_through(self._bootstrap.sockets[name])
        return connect_dealer(self.context, endpoint, identity=self._bootstrap.identity)

    def reconnect(self, name: str, former: zmq.Socket[Any]) -> zmq.Socket[Any]:
        """A DEALER in place of one whose ROUTER has died. What is unread or unsent there is lost."""
        if former in self._poller:
            self._poller.unregister(former)
        former.close(0)
        return self.connect(name)

    def tracer_of(self, thread: str) -> Tracer:
        """The tracer of a thread that the table names. It belongs to that thread alone."""
        return tracer(self._bootstrap.traces.get(thread))

    @property
    def control_fd(self) -> int:
        """A descriptor that is readable when the launcher may have sent a message, for a role with an event loop.

        It is edge-triggered: after each event, and once after it is first watched, call `wait(0)`.
        """
        fd = self._control.getsockopt(zmq.FD)
        assert isinstance(fd, int), "ZeroMQ's descriptor is an integer"
        return fd

    def watch(self, source: zmq.Socket[Any] | int) -> None:
        """Wake from `wait()` when this socket or descriptor is readable."""
        self._poller.register(source, zmq.POLLIN)

    def on_control(self, handler: Callable[[Any], None]) -> None:
        """Call `handler` for the launcher's messages other than Stop, from within `wait()`."""
        self._on_control = handler

    def on_rewire(self, handler: Callable[[Any], None]) -> None:
        """Call `handler` with each further bootstrap of this process, from within `wait()`.

        The epochs of its rings and the identities of its peers say what is new. A ring of an epoch that we know has the
        descriptor that we know. Afterwards this process closes the descriptors that the bootstrap does not name.
        """
        self._on_rewire = handler

    def busy(self, seconds: float) -> None:
        """Tell the launcher that this process may answer nothing for so long, and yet does not hang."""
        send(self._control, Busy(seconds=seconds))

    def progress(self, stage: str, fraction: float, total_bytes: int = 0) -> None:
        send(self._control, Progress(role=self.role, stage=stage, fraction=fraction, total_bytes=total_bytes))

    def ready(self, **info: int) -> None:
        """Tell the launcher that everything is loaded.

        From now on garbage is collected when the process is idle, so that steps do not wait for it. A busy process
        collects only after MAX_UNCOLLECTED new containers. Loaded objects are never scanned.
        """
        gc.collect()
        gc.freeze()
        gc.disable()
        send(self._control, Ready(role=self.role, info=info))

    def say(self, message: Any) -> None:
        """Send the launcher a message of WorkerToLauncher."""
        send(self._control, message)

    def wait(self, timeout_ms: int | None = None) -> set[Any]:
        """Sleep until something is readable, for at most `timeout_ms` (None = for ever, 0 = only look).

        Returns the readable ones of the sockets and descriptors that `watch` registered. Drains the doorbell before the
        caller looks at its rings. Raises StopWorker when the launcher says Stop.
        """
        self._trace_awake()
        ready = {source for source, _ in self._poll(timeout_ms)}
        self._awake_since_ns = time.monotonic_ns()
        self.stats.num_wakeups[0] += 1
        if self.doorbell.fd in ready:
            self.doorbell.drain()
        if self._control in ready:
            for message in receive(self._control, LauncherToWorker):
                if isinstance(message, Stop):
                    raise StopWorker
                if isinstance(message, Ping):
                    send(self._control, Pong(stalled_s=self.stalled_s()))
                elif self._on_control is not None:
                    self._on_control(message)
        if self._channel is not None and self._channel.fd in ready:
            self.take_bootstraps()
        return ready

    def take_bootstraps(self) -> None:
        """Take in the bootstraps that have arrived. `wait()` does this too.

        The launcher sends ours before it starts a process again. So after a message of a process that we do not know,
        call this to know it.
        """
        channel = self._channel
        while channel is not None and channel.has_more():
            try:
                bootstrap = channel.receive()
            except EngineUnavailable:  # the launcher has ended, which the role or the kernel notices
                self._poller.unregister(channel.fd)
                self._channel = None
                return
            self._bootstrap = bootstrap.worker
            if self._on_rewire is not None:
                self._on_rewire(bootstrap)
            channel.close_unnamed()

    def _poll(self, timeout_ms: int | None) -> list[tuple[Any, int]]:
        num_new = gc.get_count()[0]  # containers that were made since the last collection and not freed
        if num_new > MAX_UNCOLLECTED:
            self._collect(0)
        elif num_new > MIN_UNCOLLECTED and (timeout_ms is None or timeout_ms > IDLE_MS):
            if events := self._poller.poll(IDLE_MS):
                return events
            self._collect(2)
            timeout_ms = None if timeout_ms is None else timeout_ms - IDLE_MS
        return self._poller.poll(timeout_ms)

    def _collect(self, generation: int) -> None:
        self.stats.num_garbage[0] += gc.collect(generation)
        self.stats.num_collections[0] += 1

    def close(self) -> None:
        """Flush the queues of all sockets, bounded by their linger, and close them."""
        self.context.destroy()
        self._trace_awake()

    def _trace_awake(self) -> None:
        self.trace.record(Span.AWAKE, self._awake_since_ns, time.monotonic_ns() - self._awake_since_ns)


def run_worker(
    bootstrap_type: type[B],
    run: Callable[[WorkerProcess, B], None],
    prepare: Callable[[], None] | None = None,
) -> None:
    """Entry point of every worker module: `python -m MODULE --bootstrap-fd N`.

    Descriptor N is our end of a socket to the launcher (`ipc/descriptor_passing.py`). It stays open as long as this
    process lives. `bootstrap_type` is the role's struct; its field `worker` is the WorkerBootstrap. Exits 0 after Stop;
    after an error tells the launcher and exits 1. The kernel kills the worker with its launcher, except a worker that
    `outlives_launcher`: it must watch for the launcher's death itself.

    With `--spare` the process calls `prepare`, which does what needs no bootstrap, and waits for the bootstrap, which
    the launcher may send much later or never. Until then the kernel kills it with its launcher, too.
    """
    parser = argparse.ArgumentParser(description="A ringfeed worker; started by pipeline.launch, not by hand.")
    parser.add_argument("--bootstrap-fd", type=int, required=True)
    parser.add_argument("--spare", action="store_true")
    arguments = parser.parse_args()
    inherited = socket.socket(fileno=arguments.bootstrap_fd)
    inherited.set_inheritable(False)
    channel = BootstrapChannel(inherited, bootstrap_type)
    # A terminal or a service manager sends these to all processes of a group; only the launcher acts on them.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    begun_at_ns = _process_start_ns()
    if arguments.spare:
        _die_with(os.getppid())  # if it has died already, its end of the channel is closed
        if prepare is not None:
            prepare()
    try:
        bootstrap = channel.receive()
    except RingfeedError as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        os._exit(1)
    if arguments.spare:
        begun_at_ns = time.monotonic_ns()
    worker: WorkerBootstrap = bootstrap.worker  # type: ignore[attr-defined]
    if not worker.outlives_launcher:
        _die_with(worker.launcher_pid)
    logging.basicConfig(level=worker.log_level, format=LOG_FORMAT.format(role=worker.role), stream=sys.stderr)
    process = WorkerProcess(worker, channel)
    process.begun_at_ns = begun_at_ns
    status = 0
    try:
        run(process, bootstrap)
    except StopWorker:
        pass
    except Exception as error:
        status = 1
        expected = isinstance(error, RingfeedError)
        code = error.code if isinstance(error, RingfeedError) else "internal"
        message = str(error) if expected else f"{type(error).__name__}: {error}"
        logger.error("ends: %s", message, exc_info=not expected)
        process.say(Failed(role=worker.role, error_code=code, error_message=message))
    process.close()
    with contextlib.suppress(OSError):  # the reader of our stderr may have ended
        sys.stderr.flush()
    os._exit(status)  # no interpreter teardown: we have nothing left to run, and device libraries may hang in theirs


def _die_with(launcher_pid: int) -> None:
    """Have the kernel kill this process when the launcher's process ends, however it ends.

    The kernel's rule is "when the thread that spawned it ends": the launcher spawns from its main thread.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher_pid:  # the launcher died before the line above
        os._exit(1)


def _process_start_ns() -> int:
    """When this process was spawned, CLOCK_MONOTONIC in ns. The kernel keeps it in ticks of 10 ms."""
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])  # the kernel's field 22
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic_ns() - round(age_s * 1e9)
