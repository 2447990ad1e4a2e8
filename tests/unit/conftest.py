"""Starts separate test processes before the tests that wait for them, to use idle cores."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Iterator
from typing import Any, Final

import pytest
import zmq

from tests.reference.triton_interpreter import start_under_interpreter

INTERPRETED: Final = pytest.StashKey[dict[str, "subprocess.Popen[str]"]]()


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    """A ZeroMQ context, whose sockets are closed afterwards."""
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.destroy(linger=0)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the tests of every kind of kernels that will be waited for, at the lowest priority."""
    session.config.stash[INTERPRETED] = processes = {}
    if session.config.option.collectonly or importlib.util.find_spec("triton") is None:
        return
    for item in session.items:
        if isinstance(item, pytest.Function) and item.path.name == "test_triton_kernels.py":
            kernels = item.callspec.params["kernels"]
            processes[kernels] = start_under_interpreter(item.path.parent / f"{kernels}_interpreted.py")


def pytest_sessionfinish(session: pytest.Session) -> None:
    for process in session.config.stash.get(INTERPRETED, {}).values():
        process.kill()
        process.wait()
