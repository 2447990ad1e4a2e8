"""The exit status of our commands, and how they report errors. Knows no command."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable

from ipc.errors import ConfigError, InvalidRequest, RingfeedError
from pipeline.environment.descriptors import open_closed_streams
from pipeline.environment.early_interrupt import raise_on_ctrl_c

BAD_USE_STATUS = 2


def status_of(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit status. Reports a RingfeedError in one line instead of a traceback.

    The status is 2 after ConfigError or InvalidRequest, 1 after another RingfeedError, and 130 after Ctrl-C. It is 1
    if standard output is full, which is reported, or if its reader has left, which is not. A character that the
    terminal's encoding lacks is printed as "?".
    """
    try:
        try:
            raise_on_ctrl_c()
            open_closed_streams()
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors="replace")
            return command() or 0
        finally:
            print(end="", flush=True)
    except RingfeedError as error:
        print_error(error)
        return BAD_USE_STATUS if isinstance(error, ConfigError | InvalidRequest) else 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for text that is still buffered
        if error.errno == errno.ENOSPC:
            print_error(f"the output cannot be written: {error.strerror}")
        return 1


def print_error(error: object) -> None:
    """Print why a command ends. If standard error cannot be written, the exit status stays the same."""
    try:
        print(f"error: {error}", file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # for text that is still buffered
