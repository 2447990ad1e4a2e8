"""Triton chooses its interpreter when it is imported, for the whole process. So these tests run in separate processes.

They run from the session's start, beside other tests (`conftest.py`).
"""

from __future__ import annotations

import importlib.util

import pytest

from tests.unit.conftest import INTERPRETED


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "kernels",
    [
        "attention/triton_attention",
        "execution/triton_batch_builder",
        "products/triton_few_rows",
        "sampling/triton_sampler",
        "sampling/triton_adjustments",
    ],
)
def test_triton_kernels_agree_with_plain_torch_under_the_interpreter(
    kernels: str, request: pytest.FixtureRequest
) -> None:
    process = request.config.stash[INTERPRETED][kernels]
    printed, _ = process.communicate(timeout=280)
    assert process.returncode == 0, printed
