"""Clients that others write, against a running engine. `make test-clients` runs these tests in an environment of their
own (`requirements.txt`), and `run.py` starts the engine for them. Without an engine pytest collects nothing here."""

from __future__ import annotations

import os

import pytest

URL = os.environ.get("RINGFEED_CLIENTS_URL", "")
collect_ignore_glob = [] if URL else ["*"]


@pytest.fixture(scope="session")
def url() -> str:
    """The address of the engine's server, without a path."""
    return URL


@pytest.fixture(scope="session")
def model() -> str:
    """The name of the model that it serves."""
    return os.environ["RINGFEED_CLIENTS_MODEL"]


@pytest.fixture(scope="session")
def tokenizer() -> str:
    """The folder of the model, for tools that count tokens themselves."""
    return os.environ["RINGFEED_CLIENTS_TOKENIZER"]
