"""An event loop in a background thread, for callers without one. Runs any coroutine."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, Generic, TypeVar

from ipc.errors import EngineUnavailable, InvalidRequest, RingfeedError
from pipeline.environment import forks
from pipeline.environment.descriptors import check_room, hold_standard_descriptors

T = TypeVar("T")

CLOSED: Final = "this client was closed"
_NUM_DESCRIPTORS: Final = 24  # more than a loop and its connection need
_TIDY_S: Final = 5.0  # for a cancelled coroutine to end


class LoopThread:
    """Runs coroutines for any number of threads. The first coroutine starts the thread, and again in a forked child.

    `close()` runs `at_end` on the loop; `at_end` must make the running coroutines end. Neither the loop nor its thread
    refers to this object.
    """

    def __init__(self, at_end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._at_end = at_end
        self._closed = False
        self._forget()
        forks.register(self)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run the coroutine on the loop and wait for it. An interrupt cancels it, and waits until it has cleaned up.

        Raises EngineUnavailable if the loop is closed or gets closed, or if the interpreter is shutting down.
        """
        call = _Call(coroutine)
        try:
            try:
                self._submit(call)
            except RingfeedError:
                call.cancel()  # it has not reached the loop
                raise
            call.ended.wait()
            assert call.task is not None, "it has run"
            return call.task.result()
        except asyncio.CancelledError:
            raise EngineUnavailable(CLOSED) from None
        except BaseException:
            if not call.ended.is_set():
                self._cancel(call)
            raise
        finally:
            del call  # the call holds the error, which holds this frame: a cycle

    def close(self) -> None:
        """Refuse new coroutines, end the running ones, then the thread. Any thread may call it, more than once."""
        self.close_soon()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread() and not sys.is_finalizing():
            thread.join()

    def close_soon(self) -> None:
        """Like `close`, without waiting. Finalizers call it too, in any thread, even the loop's own."""
        with self._lock:
            was_closed, self._closed = self._closed, True
            if not was_closed and self._loop is not None:
                self._loop.call_soon_threadsafe(self._begin_end)

    def forget_parent(self) -> None:
        if self._loop is not None:
            forks.keep_for_ever(self._loop, self._thread, *asyncio.all_tasks(self._loop))
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.RLock()  # reentrant: a finalizer may call `close` at any point
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._end_task: asyncio.Task[None] | None = None

    def _submit(self, call: _Call[T]) -> None:
        with self._lock:
            if self._closed:
                raise EngineUnavailable(CLOSED)
            if sys.is_finalizing():  # other threads have stopped, and no thread can start
                raise EngineUnavailable("a Client cannot be used while the interpreter shuts down (in a __del__?)")
            loop = self._loop or self._start()
            if self._thread is threading.current_thread():
                raise InvalidRequest(
                    "a Client was used from its own thread (by a finalizer?) and would deadlock: use it from "
                    "another thread, or AsyncClient"
                )
            try:
                loop.call_soon_threadsafe(call.start)
            except RuntimeError:  # a finalizer has just closed the loop
                raise EngineUnavailable(CLOSED) from None

    def _start(self) -> asyncio.AbstractEventLoop:
        hold_standard_descriptors()
        check_room(_NUM_DESCRIPTORS, "a client")
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_run, args=(loop,), name="ringfeed-client", daemon=True)
        self._loop, self._thread = loop, thread
        try:
            thread.start()
        except RuntimeError as error:
            self._loop = self._thread = None
            loop.close()
            raise EngineUnavailable(f"a client needs a thread, and this process cannot start one: {error}") from None
        return loop

    def _cancel(self, call: _Call[Any]) -> None:
        loop = self._loop
        try:
            if loop is None:
                raise RuntimeError("never started")
            loop.call_soon_threadsafe(call.cancel)
        except RuntimeError:
            call.cancel()
        else:
            call.ended.wait(_TIDY_S)

    def _begin_end(self) -> None:
        self._end_task = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        try:
            await self._at_end()
        finally:
            while others := asyncio.all_tasks() - {asyncio.current_task()}:
                _, late = await asyncio.wait(others, timeout=_TIDY_S)
                for task in late:
                    task.cancel()
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.stop)  # after the callbacks of tasks that have just ended


class _Call(Generic[T]):
    """A coroutine on its way to the loop, and then a task there. Only the loop's thread calls its methods."""

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self.task: asyncio.Task[T] | None = None
        self.ended = threading.Event()
        self._coroutine = coroutine

    def start(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self._coroutine)
        self.task.add_done_callback(self._end)

    def cancel(self) -> None:
        if self.task is None:
            self._coroutine.close()
            self.ended.set()
        else:
            self.task.cancel()

    def _end(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            task.exception()  # retrieve it: an interrupted caller does not, and asyncio would warn
        self.ended.set()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    with contextlib.closing(loop):
        while True:
            try:
                return loop.run_forever()
            except (SystemExit, KeyboardInterrupt):  # a coroutine raised it: its caller gets it, and the others go on
                pass
