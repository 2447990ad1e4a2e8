"""Clients that misuse their connections: they send slowly or too much, read nothing, leave, or send all at once.

By hand, with larger numbers than the tests: `python -m tests.reference.hostile_connections CONFIG` starts an engine and
prints what each kind of client cost.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

import msgspec
import psutil

from pipeline import AsyncClient, Pipeline
from tests.reference.good_requests import PROMPTS
from tests.reference.hostile_bodies import Connection, GoodClient, Request

T = TypeVar("T")

DEADLINE_S: Final = 90.0
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST
LONG: Final = {"prompt": "A class", "max_tokens": 900, "ignore_eos": True, "stream": True, "temperature": 0}


def request(body: dict[str, object], headers: str = "") -> bytes:
    """The bytes of a request for a completion."""
    encoded = msgspec.json.encode(body)
    return (
        f"POST /v1/completions HTTP/1.1\r\nhost: a\r\n{headers}content-length: {len(encoded)}\r\n\r\n".encode()
        + encoded
    )


class HostileClients:
    """Clients of one server. `engine` reads the engine's statistics."""

    def __init__(self, port: int, engine: AsyncClient) -> None:
        self.port = port
        self.engine = engine

    async def connect(self, receive_buffer: int = 0) -> socket.socket:
        """A bare connection, because asyncio's streams read without being asked."""
        found = socket.socket()
        found.setblocking(False)
        if receive_buffer:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(found, ("127.0.0.1", self.port))
        return found

    async def count(self, role: str, name: str) -> float:
        """A counter or gauge of the engine, summed over the processes of a role."""
        roles = await self.engine.stats()
        return sum(counters[name] for each, counters in roles.items() if each.partition(".")[0] == role)

    async def until(self, role: str, name: str, is_reached: Callable[[float], bool]) -> None:
        """Wait until the engine's figure is as expected. Raises TimeoutError once it has not changed for DEADLINE_S."""
        number, deadline = await self.count(role, name), time.monotonic() + DEADLINE_S
        while not is_reached(number):
            await asyncio.sleep(0.001)
            before, number = number, await self.count(role, name)
            if number != before:
                deadline = time.monotonic() + DEADLINE_S
            elif time.monotonic() > deadline:
                raise TimeoutError(f"{role}'s {name} has been {number:g} for {DEADLINE_S:g} s: {await self.stats()}")

    async def stats(self) -> dict[str, dict[str, float]]:
        """Those figures of each process that are not zero."""
        roles = await self.engine.stats()
        return {role: {name: each for name, each in counters.items() if each} for role, counters in roles.items()}

    async def begin_streams(self, count: int) -> list[socket.socket]:
        """Streams of which the first event has arrived. All of them run at the same time."""
        found = [await self.connect() for _ in range(count)]
        loop = asyncio.get_running_loop()
        for each in found:
            await loop.sock_sendall(each, request(LONG))
        for each in found:
            answer = b""
            while b"data: " not in answer:
                answer += await asyncio.wait_for(loop.sock_recv(each, 1_000), DEADLINE_S)
            assert answer.startswith(b"HTTP/1.1 200")
        return found

    async def leave_streams(self, num_streams: int, wave: int, num_others: int = len(PROMPTS)) -> list[float]:
        """Leave streams in waves, every second one with RST. Returns the seconds until each wave's rows were free.

        `num_others`: requests that may run besides.
        """
        times = []
        for _ in range(num_streams // wave):
            streams = await self.begin_streams(wave)
            before = await self.count("scheduler", "num_cancelled")
            for i, each in enumerate(streams):
                if i % 2:
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            begin = time.monotonic()
            for each in streams:
                each.close()
            await self.until("scheduler", "num_cancelled", lambda number, least=before + wave: number >= least)
            await self.until("scheduler", "num_running", lambda number: number <= num_others)
            times.append(time.monotonic() - begin)
        return times

    async def half_close(self) -> bytes:
        """End the sending side in mid-stream, and return what still comes. Waits until the row is free."""
        before = await self.count("scheduler", "num_cancelled")
        (stream,) = await self.begin_streams(1)
        with contextlib.closing(stream):
            stream.shutdown(socket.SHUT_WR)
            await self.until("scheduler", "num_cancelled", lambda number: number > before)
            received = b""
            while part := await asyncio.wait_for(asyncio.get_running_loop().sock_recv(stream, 1 << 20), DEADLINE_S):
                received += part
            return received

    @contextlib.asynccontextmanager
    async def slow_senders(self, count: int) -> AsyncIterator[list[socket.socket]]:
        """Connections with half a request: headers without end, or a body without end."""
        loop = asyncio.get_running_loop()
        found = [await self.connect() for _ in range(count)]
        for i, each in enumerate(found):
            await loop.sock_sendall(
                each, request(LONG)[:-20] if i % 2 else b"POST /v1/completions HTTP/1.1\r\nx: y\r\n"
            )
        try:
            yield found
        finally:
            for each in found:
                each.close()

    async def flood_headers(self, count: int) -> int:
        """Headers without end on many connections. Returns how many the server has closed."""
        return sum(await asyncio.gather(*(self._flood() for _ in range(count))))

    async def _flood(self) -> bool:
        loop = asyncio.get_running_loop()
        with contextlib.closing(await self.connect()) as connection:
            await loop.sock_sendall(connection, b"POST /v1/completions HTTP/1.1\r\n")
            try:
                for _ in range(1_000):
                    await loop.sock_sendall(connection, b"x-a: " + b"y" * 60_000 + b"\r\n")
            except ConnectionError:
                return True
        return False

    async def large_bodies(self, bodies: list[bytes]) -> list[int]:
        """Send bodies at the same time. Returns the statuses."""

        async def ask(body: bytes) -> int:
            with contextlib.closing(Connection(self.port)) as connection:
                return (await connection.ask(Request("POST", "/v1/completions", [], body))).status

        return await asyncio.gather(*map(ask, bodies))

    async def longest_answer(self, work: Awaitable[T]) -> tuple[T, float]:
        """Ask for the version, one request after the other, while `work` runs.

        Returns the result of `work`, and the seconds of the slowest answer. The server's own share is smaller, because
        this process is busy with `work` too.
        """
        longest = 0.0

        async def ask() -> None:
            nonlocal longest
            with contextlib.closing(Connection(self.port)) as connection:
                while True:
                    begin = time.monotonic()
                    answer = await connection.ask(Request("GET", "/version", [], b""))
                    assert answer.status == 200
                    longest = max(longest, time.monotonic() - begin)

        asking = asyncio.ensure_future(ask())
        try:
            return await work, longest
        finally:
            asking.cancel()
            await asyncio.wait([asking])

    async def read_nothing(self, count: int) -> None:
        """Streams that no one reads, with more text than the kernel's buffers hold. Waits until all are cut off."""
        before = await self.count("http", "num_send_timeouts")
        prompts = [[5 + i] * 900 for i in range(16)]  # about 12 MB of log-probabilities
        body = {"prompt": prompts, "max_tokens": 2, "stream": True, "echo": True, "logprobs": 20}
        loop = asyncio.get_running_loop()
        found = [await self.connect(receive_buffer=4_096) for _ in range(count)]
        try:
            for each in found:
                await loop.sock_sendall(each, request(body))
            await self.until("http", "num_send_timeouts", lambda number: number >= before + count)
            await self.until("http", "num_open_streams", lambda number: number == 0)
            await self.until("scheduler", "num_running", lambda number: number <= len(PROMPTS))  # the good ones
        finally:
            for each in found:
                each.close()

    async def pipeline(self, count: int) -> list[bytes]:
        """Requests sent at once on one connection. Returns their answers' bodies in order."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        with contextlib.closing(writer):
            bodies = [{"prompt": "A class", "max_tokens": 1 + i, "ignore_eos": True} for i in range(count)]
            writer.write(b"".join(request(body) for body in bodies))
            answers = []
            for _ in bodies:
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
                length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length"))
                answers.append(await reader.readexactly(int(length.split(b":")[1])))
            return answers


def memory_of(parent: psutil.Process) -> dict[str, int]:
    """Resident bytes of the http and gateway processes below a process."""
    found: dict[str, int] = {}
    for process in parent.children(recursive=True):
        line = " ".join(process.cmdline())
        for role in ("pipeline.http", "workers.gateway"):
            if f"-m {role}" in line:
                found[role] = found.get(role, 0) + process.memory_info().rss
    return found


async def _run_all(pipeline: Pipeline) -> None:
    assert pipeline.http_url is not None
    port = urlsplit(pipeline.http_url).port
    assert port is not None
    async with AsyncClient(pipeline.endpoint) as engine:
        clients, good = HostileClients(port, engine), GoodClient(port)

        async def report(what: str) -> None:
            sizes = {name: f"{size >> 20} MiB" for name, size in memory_of(psutil.Process()).items()}
            left = await clients.count("http", "num_disconnects")
            print(
                f"{what}: {sizes}; good {good.num_answers}, faults {len(good.faults)}; disconnects {left:.0f}",
                flush=True,
            )

        await report("at start")
        task: asyncio.Future[None] | None = None
        for wave, number in ((1, 200), (8, 800), (1, 200), (8, 800)):
            times = sorted(await clients.leave_streams(number, wave, 0 if task is None else len(PROMPTS)))
            if wave == 8 and task is None:
                task = asyncio.ensure_future(good.run())
            p50, p99 = times[len(times) // 2], times[len(times) * 99 // 100]
            await report(f"{number} left, {wave} at once: free after p50 {p50 * 1e3:.1f} p99 {p99 * 1e3:.1f} ms")
        print("half-closed got", len(await clients.half_close()), "bytes more")
        async with clients.slow_senders(1_000) as slow:
            await report("1,000 slow senders")
            begin = time.monotonic()
            loop = asyncio.get_running_loop()
            ends = await asyncio.gather(*(asyncio.wait_for(loop.sock_recv(each, 1), 90) for each in slow))
            await report(f"all {ends.count(b'')} closed after {time.monotonic() - begin:.0f} s")
        await report(f"header floods, {await clients.flood_headers(100)} of 100 closed")
        for name, body in LARGE_BODIES.items():
            begin = time.monotonic()
            statuses, longest = await clients.longest_answer(clients.large_bodies([body] * 16))
            duration = f"{time.monotonic() - begin:.1f} s, another request waits at most {longest * 1e3:.0f} ms"
            await report(f"16 of {len(body) >> 20} MiB of {name}: {set(statuses)} in {duration}")
        begin = time.monotonic()
        await clients.read_nothing(8)
        await report(f"8 that read nothing, all cut off after {time.monotonic() - begin:.0f} s")
        print("pipelined answers", [len(each) for each in await clients.pipeline(16)])
        assert task is not None
        task.cancel()
        await asyncio.wait([task])
        await report("at end")
        print(good.faults[:5])


LARGE_BODIES: Final = {
    "text": b'{"prompt": "' + b"a " * (5 << 20) + b'"}',
    "lists": b'{"prompt": [' + b"[]," * (3 << 20) + b"[]]}",
    "token ids": b'{"prompt": [' + b"12345," * 500_000 + b"1]}",
    "objects": b'{"logit_bias": {' + b",".join(b'"%d":1' % i for i in range(1_000_000)) + b'}, "prompt": "a"}',
    "no JSON": b"[" * (10 << 20),
    "too much": b" " * (20 << 20),
}


def main() -> None:
    with Pipeline(Path(sys.argv[1])) as pipeline:
        asyncio.run(_run_all(pipeline))


if __name__ == "__main__":
    main()
