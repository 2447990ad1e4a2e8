"""Engines for the integration tests: one shared one on the shipped model, and what a test needs to start its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import Client, Pipeline

TINY_CONFIG = Path(__file__).parents[2] / "configs" / "tiny.toml"


@pytest.fixture(scope="session")
def engine() -> Iterator[Pipeline]:
    """An engine on the shipped model, shared by tests that leave it as they found it."""
    with Pipeline(TINY_CONFIG) as pipeline:
        yield pipeline


@pytest.fixture
def client(engine: Pipeline) -> Client:
    return engine.client
