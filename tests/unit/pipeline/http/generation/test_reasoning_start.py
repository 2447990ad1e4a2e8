"""Whether a prompt begins in the reasoning: what is remembered of earlier requests."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from pipeline import Chat
from pipeline.http.generation.reasoning_start import ReasoningStart
from tests.unit.pipeline.http.fake_engine import FakeEngine

MESSAGES = [{"role": "user", "content": "Hi"}]


def test_an_answer_is_kept_for_each_combination_of_arguments_but_not_the_arguments_themselves() -> None:
    engine: Any = FakeEngine()
    start = ReasoningStart(engine, ("<think>", "</think>"))
    chats = [Chat(MESSAGES, chat_template_kwargs={"text": "x" * 100_000, "i": i}) for i in (0, 1, 0, 1)]

    async def ask() -> None:
        for chat in chats:
            assert not await start.is_inside(chat)

    asyncio.run(ask())
    assert len(engine.tokenized) == 2
    assert sum(map(sys.getsizeof, start._known)) < 1_000
