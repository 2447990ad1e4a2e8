"""Requests that overflow float16, among others, in a running engine."""

from __future__ import annotations

from pathlib import Path

from pipeline import Pipeline
from tests.reference.overflow import check_overflows, overflow_config


def test_an_overflow_ends_its_own_request_and_changes_no_other(tmp_path: Path) -> None:
    with Pipeline(overflow_config(tmp_path, "cpu")) as engine:
        check_overflows(engine.client)
