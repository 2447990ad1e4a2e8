"""Requests that overflow float16, among others, in a running engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import Pipeline
from tests.reference.overflow import check_overflows, overflow_config


@pytest.mark.parametrize("cache_dtype", ["auto", pytest.param("fp8_e4m3", marks=pytest.mark.slow)])
def test_an_overflow_ends_its_own_request_and_changes_no_other(cache_dtype: str, tmp_path: Path) -> None:
    with Pipeline(overflow_config(tmp_path, "cpu", cache_dtype)) as engine:
        check_overflows(engine.client)
