"""What every worker process does alike: start from inherited descriptors, announce itself, wait, and exit.

Owns signals, the launcher's control channel, the process's doorbell, its statistics page, its trace and its exit
status. Knows nothing of what any role does.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec
import zmq

from ipc.channels import connect_dealer, receive, send
from ipc.codec import decode
from ipc.doorbell import Doorbell
from ipc.errors import RingfeedError
from ipc.messages import Failed, LauncherToWorker, Progress, Ready, Stop
from ipc.stats_page import StatsHandle, StatsPage
from ipc.trace import Span, TraceHandle
from ipc.tracer import tracer

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG: Final = 1
IDLE_MS: Final = 200  # without an event: then collect garbage, ...
MIN_UNCOLLECTED: Final = 1_000  # ... if there are this many new containers
MAX_UNCOLLECTED: Final = 250_000  # collect even if busy, for about 10 ms at most; rare, as requests leave no cycles
LOG_FORMAT: Final = "%(asctime)s %(levelname)s {role}: %(message)s"

B = TypeVar("B")


class WorkerBootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """What any worker is given at birth. Descriptors are inherited."""

    role: str  # "gateway", "tokenizer.0", ...
    control_endpoint: str
    doorbell_fd: int
    stats: StatsHandle
    launcher_pid: int
    log_level: str = "INFO"
    trace: TraceHandle | None = None  # None: nothing is traced


class StopWorker(Exception):
    """The launcher said Stop: unwind and exit with status 0."""


class WorkerProcess:
    """The worker's side of its life. One poll covers the control channel, the doorbell and the role's own sockets."""

    def __init__(self, bootstrap: WorkerBootstrap) -> None:
        self.role = bootstrap.role
        self.context: zmq.Context[Any] = zmq.Context()
        self.doorbell = Doorbell(bootstrap.doorbell_fd)
        self.stats_page = StatsPage(bootstrap.stats)
        self.stats = self.stats_page.values
        self.stats.pid[0] = os.getpid()
        self.trace = tracer(bootstrap.trace)  # of the main thread
        self._awake_since_ns = time.monotonic_ns()
        self._control = connect_dealer(self.context, bootstrap.control_endpoint, identity=self.role.encode())
        self._poller = zmq.Poller()
        self._poller.register(self._control, zmq.POLLIN)
        self._poller.register(self.doorbell.fd, zmq.POLLIN)
        self._on_control: Callable[[Any], None] | None = None

    def watch(self, socket: zmq.Socket[Any] | int) -> None:
        """Wake from `wait()` when this socket or descriptor is readable."""
        self._poller.register(socket, zmq.POLLIN)

    def on_control(self, handler: Callable[[Any], None]) -> None:
        """Call `handler` for the launcher's messages other than Stop, from within `wait()`."""
        self._on_control = handler

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

        Returns the readable sockets and descriptors that were given to `watch`. The doorbell is drained here, before
        the caller looks at its rings. Raises StopWorker when the launcher says so.
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
                if self._on_control is not None:
                    self._on_control(message)
        return ready

    def _poll(self, timeout_ms: int | None) -> list[tuple[Any, int]]:
        num_new = gc.get_count()[0]  # containers made and not freed since the last collection
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
        """Flush what is queued on every socket (bounded by their linger) and close them."""
        self.context.destroy()
        self._trace_awake()

    def _trace_awake(self) -> None:
        self.trace.record(Span.AWAKE, self._awake_since_ns, time.monotonic_ns() - self._awake_since_ns)


def run_worker(
    bootstrap_type: type[B], run: Callable[[WorkerProcess, B], None], *, outlives_launcher: bool = False
) -> None:
    """Entry point of every worker module: `python -m workers.ROLE --bootstrap-fd N`.

    `bootstrap_type` is the role's struct; its field `worker` is the WorkerBootstrap. Exits 0 after Stop, 1 after an
    error, which the launcher has then been told. A role that `outlives_launcher` must watch for the launcher's death
    itself; the kernel kills the others with it.
    """
    parser = argparse.ArgumentParser(description="A ringfeed worker; started by pipeline.launch, not by hand.")
    parser.add_argument("--bootstrap-fd", type=int, required=True)
    bootstrap = read_bootstrap(parser.parse_args().bootstrap_fd, bootstrap_type)
    worker: WorkerBootstrap = bootstrap.worker  # type: ignore[attr-defined]
    if not outlives_launcher:
        _die_with(worker.launcher_pid)
    # A terminal or a service manager sends these to all processes of a group; only the launcher acts on them.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    logging.basicConfig(level=worker.log_level, format=LOG_FORMAT.format(role=worker.role), stream=sys.stderr)
    process = WorkerProcess(worker)
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
    with contextlib.suppress(OSError):  # its reader may have left
        sys.stderr.flush()
    os._exit(status)  # no interpreter teardown: nothing of ours is left to run, and device libraries may hang in theirs


def read_bootstrap(fd: int, bootstrap_type: type[B]) -> B:
    """Read and close the descriptor that the launcher filled."""
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        return decode(file.read(), bootstrap_type)


def _die_with(launcher_pid: int) -> None:
    """Have the kernel kill this process when the launcher's process ends, however it ends.

    The kernel's rule is "when the thread that spawned it ends": the launcher spawns from its main thread.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher_pid:  # it died before the line above
        os._exit(1)
