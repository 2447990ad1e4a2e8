"""Descriptors of this process: how many may be open (`ulimit -n`), and which numbers the standard streams keep."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sys
from typing import Final

from ipc.errors import EngineUnavailable

_LAST_STANDARD: Final = 2


def hold_standard_descriptors() -> None:
    """Open /dev/null under the numbers 0 to 2 where they are closed, as in a daemon.

    Otherwise our sockets and pipes would get these numbers. A library that prints to standard error would write into
    the connection, and `subprocess` would overwrite our pipes in a child.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= _LAST_STANDARD:
        pass
    os.close(fd)


def open_closed_streams() -> None:
    """Open /dev/null for each standard stream that this process was started without.

    Python's `sys.stdout` would be None, and the next file that is opened would get the stream's descriptor.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            fd = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(fd, True)  # our child processes get it too
            setattr(sys, name, os.fdopen(fd, mode))


def raise_descriptor_limit() -> None:
    """Raise the soft limit to the hard limit. Processes started after this, the workers, inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check_room(num_descriptors: int, purpose: str) -> None:
    """Raise EngineUnavailable if this process cannot open `num_descriptors` more. libzmq would abort the process."""
    with contextlib.ExitStack() as opened:
        for num_opened in range(num_descriptors):
            try:
                opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
                raise EngineUnavailable(
                    f"{purpose} needs {num_descriptors} more descriptors, and this process can open {num_opened}, as "
                    f"ulimit -n is {limit}: close files or clients that are not needed, or raise the limit"
                ) from None
