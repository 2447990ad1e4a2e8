"""Triton chooses its interpreter when it is imported, for a whole process: these tests get processes of their own."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.reference.triton_interpreter import start_under_interpreter

KERNELS: Final = ("attention", "prepare", "sampler")


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All of them side by side."""
    started = {
        kernels: start_under_interpreter(Path(__file__).with_name(f"triton_{kernels}_interpreted.py"))
        for kernels in KERNELS
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("kernels", KERNELS)
def test_triton_kernels_agree_with_plain_torch_under_the_interpreter(
    kernels: str, processes: dict[str, subprocess.Popen[str]]
) -> None:
    printed, _ = processes[kernels].communicate(timeout=280)
    assert processes[kernels].returncode == 0, printed
