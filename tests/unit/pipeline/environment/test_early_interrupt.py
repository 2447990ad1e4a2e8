"""Ctrl-C while a command's modules are imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.environment.module_search import module_environment

ROOT = Path(__file__).parents[4]
# Interrupts the process when it imports a certain module.
SITE = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    ("command", "module", "status"),
    [
        (["-m", "pipeline.launch"], "pipeline.client.async_client", -signal.SIGINT),
        (["-m", "pipeline.launch"], "pipeline.cli", -signal.SIGINT),
        ([str(ROOT / "ringfeed.py"), "serve"], "pipeline.client.async_client", 130),
        (["-c", "import signal, pipeline; assert signal.getsignal(2) is signal.default_int_handler"], "", 0),
    ],
    ids=["package", "module", "ringfeed", "library"],
)
def test_ctrl_c_prints_no_traceback_while_modules_are_imported(
    command: list[str], module: str, status: int, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE.format(module))
    environment = module_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, *command, *(["--model", "none"] if module else [])],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (status, "")
