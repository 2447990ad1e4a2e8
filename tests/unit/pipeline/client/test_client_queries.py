"""Queries for token ids, texts and kept values against a gateway whose answers the test writes."""

from __future__ import annotations

import asyncio
import gc
import reprlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ipc.chat import EncodedChat
from ipc.errors import EngineUnavailable, InvalidRequest, QueueFull, RequestFailed
from ipc.messages import (
    Cancel,
    DetokenizedText,
    DetokenizeQuery,
    FinalOutput,
    Keep,
    KeptValue,
    PromptTokens,
    Recall,
    Received,
    Refused,
    TokenBytes,
    TokenizeQuery,
)
from ipc.scheduling_params import SchedulingParams
from pipeline import AsyncClient, Chat, Client, TokenizedPrompt
from tests.unit.pipeline.client.fake_gateway import FakeGateway, int32, news

TABLE = TokenBytes(token_ids=int32(4, 7), lengths=int32(2, 1), data=b"hi!")


def two_tokens(query: TokenizeQuery) -> list[Any]:
    answer = PromptTokens(request_id=query.request_id, receipt=11, token_ids=int32(7, 4, 7), token_bytes=TABLE)
    return [answer]


def test_tokens_come_with_their_bytes_and_the_client_says_that_it_has_read_them(
    gateway: FakeGateway,
    client: Client,
) -> None:
    gateway.on_question = two_tokens
    found = client.tokenize("hi!", add_special_tokens=False, tenant="t")
    assert found == TokenizedPrompt([7, 4, 7], [b"!", b"hi", b"!"])
    assert found.num_tokens == 3
    query = gateway.expect(TokenizeQuery)
    assert (query.prompt, query.add_special_tokens, query.scheduling) == ("hi!", False, SchedulingParams(tenant="t"))
    assert gateway.expect(Received).receipts == [11]


def test_a_prompt_to_count_is_a_text_a_chat_or_ids_and_may_be_empty(
    gateway: FakeGateway,
    client: Client,
) -> None:
    gateway.on_question = two_tokens
    messages = b'[{"role":"user","content":"hi"}]'
    for prompt, field, value in (
        ([{"role": "user", "content": "hi"}], "chat", EncodedChat(messages=messages)),
        (Chat([{"role": "user", "content": "hi"}], add_generation_prompt=False), "chat",
         EncodedChat(messages=messages, add_generation_prompt=False)),
        ([1, 2], "token_ids", int32(1, 2)), (np.array([1, 2]), "token_ids", int32(1, 2)),
        ("", "prompt", ""), ([], "token_ids", b""),
    ):  # fmt: skip
        client.tokenize(prompt)
        query = gateway.expect(TokenizeQuery)
        assert query.add_special_tokens
        assert {name for name in ("prompt", "chat", "token_ids") if getattr(query, name) is not None} == {field}
        assert getattr(query, field) == value
        gateway.expect(Received)


def test_a_text_comes_from_ids_and_keeps_special_tokens_unless_told_otherwise(
    gateway: FakeGateway,
    client: Client,
) -> None:
    gateway.on_question = lambda q: [DetokenizedText(request_id=q.request_id, receipt=3, text="<s>hi")]
    for token_ids in ([1, 2], (1, 2), np.array([1, 2], np.uint8), range(1, 3)):
        assert client.detokenize(token_ids) == "<s>hi"
        query = gateway.expect(DetokenizeQuery)
        assert (query.token_ids, query.skip_special_tokens) == (int32(1, 2), False)
        gateway.expect(Received)
    client.detokenize([], skip_special_tokens=True)
    assert gateway.expect(DetokenizeQuery).skip_special_tokens


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.tokenize(5), lambda c: c.tokenize(b"x"), lambda c: c.tokenize([-1]), lambda c: c.tokenize("\ud800"),
        lambda c: c.tokenize("x", add_special_tokens=1), lambda c: c.tokenize("x" * (17 << 20)),
        lambda c: c.tokenize("x", tenant=5),
        lambda c: c.detokenize("12"), lambda c: c.detokenize(5), lambda c: c.detokenize([1.5]),
        lambda c: c.detokenize([2**31]), lambda c: c.detokenize([True]), lambda c: c.detokenize(np.zeros(2)),
        lambda c: c.detokenize([1], skip_special_tokens=None), lambda c: c.detokenize([1] * (5 << 20)),
        lambda c: c.keep("", b""), lambda c: c.keep("x" * 257, b""), lambda c: c.keep(5, b""),
        lambda c: c.keep("k", "text"), lambda c: c.keep("k", bytes(17 << 20)), lambda c: c.recall(None),
        lambda c: c.forget("\ud800"),
    ],
)  # fmt: skip
def test_an_impossible_query_is_refused_here(
    gateway: FakeGateway,
    client: Client,
    call: Callable[[Client], Any],
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        call(client)
    assert len(str(refused.value)) < 200, reprlib.repr(str(refused.value))
    assert gateway.heard.empty()


def test_a_value_is_kept_recalled_and_forgotten(gateway: FakeGateway, client: Client) -> None:
    values: dict[str, bytes] = {}

    def answer(message: Keep | Recall) -> list[Any]:
        found = message.key in values
        value = values.get(message.key, b"")
        if isinstance(message, Keep):
            values[message.key], value = message.value, b""
        elif message.forget:
            values.pop(message.key, None)
            value = b""
        return [KeptValue(request_id=message.request_id, found=found, receipt=len(value), value=value)]

    gateway.on_question = answer
    assert client.recall("k") is None
    client.keep("k", b"value")
    assert client.recall("k") == b"value"
    client.keep("k", b"")
    assert client.recall("k") == b""
    assert (client.forget("k"), client.forget("k")) == (True, False)
    heard = [type(gateway.heard.get(timeout=5)) for _ in range(8)]
    assert heard.count(Received) == 1, "only the answer with a value has a receipt"


def refused(code: str) -> Callable[[Any], list[Any]]:
    return lambda q: [Refused(request_id=q.request_id, error_code=code, error_message="why", retry_after_s=2.5)]


def ended(**fields: Any) -> Callable[[Any], list[Any]]:
    final = FinalOutput(num_prompt_tokens=0, num_completion_tokens=0, **fields)
    return lambda q: [news(q.request_id, end=final)]


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (refused("queue_full"), QueueFull, "why"),
        (refused("unavailable"), EngineUnavailable, "why"),
        (ended(finish_reason="error", error_code="invalid_request", error_message="id 7"), InvalidRequest, "id 7"),
        (ended(finish_reason="error", error_code="request_failed", error_message="why"), RequestFailed, "why"),
        (ended(finish_reason="queue_timeout"), QueueFull, "longer than its queue time-out"),
        (ended(finish_reason="deadline"), RequestFailed, "without an answer \\(deadline\\)"),
    ],
)
def test_a_query_that_fails_raises_its_error(
    gateway: FakeGateway,
    client: Client,
    answer: Any,
    error: type,
    text: str,
) -> None:
    gateway.on_question = answer
    with pytest.raises(error, match=text) as failed:
        client.tokenize("hi")
    if text == "why" and error is QueueFull:
        assert failed.value.retry_after_s == 2.5


