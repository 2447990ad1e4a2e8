"""Requests to end the engine: signals, as bytes on a pipe that a poll can wait for, and the lifeline's end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import zmq

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class EndRequests:
    """The requests to end so far, from `signal_fd` (see `signal_pipe`) and from the end of file on `lifeline_fd`."""

    def __init__(self, signal_fd: int, lifeline_fd: int | None, poller: zmq.Poller) -> None:
        self._signal_fd = signal_fd
        self._lifeline_fd = lifeline_fd
        self._poller = poller
        self._signals: list[int | None] = []  # None: the lifeline's end
        for fd in (signal_fd, lifeline_fd):
            if fd is not None:
                poller.register(fd, zmq.POLLIN)

    def __len__(self) -> int:
        return len(self._signals)

    def take_in(self, readable: set[Any]) -> None:
        """Note the requests that the poll has found."""
        if self._signal_fd in readable:
            self._signals += os.read(self._signal_fd, 64)
        if self._lifeline_fd in readable:
            self._poller.unregister(self._lifeline_fd)
            self._signals.append(None)

    @property
    def is_hasty(self) -> bool:
        """Whether the first request was the lifeline's end: then no user waits for an orderly end."""
        return self._signals[0] is None

    @property
    def cause(self) -> str:
        """The first request, in words."""
        first = self._signals[0]
        return "the launcher's parent is gone" if first is None else signal.Signals(first).name

    @property
    def exit_status(self) -> int:
        """0 for one request, 128 + signal for a second one."""
        return 128 + (self._signals[-1] or signal.SIGTERM) if len(self._signals) > 1 else 0


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
