"""Runs code in separate processes, for tests of a client's effects on the process that uses it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable

from pipeline.environment.module_search import module_environment

WAIT_S = 20.0


def wait_until(condition: Callable[[], bool], what: str = "the condition") -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true"
        time.sleep(0.01)


def in_child(body: Callable[[], object]) -> str:
    """Fork, run it in the child, and return what it returned or raised, as text."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(int(WAIT_S))  # its end, if it hangs
        text = "nothing"
        try:
            text = str(body())
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        except BaseException:
            traceback.print_exc()
        with contextlib.suppress(BaseException):
            os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    assert os.waitpid(pid, 0)[1] == 0, f"the child was ended; it said {text!r}"
    return text


def run_script(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python program that uses this checkout, run to its end."""
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=module_environment(), capture_output=True, text=True, timeout=WAIT_S)
