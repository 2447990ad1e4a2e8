"""How many requests share one answer of the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pipeline.http.shared_answer import SharedAnswer


class Engine:
    """Counts what it is asked, and answers when it is told to."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.may_answer = asyncio.Event()
        self.error: Exception | None = None

    async def ask(self) -> int:
        self.num_asked += 1
        number = self.num_asked
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        return number


def run(test: Callable[[Engine], Awaitable[None]]) -> None:
    async def start() -> None:
        await test(Engine())

    asyncio.run(start())


def test_requests_share_the_answer_that_is_under_way_and_the_one_that_has_just_arrived() -> None:
    async def test(engine: Engine) -> None:
        shared = SharedAnswer(engine.ask, max_age_s=3_600)
        waiting = [asyncio.create_task(shared.get()) for _ in range(3)]
        await asyncio.sleep(0)
        engine.may_answer.set()
        assert await asyncio.gather(*waiting) == [1, 1, 1]
        assert await shared.get() == 1

    run(test)


def test_an_old_answer_is_not_given_again() -> None:
    async def test(engine: Engine) -> None:
        engine.may_answer.set()
        shared = SharedAnswer(engine.ask, max_age_s=0)
        assert [await shared.get(), await shared.get()] == [1, 2]

    run(test)


def test_a_request_that_is_cancelled_takes_the_answer_from_no_other() -> None:
    async def test(engine: Engine) -> None:
        shared = SharedAnswer(engine.ask, max_age_s=3_600)
        first, second = (asyncio.create_task(shared.get()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        engine.may_answer.set()
        assert await second == 1

    run(test)


def test_an_error_is_not_kept() -> None:
    async def test(engine: Engine) -> None:
        shared = SharedAnswer(engine.ask, max_age_s=3_600)
        engine.may_answer.set()
        engine.error = RuntimeError("gone")
        with pytest.raises(RuntimeError, match="gone"):
            await shared.get()
        engine.error = None
        assert await shared.get() == 2

    run(test)
