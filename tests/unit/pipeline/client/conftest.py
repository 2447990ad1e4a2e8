"""A gateway whose answers the test writes, and a client of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline import Client
from tests.unit.pipeline.client.fake_gateway import FakeGateway


@pytest.fixture
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeGateway]:
    gateway = FakeGateway(f"ipc://{tmp_path_factory.mktemp('f')}/s")
    yield gateway
    gateway.stop()


@pytest.fixture
def client(gateway: FakeGateway) -> Iterator[Client]:
    with Client(gateway.endpoint) as client:
        yield client
