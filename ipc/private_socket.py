"""A listening Unix socket without a name in the file system: one descriptor to accept on, another to connect through.

Both can be passed to other processes. Only a process that was given the second can connect, and no process leaves a
file behind, however it ends. The socket has a name only while `open_private_socket` runs.
"""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import Final

from ipc.errors import EngineUnavailable

_BACKLOG: Final = 1_024  # connections that wait until the listener's process accepts them


def open_private_socket(folder: Path) -> tuple[int, int]:
    """The two descriptors; no child process inherits them.

    `folder` has the name for a moment: its path must be short, and it must be possible to write to it. Raises
    EngineUnavailable otherwise.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="ringfeed-", dir=folder) as private:  # of mode 0700
            path = Path(private) / "s"
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(str(path))
                listener.listen(_BACKLOG)
                return os.dup(listener.fileno()), os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise EngineUnavailable(
            f"cannot open an internal socket in {folder}: {error.strerror}: set XDG_RUNTIME_DIR to a folder that can "
            "be written to"
        ) from None


def endpoint_through(descriptor: int) -> str:
    """The ZeroMQ endpoint to connect to, in the process that has this descriptor."""
    return f"ipc:///proc/self/fd/{descriptor}"
