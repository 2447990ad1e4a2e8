"""Clients that misuse their connections, against a running engine, beside good requests.

`python -m tests.reference.hostile_connections CONFIG` does the same with larger numbers, and prints them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import msgspec
import psutil
import pytest

from pipeline import AsyncClient, Pipeline
from tests.integration.conftest import TINY_CONFIG
from tests.reference.hostile_bodies import GoodClient
from tests.reference.hostile_connections import LARGE_BODIES, HostileClients, memory_of

pytestmark = pytest.mark.slow

MAX_FREE_S = 0.05  # from a client's leaving to its row; the median, because the machine may be busy
MAX_GROWTH = 64 << 20  # bytes, of each process


@pytest.fixture(scope="module")
def engine() -> Iterator[Pipeline]:
    with Pipeline(TINY_CONFIG, {"http.receive_timeout_s": 2.0}) as pipeline:
        yield pipeline


def run(engine: Pipeline, test: Callable[[HostileClients], Awaitable[None]]) -> None:
    """Run a test beside good requests, all of which must get their right answers."""

    @asynccontextmanager
    async def good_requests(port: int) -> AsyncIterator[None]:
        good = GoodClient(port)
        task = asyncio.ensure_future(good.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
        assert good.faults == []
        assert good.num_answers > 0

    async def main() -> None:
        assert engine.http_url is not None
        port = urlsplit(engine.http_url).port
        assert port is not None
        async with AsyncClient(engine.endpoint) as client, good_requests(port):
            await test(HostileClients(port, client))

    asyncio.run(main())


def test_a_client_that_leaves_in_mid_stream_frees_its_row_within_50_ms(engine: Pipeline) -> None:
    async def test(clients: HostileClients) -> None:
        before = await clients.count("http", "num_disconnects")
        times = sorted(await clients.leave_streams(20, 1))
        assert times[len(times) // 2] < MAX_FREE_S
        await clients.leave_streams(16, 8)
        await clients.half_close()
        await clients.until("http", "num_disconnects", lambda number: number >= before + 37)
        await clients.until("http", "num_open_streams", lambda number: number == 0)

    run(engine, test)


def test_floods_cost_bounded_memory_and_no_good_request(engine: Pipeline) -> None:
    async def test(clients: HostileClients) -> None:
        before = memory_of(psutil.Process())
        timeouts = await clients.count("http", "num_header_timeouts")
        async with clients.slow_senders(200) as slow:
            assert await clients.flood_headers(20) == 20
            loop = asyncio.get_running_loop()
            ends = await asyncio.gather(*(asyncio.wait_for(loop.sock_recv(each, 1), 20) for each in slow))
            assert ends == [b""] * len(slow)
        await clients.until("http", "num_header_timeouts", lambda number: number >= timeouts + 200)
        for body in LARGE_BODIES.values():
            assert set(await clients.large_bodies([body])) <= {400, 413}
        after = memory_of(psutil.Process())
        assert set(after) == {"pipeline.http", "workers.gateway"}
        assert {role for role in after if after[role] - before[role] > MAX_GROWTH} == set()

    run(engine, test)


def test_clients_that_read_nothing_are_cut_off_and_hold_no_row(engine: Pipeline) -> None:
    async def test(clients: HostileClients) -> None:
        await clients.read_nothing(2)

    run(engine, test)


def test_pipelined_requests_are_answered_in_order(engine: Pipeline) -> None:
    async def test(clients: HostileClients) -> None:
        answers = [msgspec.json.decode(each) for each in await clients.pipeline(12)]
        assert [answer["usage"]["completion_tokens"] for answer in answers] == list(range(1, 13))

    run(engine, test)
