"""Bytes that are not HTTP, and requests to change the protocol."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.pipeline.http.running_server import DEADLINE_S, echo, request, run, serve


def test_bytes_that_are_not_http_are_refused() -> None:
    async def test() -> None:
        async with serve(echo) as running:
            for garbage in (
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
                b"GET\r\n\r\n",
                b"\r\n" * 50 + b"\0" * 100,
            ):
                reader, writer = await running.connect()
                writer.write(garbage)
                answer = await asyncio.wait_for(reader.read(), DEADLINE_S)
                assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
                writer.close()
            assert (await running.ask()).startswith(b"HTTP/1.1 200")

    run(test)


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_request_to_change_the_protocol_is_ignored(is_chunked: bool, is_split: bool) -> None:
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
    chunked = b"POST / HTTP/1.1\r\n%btransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n" % upgrade
    one = chunked if is_chunked else request(b"abcdefg", upgrade)

    async def test() -> None:
        async with serve(echo) as running:
            reader, writer = await running.connect()
            sent = one + one + request(b"x") + one
            for i in range(0, len(sent), 7 if is_split else len(sent)):
                writer.write(sent[i : i + (7 if is_split else len(sent))])
                await asyncio.sleep(0)
            for size in (7, 7, 1, 7):
                answer = await asyncio.wait_for(reader.readuntil(b"}"), DEADLINE_S)
                assert answer.startswith(b"HTTP/1.1 200")
                assert answer.endswith(b'{"size":%d}' % size)
            writer.close()

    run(test)
