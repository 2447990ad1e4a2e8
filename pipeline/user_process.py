"""Keeps our descriptors in the user's process off the standard streams, and checks that there is room for them."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
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


def check_room(num_descriptors: int, purpose: str) -> None:
    """Raise EngineUnavailable if this process cannot open this many more. libzmq would abort the process instead."""
    with contextlib.ExitStack() as opened:
        try:
            for _ in range(num_descriptors):
                opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            raise EngineUnavailable(
                f"{purpose} needs {num_descriptors} descriptors, and this process has almost as many open as it may "
                f"({soft_limit}): close what is not needed (clients too), or raise the limit (ulimit -n)"
            ) from None
