"""Publishes results as their events fire, in step order, and tells the scheduler.

Owns the thread that waits for the device, so that launching never does. Where a step is complete as soon as it is
submitted (on the CPU), there is nothing to wait for and the submitting thread publishes it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from ipc.trace import Span
from ipc.tracer import NO_TRACE, Tracer
from workers.gpu.device.base import Device
from workers.gpu.execution.executor import Executor, Submitted

logger = logging.getLogger(__name__)


class ResultPublisher:
    """Takes steps in order, as they are submitted. `failed` is rung when the thread has died: see `check`.

    `trace` belongs to the submitting thread, `thread_trace` to the one that waits.
    """

    def __init__(
        self,
        device: Device[Any, Any],
        executor: Executor,
        ring_scheduler: Callable[[], None],
        failed: Callable[[], None],
        trace: Tracer = NO_TRACE,
        thread_trace: Tracer = NO_TRACE,
    ) -> None:
        self._device = device
        self._executor = executor
        self._ring_scheduler = ring_scheduler
        self._failed = failed
        self._trace = trace
        self._thread_trace = thread_trace
        self._failure: Exception | None = None
        self._waiting: SimpleQueue[Submitted] = SimpleQueue()
        threading.Thread(target=self._run, name="completion", daemon=True).start()

    def submitted(self, step: Submitted) -> None:
        """Publish this step when its results are there. Called once a step, right after it was submitted."""
        # If it is the oldest, the thread has published all before it and touches the executor no more.
        if self._executor.under_way[0] is step and self._device.query(step.outputs_done):
            self._publish(step, self._trace)
        else:
            self._waiting.put(step)

    def check(self) -> None:
        """Raise what ended the thread, if anything did. No result comes after that: the process must end."""
        if self._failure is not None:
            raise self._failure

    def _publish(self, step: Submitted, trace: Tracer) -> None:
        with trace[Span.PUBLISH] as span:
            span.set(step.ticket)
            self._executor.publish()
            self._ring_scheduler()

    def _run(self) -> None:
        try:
            while True:
                # The result record is whole, and the step record read, once this event has fired.
                step = self._waiting.get()
                self._device.synchronize(step.outputs_done)
                self._publish(step, self._thread_trace)
        except Exception as error:
            logger.exception("waiting for a step's results failed")
            self._failure = error
            self._failed()
