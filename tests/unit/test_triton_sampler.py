"""Triton chooses its interpreter when it is imported, for a whole process: these tests get a process of their own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.reference.triton_interpreter import run_under_interpreter


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_sampler_on_cuda_agrees_with_the_cpus_under_the_interpreter() -> None:
    run_under_interpreter(Path(__file__).with_name("triton_sampler_interpreted.py"))
