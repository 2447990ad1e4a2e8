"""Publishes results as their events fire, in step order, and rings the scheduler's doorbell.

Owns the thread that waits for the device, so that the launching thread never waits. If a step is complete as soon as it
is submitted (on the CPU), the submitting thread publishes it. A step that is held back for its masks also waits for the
result before it: so the thread wakes the launching thread after it has published.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from ipc.trace import Span
from ipc.tracer import NO_TRACE, Tracer
from workers.gpu.device.base import Device
from workers.gpu.execution.executor import Executor
from workers.gpu.execution.steps import Submitted

logger = logging.getLogger(__name__)


class ResultPublisher:
    """Takes steps in the order of their submission.

    `wake` wakes the submitting thread, which then calls `check` and `Executor.submit_next`: after a result that a step
    held back waits for, and when the waiting thread has died. `trace` belongs to the submitting thread, `thread_trace`
    to the waiting thread. `ring_scheduler` may be replaced after `settle`.
    """

    def __init__(
        self,
        device: Device[Any, Any],
        executor: Executor,
        ring_scheduler: Callable[[], None],
        wake: Callable[[], None],
        trace: Tracer = NO_TRACE,
        thread_trace: Tracer = NO_TRACE,
    ) -> None:
        self._device = device
        self._executor = executor
        self.ring_scheduler = ring_scheduler
        self._wake = wake
        self._trace = trace
        self._thread_trace = thread_trace
        self._failure: Exception | None = None
        self._waiting: SimpleQueue[Submitted | None] = SimpleQueue()  # None: settle
        self._settled: SimpleQueue[None] = SimpleQueue()  # an answer to each None, and one when the thread has died
        threading.Thread(target=self._run, name="completion", daemon=True).start()

    def submitted(self, step: Submitted) -> None:
        """Publish this step when its results are complete. Call it once for each step, right after its submission."""
        # If it is the oldest, the thread has published all steps before it and no longer publishes. A step with masks
        # may be submitted while the thread is about to drop the step before it: then the thread gets this one, too.
        if self._executor.under_way[0] is step and self._device.query(step.outputs_done):
            self._publish(step, self._trace)
        else:
            self._waiting.put(step)

    def check(self) -> None:
        """Raise the error that ended the thread, if it has ended. No result follows then: the process must end."""
        if self._failure is not None:
            raise self._failure

    def settle(self, timeout_s: float) -> None:
        """Wait until every submitted step is published and the device has nothing left to do.

        Nothing of the steps is used after that. Raises TimeoutError after `timeout_s` seconds, and the error that ended
        the thread.
        """
        self.check()
        self._waiting.put(None)
        try:
            self._settled.get(timeout=timeout_s)
        except Empty:
            raise TimeoutError(f"the device has not finished the steps under way within {timeout_s:g} s") from None
        self.check()

    def _publish(self, step: Submitted, trace: Tracer) -> None:
        with trace[Span.PUBLISH] as span:
            span.set(step.ticket)
            self._executor.publish()
            self.ring_scheduler()
        # `submit_next` sets `held_back` before it looks for the result: either it sees the result or we see the step.
        if self._executor.held_back is not None:
            self._wake()

    def _run(self) -> None:
        try:
            while True:
                step = self._waiting.get()
                if step is None:
                    self._device.settle()  # a step held back has left work on the device, and no event after it
                    self._settled.put(None)
                    continue
                # Once this event has fired, the result record is complete and the step record has been read.
                self._device.synchronize(step.outputs_done)
                self._publish(step, self._thread_trace)
                del step  # and with it the view of its record, which would keep a replaced ring mapped
        except Exception as error:
            logger.exception("waiting for a step's results failed")
            self._failure = error
            self._settled.put(None)
            self._wake()
