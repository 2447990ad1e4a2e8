"""A launcher that ends early, here because of its configuration, leaves nothing behind for its Pipeline's process."""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.engine.launcher_process import EngineProcess
from pipeline.environment.module_search import module_environment
from tests.unit.pipeline.client.client_scripts import in_child, wait_until

BAD_CONFIG = "[nonsense]\n"
AT_EXIT = """
import sys, tempfile, time
from pathlib import Path
from pipeline.engine.launcher_process import EngineProcess
engine = EngineProcess("[nonsense]", (), log=tempfile.TemporaryFile(), folder=Path(sys.argv[1]))
while engine.poll() is None:
    time.sleep(0.01)
"""


def drop(engine: EngineProcess) -> None:
    deadline = time.monotonic() + 60
    while engine.poll() is None:
        assert time.monotonic() < deadline, "the launcher never refused its configuration"
        time.sleep(0.01)


def look_and_wait(engine: EngineProcess) -> None:
    """Any process can see whether the launcher has ended, before and after its parent has reaped it."""
    assert in_child(engine.has_ended) == "False"
    wait_until(engine.has_ended, "the end of the launcher")
    assert in_child(engine.has_ended) == "True"
    engine.wait(60)
    assert (in_child(engine.has_ended), engine.has_ended()) == ("True", True)


@pytest.mark.parametrize("leave", [look_and_wait, lambda engine: engine.end(), drop], ids=["wait", "end", "drop"])
def test_its_folder_goes_however_the_end_is_noticed(leave: Callable[[EngineProcess], object], tmp_path: Path) -> None:
    folder = tmp_path / "of the engine"
    folder.mkdir()
    with tempfile.TemporaryFile() as log:
        engine = EngineProcess(BAD_CONFIG, (), log=log, folder=folder)
        leave(engine)
        del engine
        gc.collect()
    assert not folder.exists()


def test_its_folder_goes_when_the_interpreter_exits(tmp_path: Path) -> None:
    folder = tmp_path / "of the engine"
    folder.mkdir()
    command = [sys.executable, "-c", AT_EXIT, str(folder)]
    subprocess.run(command, env=module_environment(), check=True, timeout=60)
    assert not folder.exists()
