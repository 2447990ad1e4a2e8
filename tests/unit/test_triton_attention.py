"""Triton chooses its interpreter when it is imported, for a whole process: these tests get a process of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("file", ["triton_interpreted.py", "triton_prepare_interpreted.py"])
def test_triton_kernels_agree_with_plain_torch_under_the_interpreter(file: str) -> None:
    tests = Path(__file__).with_name(file)
    root = tests.parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    outcome = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
