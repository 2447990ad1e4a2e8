"""OpenAI's JavaScript package. `openai_package.mjs` has the checks."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CHECKS = [
    "models", "completions", "chat_completions", "parsed_output", "tools", "responses", "errors",
    "a_stream_that_is_aborted",
]  # fmt: skip


def test_the_javascript_package_works(url: str, model: str, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.fail("node is not installed: install Node.js 20 or later, which has npm")
    # Node looks for packages beside the script, so the script goes to the packages.
    script = Path(os.environ["RINGFEED_CLIENTS_NODE"]) / "openai_package.mjs"
    shutil.copyfile(Path(__file__).with_name(script.name), script)
    done = subprocess.run([node, script, url, model], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == CHECKS
