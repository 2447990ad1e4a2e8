"""Ctrl-C while the modules of a command are still being imported: the command ends at once, without a traceback.

Import this module before slow ones. It changes `python -m pipeline.NAME` alone: a program that imports ringfeed keeps
its own handling of Ctrl-C.
"""

from __future__ import annotations

import signal
import sys
from typing import Final

_PREFIX: Final = "pipeline."


def _end_quietly_on_ctrl_c() -> None:
    """Let SIGINT end this process, if it runs a module of ours as its program."""
    if _runs_own_module() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_on_ctrl_c() -> None:
    """Let SIGINT raise KeyboardInterrupt again. Call it where that is caught."""
    if _runs_own_module() and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _runs_own_module() -> bool:
    arguments = sys.orig_argv
    return "-m" in arguments and f"{arguments[arguments.index('-m') + 1]}.".startswith(_PREFIX)


_end_quietly_on_ctrl_c()