def test_a_refused_recall_raises_its_error(gateway: FakeGateway, client: Client) -> None:
    gateway.on_question = refused("invalid_request")
    for call in (lambda: client.keep("k", b""), lambda: client.recall("k"), lambda: client.forget("k")):
        with pytest.raises(InvalidRequest, match="why"):
            call()


def test_a_query_waits_in_the_engines_queue_longer_than_the_time_out_of_the_client(gateway: FakeGateway) -> None:
    """The time-out is for the engine to be there. A kept value does not wait in a queue, so the time-out holds."""

    async def ask() -> None:
        async with AsyncClient(gateway.endpoint, timeout_s=5.0) as client:
            await client.health()
            client._session._timeout_s = client._timeout_s = 0.01
            counting = asyncio.create_task(client.tokenize("hi"))
            with pytest.raises(EngineUnavailable, match=r"within 0.01 s"):
                await client.recall("k")
            assert not counting.done()
            queries = [gateway.heard.get(timeout=5), gateway.heard.get(timeout=5)]
            [query] = [message for message in queries if isinstance(message, TokenizeQuery)]
            gateway.say(two_tokens(query)[0])
            assert (await counting).num_tokens == 3

    asyncio.run(ask())


def test_no_engine_is_an_error_after_the_time_out(tmp_path: Any) -> None:
    with Client(f"ipc://{tmp_path}/none", timeout_s=0.01) as client:
        for call in (lambda: client.tokenize("hi"), lambda: client.detokenize([1]), lambda: client.keep("k", b"")):
            with pytest.raises(EngineUnavailable, match="no engine answers"):
                call()


def test_a_cancelled_task_cancels_its_query_and_a_late_answer_is_still_acknowledged(gateway: FakeGateway) -> None:
    async def ask() -> None:
        async with AsyncClient(gateway.endpoint) as client:
            counting = asyncio.create_task(client.tokenize("hi"))
            query = await asyncio.to_thread(gateway.expect, TokenizeQuery)
            counting.cancel()
            await asyncio.wait([counting])
            assert counting.cancelled()
            assert (await asyncio.to_thread(gateway.expect, Cancel)).request_id == query.request_id
            gateway.say(two_tokens(query)[0])
            assert (await asyncio.to_thread(gateway.expect, Received)).receipts == [11]
            assert not client._session._pending.queries

    asyncio.run(ask())


def test_an_engine_that_goes_ends_its_open_queries_without_a_time_to_resume(gateway: FakeGateway) -> None:
    async def ask() -> None:
        async with AsyncClient(gateway.endpoint, resume_timeout_s=0) as client:
            counting = asyncio.create_task(client.tokenize("hi"))
            await asyncio.to_thread(gateway.expect, TokenizeQuery)
            await asyncio.to_thread(gateway.stop)
            with pytest.raises(EngineUnavailable, match="is gone"):
                await counting

    asyncio.run(ask())


def test_a_task_that_is_cancelled_while_its_query_fails_leaves_nothing_for_asyncio_to_log(gateway: FakeGateway) -> None:
    logged: list[str] = []

    async def ask() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context["message"]))
        async with AsyncClient(gateway.endpoint) as client:
            counting = asyncio.create_task(client.tokenize("hi"))
            await asyncio.to_thread(gateway.expect, TokenizeQuery)
            client._session._pending.fail_all(EngineUnavailable("gone"))
            counting.cancel()
            await asyncio.wait([counting])
            assert counting.cancelled()
        gc.collect()

    asyncio.run(ask())
    assert logged == []
