"""Compiles on threads of its own, so that masks are never late because of it, and keeps recently compiled grammars.

    submit(key, spec) -> a thread compiles -> notify() -> take() gives (key, Prototype or InvalidRequest)

One thread owns the pool. The compiling threads call nothing of the owner except `notify`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from ipc.errors import InvalidRequest
from ipc.structured_outputs import StructuredOutputs
from workers.grammar.compiler import Compiler, Prototype
from workers.grammar.origin import field_of

logger = logging.getLogger(__name__)

Outcome = Prototype | InvalidRequest

MAX_CACHED: Final = 64  # compiled grammars
MAX_CACHED_BYTES: Final = 16 * 1024  # of a cached constraint's text: a grammar takes about 200 times its text
MAX_STUCK: Final = 4  # threads beside the pool's own that finish compilations whose time is up


class _Job:
    def __init__(self, spec: StructuredOutputs, text: bytes) -> None:
        self.spec: Final = spec
        self.text: Final = text
        self.keys: Final[set[int]] = set()
        self.started: float | None = None  # monotonic; None: it waits
        self.is_late = False  # its requests have been answered; its thread goes on until the compiler's limits end it
        self.outcome: Outcome | None = None


class CompilePool:
    """Compiles each distinct constraint once, in the order of submission."""

    def __init__(
        self, compiler: Compiler, notify: Callable[[], None], *, timeout_s: float, num_threads: int = 1
    ) -> None:
        """`notify` is called from another thread whenever `take` has something to give."""
        self._compiler: Final = compiler
        self._notify: Final = notify
        self._timeout_s: Final = timeout_s
        self._num_threads: Final = num_threads
        self._cache: Final[OrderedDict[bytes, Outcome]] = OrderedDict()
        self._jobs: Final[dict[bytes, _Job]] = {}  # waiting and running, by the constraint's bytes
        self._waiting: Final[deque[_Job]] = deque()
        self._done: Final[deque[_Job]] = deque()
        self._ready: Final[list[tuple[int, Outcome]]] = []
        self._wake: Final = threading.Condition()
        self._num_working = 0  # threads
        self._num_stuck = 0
        self._is_closed = False
        with self._wake:
            self._add_threads()

    def submit(self, key: int, spec: StructuredOutputs) -> None:
        """Compile a request's constraint. `take` gives the outcome, at once if the constraint is known."""
        text = msgspec.msgpack.encode(spec)
        if (known := self._cache.get(text)) is not None:
            self._cache.move_to_end(text)
            self._ready.append((key, known))
            return
        job = self._jobs.get(text)
        if job is None:
            job = self._jobs[text] = _Job(spec, text)
            with self._wake:
                self._waiting.append(job)
                self._wake.notify()
        if job.is_late:
            self._ready.append((key, self._too_late(job)))
        else:
            job.keys.add(key)

    def cancel(self, keys: Iterable[int]) -> None:
        """Forget requests that wait for their grammar. A constraint that nobody waits for any more is not begun."""
        cancelled = set(keys)
        for job in list(self._jobs.values()):
            job.keys.difference_update(cancelled)
            with self._wake:
                if not job.keys and job.started is None:
                    self._waiting.remove(job)
                    del self._jobs[job.text]
        self._ready[:] = [each for each in self._ready if each[0] not in cancelled]

    def take(self) -> list[tuple[int, Outcome]]:
        """The requests whose outcome is known: their prototype, or the error that ends them."""
        while self._done:
            self._finish(self._done.popleft())
        self._end_late_jobs()
        taken, self._ready[:] = list(self._ready), []
        return taken

    def next_deadline_s(self) -> float | None:
        """Seconds until `take` must be called even if nothing notifies; None: nothing is being compiled."""
        jobs = [job for job in self._jobs.values() if not job.is_late]
        now = time.monotonic()  # a job that waits may begin at any moment
        begun = [now if job.started is None else job.started for job in jobs]
        return max(0.0, min(begun) + self._timeout_s - now) if begun else None

    def close(self) -> None:
        """Begin no further compilation. The threads are daemons: one that is stuck does not keep the process alive."""
        with self._wake:
            self._is_closed = True
            self._wake.notify_all()

    def _end_late_jobs(self) -> None:
        late = time.monotonic() - self._timeout_s
        for job in self._jobs.values():
            if job.started is not None and job.started <= late and not job.is_late:
                with self._wake:  # another thread takes the place of the job's
                    if job.outcome is not None:
                        continue  # it is in `_done` since a moment ago
                    job.is_late = True
                    self._num_working -= 1
                    self._num_stuck += 1
                    self._add_threads()
                self._ready.extend((key, self._too_late(job)) for key in sorted(job.keys))
                job.keys.clear()

    def _too_late(self, job: _Job) -> InvalidRequest:
        return InvalidRequest(
            f"{field_of(job.spec)} takes longer to compile than grammar.compile_timeout_s "
            f"({self._timeout_s:g}): simplify it"
        )

    def _finish(self, job: _Job) -> None:
        outcome = job.outcome
        assert outcome is not None, "a job in _done has its outcome"
        del self._jobs[job.text]
        self._ready.extend((key, outcome) for key in sorted(job.keys))
        if len(job.text) <= MAX_CACHED_BYTES or isinstance(outcome, InvalidRequest):
            self._cache[job.text] = outcome
            if len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)

    def _add_threads(self) -> None:
        while self._num_working < self._num_threads and self._num_working + self._num_stuck < (
            self._num_threads + MAX_STUCK
        ):
            self._num_working += 1
            threading.Thread(target=self._work, name="compile", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
                job = self._waiting.popleft()
                job.started = time.monotonic()
            outcome = self._outcome(job.spec)
            with self._wake:
                job.outcome = outcome
                self._done.append(job)
                if job.is_late:
                    self._num_stuck -= 1
                    self._add_threads()
            self._notify()
            if job.is_late:
                return

    def _outcome(self, spec: StructuredOutputs) -> Outcome:
        try:
            return self._compiler.compile(spec)
        except InvalidRequest as error:
            return error
        except BaseException as error:  # a panic of llguidance is no Exception
            logger.exception("compiling structured_outputs.%s has failed", spec.constraint)
            return InvalidRequest(
                f"{field_of(spec)} cannot be compiled: llguidance failed with "
                f"{type(error).__name__}; report this constraint"
            )
