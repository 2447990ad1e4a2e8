"""Reports the errors of our commands, and ends a command whose output cannot be written. Knows no command."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Exit with `status_of(main)`. A character that the terminal's encoding lacks is shown as "?"."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    sys.exit(status_of(main))


def status_of(write: Callable[[], int | None]) -> int:
    """What `write` returns, or 1 once standard output is full (said in one line) or its reader has left."""
    try:
        try:
            return write() or 0
        finally:
            print(end="", flush=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        if error.errno == errno.ENOSPC:
            print_error(f"the output cannot be written: {error.strerror}")
        return 1


def print_error(error: object) -> None:
    """Say in one line why a command ends. A standard error that cannot be written does not change the exit status."""
    try:
        print(f"error: {error}", file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # for what is still buffered
