"""A file that one process writes while it runs, and no other process at the same time."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
from functools import partial
from io import FileIO

from ipc.errors import ConfigError

logger = logging.getLogger(__name__)


def open_claimed(
    path: str | os.PathLike[str], option: str, *, is_read_too: bool = False, permissions: int = 0o666
) -> FileIO:
    """Open a file for appending, and empty it. The claim on it lasts until every descriptor of it is closed.

    `option` names the file in errors; `permissions` are those of a new file. Raises ConfigError if the file cannot be
    written or another engine has claimed it.
    """
    name = f"{option} {os.fspath(path)}"
    try:
        file = FileIO(os.fspath(path), "a+" if is_read_too else "a", opener=partial(_open_at_once, permissions))
    except OSError as error:
        raise ConfigError(f"{name}: cannot be written: {error.strerror}") from None
    if not claim(file.fileno(), name):
        file.close()
        raise ConfigError(f"{name}: another engine writes to it: choose another file")
    try:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.truncate(0)
    except OSError as error:
        file.close()
        raise ConfigError(f"{name}: cannot be written: {error.strerror}") from None
    return file


def claim(fd: int, name: str) -> bool:
    """Claim an open file. False if another process has claimed it.

    A file system may have no locks. Then the file counts as claimed, and a warning says so.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("%s: cannot be locked (%s): let no other process write to it meanwhile", name, error.strerror)
    return True


def _open_at_once(permissions: int, path: str, flags: int) -> int:
    """Open a file for writing. A pipe without a reader is an error, because no signal would end the wait for one."""
    fd = os.open(path, flags | os.O_NONBLOCK, permissions)
    os.set_blocking(fd, True)
    return fd
