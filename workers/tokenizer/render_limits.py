"""Bounds the processor time and the memory of one piece of work in the main thread, which runs a chat template.

A timer signal interrupts the work every few milliseconds of processor time. Its handler compares the time and the
memory with their limits and raises an exception inside the work. Python runs the handler between two bytecodes, so a
single long operation in C is not interrupted: `template_sandbox.py` keeps these operations short.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from ipc.errors import InvalidRequest

TIMEOUT_S: Final = 1.0
MAX_NEW_BYTES: Final = 256 << 20
_TICK_S: Final = 0.02
_STATM: Final = Path("/proc/self/statm")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")

T = TypeVar("T")


class LimitExceeded(BaseException):
    """The work has reached a limit. Not an Exception: handlers in jinja2 must not take it for an error of theirs."""


class RenderLimits:
    """Runs one piece of work at a time within limits. Use it in the main thread, which receives the signals.

    Args:
        timeout_s: processor time of this thread. Time that other processes take from us does not count.
        max_new_bytes: growth of the process's resident memory.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S, max_new_bytes: int = MAX_NEW_BYTES) -> None:
        self.timeout_s = timeout_s
        self._max_new_bytes = max_new_bytes
        self._is_running = False
        self._end_s = 0.0
        self._max_bytes = 0

    def run(self, work: Callable[[], T]) -> T:
        """The result of `work()`. Raises InvalidRequest if it reaches a limit, and whatever `work` raises."""
        try:
            return self._run(work)
        except LimitExceeded as error:
            raise InvalidRequest(str(error)) from None

    def _run(self, work: Callable[[], T]) -> T:
        self._end_s = time.thread_time() + self.timeout_s
        self._max_bytes = _resident_bytes() + self._max_new_bytes
        collects = gc.isenabled()
        gc.disable()  # Python drops an exception that is raised within the collector's callbacks
        signal.signal(signal.SIGPROF, self._tick)  # for good: without a handler, a late signal would end the process
        signal.setitimer(signal.ITIMER_PROF, _TICK_S, _TICK_S)
        self._is_running = True
        try:
            return work()
        finally:
            self._is_running = False  # a signal that comes from here on raises nothing
            signal.setitimer(signal.ITIMER_PROF, 0)
            if collects:
                gc.enable()

    def _tick(self, *_: Any) -> None:
        if not self._is_running:
            return
        if time.thread_time() > self._end_s:
            raise LimitExceeded(
                f"rendering this chat takes more than {self.timeout_s:g} s of processor time "
                "(tokenizer.template_timeout_s): shorten the chat, or raise that limit"
            )
        if _resident_bytes() > self._max_bytes:
            raise LimitExceeded(
                f"rendering this chat takes more than {self._max_new_bytes >> 20} MiB of memory: shorten the chat"
            )


def _resident_bytes() -> int:
    return int(_STATM.read_bytes().split()[1]) * _PAGE_BYTES
