"""Triton chooses its interpreter when it is imported, for a whole process: these tests get processes of their own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.reference.triton_interpreter import run_under_interpreter


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("kernels", ["attention", "prepare", "sampler"])
def test_triton_kernels_agree_with_plain_torch_under_the_interpreter(kernels: str) -> None:
    run_under_interpreter(Path(__file__).with_name(f"triton_{kernels}_interpreted.py"))
