"""Bodies with many values are refused before they are decoded."""

from __future__ import annotations

import asyncio

import httpx2
import msgspec
import pytest

from pipeline.http import body_limits
from pipeline.http.body_limits import check_num_values
from pipeline.http.config import HttpConfig
from pipeline.http.errors import HttpError
from tests.unit.pipeline.http.application import app_of
from tests.unit.pipeline.http.fake_engine import FakeEngine

LIMITS = HttpConfig(max_body_values=2_048, max_body_objects=1_024)


def is_refused(body: bytes, config: HttpConfig = LIMITS) -> bool:
    try:
        asyncio.run(check_num_values(body, config, asyncio.Lock()))
    except HttpError:
        return True
    return False


@pytest.mark.parametrize(
    ("piece", "size"),
    [("[]", 1), ("{}", 1), ('""', 1), ('{"":1}', 2), (r'"a,[{\\"', 1), (r'[[[[[[[[[["]\\\""]]]]]]]]]]', 11)],
)
def test_texts_lists_and_objects_are_counted_wherever_they_are(
    piece: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_limits, "PIECE_BYTES", 7)  # pieces end everywhere
    most = (1_024 - 1) // size  # the list around them counts too
    for count, expected in ((most, False), (most + 1, True)):
        body = f"[{','.join([piece] * count)}]{' ' * 4_096}".encode()
        msgspec.json.decode(body)
        assert is_refused(body) is expected


def test_numbers_are_counted_and_may_be_more() -> None:
    assert not is_refused(msgspec.json.encode([100] * 2_048))
    assert is_refused(msgspec.json.encode([100] * 2_049))


@pytest.mark.parametrize("text", ["a, b " * 1_000, '[{"' * 1_000, "\\" * 1_001, '\\"' * 999 + "\\"])
def test_a_text_is_one_value_whatever_it_says(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limits, "PIECE_BYTES", 10_001)
    assert not is_refused(msgspec.json.encode({"prompt": text, "stop": [text] * 1_000}))
    assert is_refused(msgspec.json.encode({"prompt": text, "stop": [text] * 1_021}))


def test_other_requests_go_on_between_the_pieces_of_a_large_body() -> None:
    async def count_turns() -> int:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.ensure_future(other())
        await check_num_values(b'"' + b" " * (4 << 20) + b'"', LIMITS, asyncio.Lock())
        task.cancel()
        return turns

    assert asyncio.run(count_turns()) >= 4


def test_other_requests_go_on_between_large_bodies_that_arrive_together() -> None:
    async def order() -> str:
        done = ""

        async def other() -> None:
            nonlocal done
            while True:
                done += "."
                await asyncio.sleep(0)

        async def decode(turn: asyncio.Lock) -> None:
            nonlocal done
            await check_num_values(b'"' + b" " * 100_000 + b'"', LIMITS, turn)
            done += "B"

        task, turn = asyncio.ensure_future(other()), asyncio.Lock()
        await asyncio.gather(*(decode(turn) for _ in range(5)))
        task.cancel()
        return done

    found = asyncio.run(order())
    assert found.count("B") == 5
    assert "BB" not in found


def test_every_endpoint_with_a_body_refuses_many_values_and_names_the_key() -> None:
    body = b'{"prompt": [' + b"[]," * 40_000 + b"[]]}"

    async def ask() -> list[httpx2.Response]:
        app = app_of(FakeEngine())
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
            paths = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize")
            return [await client.post(path, content=body) for path in paths]

    for answer in asyncio.run(ask()):
        assert answer.status_code == 413
        assert "32,768 texts, lists and objects: send less, or raise http.max_body_objects" in answer.text
