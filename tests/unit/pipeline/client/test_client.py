"""Both clients against a gateway whose answers the test writes."""

from __future__ import annotations

import asyncio
import gc
import os
import reprlib
import subprocess
import sys
import threading
import weakref
from array import array
from typing import Any

import msgspec
import numpy as np
import pytest

from ipc.chat import EncodedChat
from ipc.errors import EngineUnavailable, InvalidRequest, QueueFull, RequestFailed
from ipc.messages import (
    Cancel,
    FinalOutput,
    Generate,
    Outputs,
    Refused,
    TokenBytes,
    TokenLogprobs,
)
from ipc.scheduling_params import SchedulingParams
from pipeline import AsyncClient, Chat, Client, SamplingParams
from pipeline.client.outputs import Usage
from pipeline.environment.module_search import module_environment
from tests.unit.pipeline.client.client_scripts import WAIT_S
from tests.unit.pipeline.client.fake_gateway import (
    CANCELLED,
    END,
    FakeGateway,
    end_of,
    int32,
    news,
    prompt_part,
    read_prompt,
    times_of,
)


def test_a_whole_answer_has_text_ids_reason_and_usage(gateway: FakeGateway, client: Client) -> None:
    gateway.on_generate = lambda g: [news(g.request_id, "hello", (7, 8), END)]
    output = client.generate("hi", SamplingParams(max_tokens=2))
    assert (output.text, output.token_ids, output.finished, output.finish_reason) == ("hello", [7, 8], True, "length")
    assert output.usage is not None
    assert (output.usage.prompt_tokens, output.usage.completion_tokens, output.usage.total) == (3, 2, 5)
    sent = gateway.expect(Generate)
    assert (sent.prompt, sent.params.max_tokens, sent.stream) == ("hi", 2, False)


def test_prompts_travel_as_text_chat_or_ids(gateway: FakeGateway, client: Client) -> None:
    gateway.on_generate = lambda g: [news(g.request_id, end=END)]
    client.generate([{"role": "user", "content": "hi"}])
    assert gateway.expect(Generate).chat == EncodedChat(messages=b'[{"role":"user","content":"hi"}]')
    client.generate(Chat([{"role": "user", "content": "hi"}], tools=[{"name": "f"}], continue_final_message=True))
    sent = gateway.expect(Generate).chat
    assert (sent.tools, sent.add_generation_prompt, sent.continue_final_message) == (b'[{"name":"f"}]', False, True)
    for prompt in ([1, 2], np.array([1, 2]), np.array([1, 2], np.uint16), (1, 2), range(1, 3)):
        client.generate(prompt)
        assert gateway.expect(Generate).token_ids == int32(1, 2)


@pytest.mark.parametrize(
    "prompt",
    ["", [], 5, None, b"bytes", b"12345678",
     [1.5], [1, "a"], [-1], [2**31], np.zeros((2, 2), int), np.zeros(2), "\ud800",
     [True, False], [1, True], [np.True_], np.array([True]),
     [{"role": "user", "content": b"x"}], [{"role": "user", "content": "x"}, 5],
     "x" * (17 << 20), "x" * (65 << 20), [{"role": "user", "content": "x"}] * 16_385],
    ids=reprlib.repr,
)  # fmt: skip
def test_an_impossible_prompt_is_refused_here(gateway: FakeGateway, client: Client, prompt: Any) -> None:
    gateway.on_generate = lambda g: [news(g.request_id, end=END)]
    with pytest.raises(InvalidRequest):
        client.generate(prompt)


@pytest.mark.parametrize("request_id", ["", "x" * 257, 5])
def test_a_request_id_that_could_not_be_told_back_is_refused_here(
    gateway: FakeGateway, client: Client, request_id: Any
) -> None:
    gateway.on_generate = lambda g: [news(g.request_id, end=END)]
    with pytest.raises(InvalidRequest, match=r"request_id \("):
        client.generate("hi", request_id=request_id)
    assert client.generate("hi", request_id="x" * 256).finished


def test_a_stream_yields_what_is_new_and_ends(gateway: FakeGateway, client: Client) -> None:
    stream = client.generate("hi", stream=True, request_id="r")
    assert gateway.expect(Generate).stream
    gateway.say(news("r", "a", (1,)))
    first = next(stream)
    assert (first.text, first.token_ids, first.finished) == ("a", [1], False)
    gateway.say(news("r", "b", (2,), END))
    last = next(stream)
    assert (last.text, last.token_ids, last.finished, last.finish_reason) == ("b", [2], True, "length")
    assert list(stream) == []


def test_a_slow_reader_gets_everything_coalesced_and_holds_no_credit(gateway: FakeGateway, client: Client) -> None:
    stream = client.generate("hi", stream=True, request_id="r")
    gateway.expect(Generate)
    for i in range(200):
        gateway.say(news("r", "x", (i,)))
    gateway.say(news("r", end=END))
    barrier(gateway, client)
    while gateway.num_delivered < 201:
        client.stats()
    outputs = list(stream)
    assert len(outputs) == 1, "the stream was not read meanwhile: one Output has everything"
    assert "".join(o.text for o in outputs) == "x" * 200
    assert [i for o in outputs for i in o.token_ids] == list(range(200))


def barrier(gateway: FakeGateway, client: Client) -> None:
    """Return after the client has read the gateway's earlier frames. Socket and orders keep their order."""
    assert client.generate("barrier", request_id=gateway_echo(gateway)).finished


def gateway_echo(gateway: FakeGateway) -> str:
    gateway.on_generate = lambda g: gateway.say(news(g.request_id, end=END)) or []  # type: ignore[func-returns-value]
    return "barrier"


def test_logprobs_are_unpacked_per_token(gateway: FakeGateway, client: Client) -> None:
    logprobs = TokenLogprobs(
        num_top=2,
        logprobs=array("f", [-1.0, -2.0]).tobytes(),
        top_ids=int32(5, 6, 7, 8),
        top_logprobs=array("f", [-0.5, -1.0, -0.25, -2.0]).tobytes(),
        extra_ids=int32(9, 5),
        extra_logprobs=array("f", [-3.0, -0.5, -4.0, -5.0]).tobytes(),
    )
    names = {5: b"x", 6: "é".encode()[:1], 7: b"", 8: b"</s>", 9: "é".encode()}
    table = TokenBytes(int32(*names), int32(*map(len, names.values())), b"".join(names.values()))
    gateway.on_generate = lambda g: [news(g.request_id, "ab", (6, 8), END, logprobs=[(0, logprobs)], token_bytes=table)]
    output = client.generate("hi", SamplingParams(logprobs=2, logprob_token_ids=[9, 5]))
    assert output.logprobs is not None
    assert [(t.token_id, t.logprob, t.top, t.requested) for t in output.logprobs] == [
        (6, -1.0, {5: -0.5, 6: -1.0}, {9: -3.0, 5: -0.5}),
        (8, -2.0, {7: -0.25, 8: -2.0}, {9: -4.0, 5: -5.0}),
    ]
    first, second = output.logprobs
    assert (first.bytes, first.text, first.text_of(9), first.text_of(8)) == (b"\xc3", "\ufffd", "é", "")
    assert (second.bytes, second.text) == (b"</s>", "</s>")
    assert first.token_bytes == {i: names[i] for i in (5, 6, 9)}
    assert list(first.requested) == [9, 5]


def test_a_whole_answer_has_one_entry_for_each_token_of_the_prompt(gateway: FakeGateway, client: Client) -> None:
    table = TokenBytes(int32(4, 5), int32(1, 2), b"xyz")
    gateway.on_generate = lambda g: [
        news(g.request_id, prompt_logprobs=[(0, prompt_part(4))], token_bytes=table),
        news(g.request_id, "ab", (6, 8), END, prompt_logprobs=[(0, prompt_part(7)), (0, prompt_part(9))]),
    ]
    output = client.generate("hi", SamplingParams(prompt_logprobs=1))
    assert gateway.expect(Generate).params.prompt_logprobs == 1
    assert read_prompt(output) == [None, (4, -4.0, {5: -0.5}), (7, -7.0, {8: -0.5}), (9, -9.0, {10: -0.5})]
    assert output.prompt_logprobs is not None
    first = output.prompt_logprobs[1]
    assert first is not None
    assert (first.text, first.text_of(5)) == ("x", "yz")
    assert output.logprobs is None
    gateway.on_generate = lambda g: [news(g.request_id, "ab", (6, 8), END)]
    assert read_prompt(client.generate("h", SamplingParams(prompt_logprobs=0))) == [None], "a prompt of one token"
    assert read_prompt(client.generate("h")) is None


def test_a_stream_brings_the_prompts_entries_once_before_its_first_token_or_with_it(
    gateway: FakeGateway, client: Client
) -> None:
    stream = client.generate("hi", SamplingParams(prompt_logprobs=1, n=2), stream=True, request_id="r")
    gateway.expect(Generate)
    gateway.say(news("r", prompt_logprobs=[(0, prompt_part(4))]))
    first = next(stream)
    assert (read_prompt(first), first.token_ids, first.finished) == ([None, (4, -4.0, {5: -0.5})], [], False)
    gateway.say(news("r", "a", (6,), prompt_logprobs=[(0, prompt_part(7))]))
    second = next(stream)
    assert (read_prompt(second), second.token_ids) == ([(7, -7.0, {8: -0.5})], [6])
    gateway.say(both("r", ("b", "c"), ((0, end_of(1, 1, "stop")), (1, end_of(0, 0, "stop")))))
    assert [read_prompt(output) for output in stream] == [None, None]


@pytest.mark.parametrize(
    ("code", "error"),
    [("queue_full", QueueFull), ("unavailable", EngineUnavailable), ("invalid_request", InvalidRequest)],
)
def test_a_refused_request_raises_its_error(
    gateway: FakeGateway, client: Client, code: str, error: type[Exception]
) -> None:
    gateway.on_generate = lambda g: [Refused(request_id=g.request_id, error_code=code, error_message="no")]
    with pytest.raises(error, match="no"):
        client.generate("hi")


def test_an_error_that_was_raised_is_gone_without_the_cycle_collector(gateway: FakeGateway) -> None:
    gateway.on_generate = lambda g: [Refused(request_id=g.request_id, error_code="queue_full", error_message="no")]
    left: list[weakref.ref[QueueFull]] = []

    async def body() -> None:
        async with AsyncClient(gateway.endpoint) as client:
            try:
                await client.generate("hi")
            except QueueFull as error:
                left.append(weakref.ref(error))
            try:
                async for _ in client.generate("hi", stream=True):
                    pass
            except QueueFull as error:
                left.append(weakref.ref(error))

    gc.disable()
    try:
        asyncio.run(body())
        with Client(gateway.endpoint) as client:
            try:
                client.generate("hi")
            except QueueFull as error:
                left.append(weakref.ref(error))
        assert [error() for error in left] == [None] * 3
    finally:
        gc.enable()


def test_a_full_queue_says_when_to_try_again(gateway: FakeGateway, client: Client) -> None:
    final = FinalOutput("error", 3, 0, QueueFull.code, "full", retry_after_s=2.5)
    gateway.on_generate = lambda g: [news(g.request_id, "", (), final)]
    with pytest.raises(QueueFull, match="full") as caught:
        client.generate("hi")
    assert caught.value.retry_after_s == 2.5
    gateway.on_generate = lambda g: [
        Refused(request_id=g.request_id, error_code=QueueFull.code, error_message="no", retry_after_s=1.5)
    ]
    with pytest.raises(QueueFull, match="no") as caught:
        client.generate("hi")
    assert caught.value.retry_after_s == 1.5


def test_scheduling_arguments_go_with_the_request_and_with_each_of_a_batch(
    gateway: FakeGateway, client: Client
) -> None:
    gateway.on_generate = lambda g: [news(g.request_id, "", (), END)]
    client.generate("hi", priority=3, tenant="a", deadline_s=2)
    assert gateway.expect(Generate).scheduling == SchedulingParams(priority=3, tenant="a", deadline_s=2)
    with client.generate("hi", stream=True, queue_timeout_s=0.5) as stream:
        list(stream)
    assert gateway.expect(Generate).scheduling == SchedulingParams(queue_timeout_s=0.5)
    client.generate_batch(["a", "b"], tenant="t")
    assert [gateway.expect(Generate).scheduling.tenant for _ in range(2)] == ["t", "t"]
    client.generate("hi", scheduling=SchedulingParams(priority=2))
    assert gateway.expect(Generate).scheduling == SchedulingParams(priority=2)
    with pytest.raises(InvalidRequest, match="deadline_s"):
        client.generate("hi", deadline_s=-1)
    with pytest.raises(InvalidRequest, match="scheduling and priority are both given"):
        client.generate("hi", scheduling=SchedulingParams(), priority=1)
    with pytest.raises(InvalidRequest, match=r"scheduling \(3\) must be SchedulingParams"):
        client.generate("hi", scheduling=3)  # type: ignore[arg-type]


def test_a_failed_stream_delivers_what_it_had_and_raises(gateway: FakeGateway, client: Client) -> None:
    failed = FinalOutput("error", 3, 1, error_code="request_failed", error_message="broke")
    gateway.on_generate = lambda g: [news(g.request_id, "a", (1,)), news(g.request_id, end=failed)]
    stream = client.generate("hi", stream=True)
    assert next(stream).text == "a"
    with pytest.raises(RequestFailed, match="broke"):
        next(stream)
    assert list(stream) == []
    gateway.on_generate = lambda g: [news(g.request_id, "a", (1,))]
    stream = client.generate("hi", stream=True, request_id="later")
    assert next(stream).text == "a"
    gateway.say(news("later", end=failed))
    with pytest.raises(RequestFailed, match="broke"):
        next(stream)


def test_breaking_out_of_a_stream_cancels_it(gateway: FakeGateway, client: Client) -> None:
    gateway.on_generate = lambda g: [news(g.request_id, "a", (1,))]
    for _ in client.generate("hi", stream=True, request_id="r"):
        break
    gc.collect()
    gateway.expect(Generate)
    assert gateway.expect(Cancel).request_id == "r"
    with pytest.raises(InvalidRequest, match="open request"):
        client.generate("again", request_id="r")
    gateway.say(news("r", end=CANCELLED))
    gateway.on_generate = lambda g: [news(g.request_id, "new", (2,), END)]
    while True:  # until the final answer of the old one is in
        try:
            assert client.generate("again", request_id="r").text == "new"
            break
        except InvalidRequest:
            client.stats()


def test_an_asyncio_stream_is_cancelled_by_break_aclose_or_its_task(gateway: FakeGateway) -> None:
    gateway.on_generate = lambda g: [news(g.request_id, "a", (1,))]

    async def body() -> None:
        async with AsyncClient(gateway.endpoint) as client:
            async for _ in client.generate("hi", stream=True, request_id="break"):
                break
            async with client.generate("hi", stream=True, request_id="aclose") as stream:
                assert (await anext(stream)).text == "a"
            task = asyncio.create_task(client.generate("hi", request_id="task"))
            await client.stats()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await client.stats()

    asyncio.run(body())
    heard = [gateway.heard.get(timeout=WAIT_S) for _ in range(6)]
    assert [m.request_id for m in heard if isinstance(m, Cancel)] == ["break", "aclose", "task"]


def test_cancel_ends_a_request_with_reason_cancelled(gateway: FakeGateway, client: Client) -> None:
    stream = client.generate("hi", stream=True, request_id="r")
    gateway.expect(Generate)
    client.cancel("r")
    client.cancel("unknown")
    assert gateway.expect(Cancel).request_id == "r"
    gateway.say(news("r", end=CANCELLED))
    assert [o.finish_reason for o in stream] == ["cancelled"]


def test_closing_a_client_cancels_what_is_open(gateway: FakeGateway) -> None:
    with Client(gateway.endpoint) as client:
        stream = client.generate("hi", stream=True, request_id="r")
        gateway.expect(Generate)
    assert gateway.expect(Cancel).request_id == "r"
    with pytest.raises(EngineUnavailable, match="closed"):
        next(stream)
    with pytest.raises(EngineUnavailable, match="closed"):
        client.generate("hi")


def test_a_stream_whose_client_is_closed_has_nothing_left_to_close(gateway: FakeGateway) -> None:
    with Client(gateway.endpoint) as client, client.generate("hi", stream=True):
        client.close()


def test_a_vanished_engine_fails_every_open_request_at_once_without_a_time_to_resume(gateway: FakeGateway) -> None:
    with Client(gateway.endpoint, resume_timeout_s=0) as client:
        stream = client.generate("hi", stream=True, request_id="r")
        gateway.expect(Generate)
        gateway.say(news("r", "a", (1,)))
        gateway.stop()
        assert next(stream).text == "a"
        with pytest.raises(EngineUnavailable, match="is gone"):
            next(stream)
        successor = FakeGateway(gateway.endpoint)
        successor.on_generate = lambda g: [news(g.request_id, "new", (2,), END)]
        assert client.generate("hi").text == "new"
        assert successor.expect(Generate).prompt == "hi", "it hears nothing that was meant for the other"
        successor.stop()


def test_an_engine_that_is_not_there_is_named_after_the_time_out(tmp_path_factory: pytest.TempPathFactory) -> None:
    endpoint = f"ipc://{tmp_path_factory.mktemp('f')}/none"
    with Client(endpoint, timeout_s=0.2) as client:
        for ask in (lambda: client.generate("hi"), client.health, lambda: list(client.generate("hi", stream=True))):
            with pytest.raises(EngineUnavailable, match=f"no engine answers at {endpoint}"):
                ask()
        gateway = FakeGateway(endpoint)
        assert client.wait_ready(WAIT_S).model == "m"
        assert gateway.heard.empty(), "the abandoned request is not sent later"
        gateway.stop()


def test_no_connection_is_missed_however_quickly_it_stands(gateway: FakeGateway) -> None:
    async def connect_often() -> None:
        for _ in range(100):
            async with AsyncClient(gateway.endpoint, timeout_s=WAIT_S) as client:
                await client.stats()

    asyncio.run(asyncio.wait_for(connect_often(), WAIT_S))


def test_health_stats_and_readiness(gateway: FakeGateway, client: Client) -> None:
    assert client.health().state == "ready"
    assert client.stats() == {"scheduler": {"num_steps": 12.0}}
    stats = client.stats_with_arrays(["recent_steps"])
    assert stats.roles == client.stats()
    assert stats.arrays["scheduler"]["recent_steps"].tolist() == [[1, 2], [3, -4]]
    gateway.state = "starting"
    with pytest.raises(EngineUnavailable, match="is starting"):
        client.wait_ready(0.2)
    gateway.state = "failed"
    with pytest.raises(EngineUnavailable, match="is failed"):
        client.wait_ready(WAIT_S)


def test_a_batch_keeps_its_order_and_its_window(gateway: FakeGateway, client: Client) -> None:
    gateway.max_open_requests = 7
    num_open, most = 0, 0
    held: list[str] = []

    def answer_in_sevens(g: Generate) -> list[Any]:
        nonlocal num_open, most
        num_open, most = num_open + 1, max(most, num_open + 1)
        held.append(g.request_id)
        texts[g.request_id] = g.prompt or ""
        if len(held) < 7 and len(texts) < 100:
            return []
        num_open -= len(held)
        answers = [news(r, f"re {texts[r]}", (1,), END) for r in reversed(held)]
        held.clear()
        return answers

    texts: dict[str, str] = {}
    gateway.on_generate = answer_in_sevens
    outputs = client.generate_batch([f"p{i}" for i in range(100)], progress=True)
    assert [o.text for o in outputs] == [f"re p{i}" for i in range(100)]
    assert most <= 7


def test_a_failed_request_of_a_batch_leaves_the_others_alone(gateway: FakeGateway, client: Client) -> None:
    def answer(g: Generate) -> list[Any]:
        if g.prompt == "bad":
            return [Refused(request_id=g.request_id, error_code="invalid_request", error_message="too bad")]
        return [news(g.request_id, f"{g.params.max_tokens}", (1,), END)]

    gateway.on_generate = answer
    outputs = client.generate_batch(["a", "bad", "", "b"], [SamplingParams(max_tokens=i) for i in range(1, 5)])
    assert [o.text for o in outputs] == ["1", "", "", "4"]
    assert [o.finish_reason for o in outputs] == ["length", "error", "error", "length"]
    assert [o.error for o in outputs] == [None, "too bad", "prompt is empty", None]
    with pytest.raises(InvalidRequest, match="2 params for 1 prompts"):
        client.generate_batch(["a"], [SamplingParams(), SamplingParams()])
    with pytest.raises(InvalidRequest, match=r"prompts \('abc'\) must be a list of prompts"):
        client.generate_batch("abc")
    assert client.generate_batch([]) == []


def test_a_batch_waits_for_a_full_queue(gateway: FakeGateway, client: Client) -> None:
    num_refused = 0

    def answer(g: Generate) -> list[Any]:
        nonlocal num_refused
        if num_refused < 12:
            num_refused += 1
            return [Refused(request_id=g.request_id, error_code="queue_full", error_message="full")]
        return [news(g.request_id, g.prompt or "", (1,), END)]

    gateway.on_generate = answer
    assert [o.text for o in client.generate_batch([f"{i}" for i in range(10)])] == [f"{i}" for i in range(10)]


def test_a_batch_ends_when_its_engine_does(gateway: FakeGateway) -> None:
    client = Client(gateway.endpoint, resume_timeout_s=0.05)
    gateway.max_open_requests = 2
    gateway.on_generate = lambda g: gateway._orders.put(None) or (os.write(gateway._wake_writer, b"x") and [])  # type: ignore[func-returns-value]
    outputs = client.generate_batch(["a"] * 50)
    assert {o.finish_reason for o in outputs} == {"error"}
    assert all("is gone" in (o.error or "") for o in outputs)


def test_threads_may_share_a_client(gateway: FakeGateway, client: Client) -> None:
    gateway.on_generate = lambda g: [news(g.request_id, g.prompt or "", (1,), END)]
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda i=i: texts.extend(client.generate(f"{i}.{j}").text for j in range(20)))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == sorted(f"{i}.{j}" for i in range(4) for j in range(20))


def test_the_public_names_load_quickly_and_without_torch() -> None:
    script = (
        "import sys, pipeline; from pipeline import AsyncClient, Client, Output, SamplingParams;"
        "sys.exit(bool({'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", script], env=module_environment(), check=True, timeout=60)


# Several samples


def both(
    request_id: str, texts: tuple[str, str], ends: tuple[tuple[int, FinalOutput], ...] = (), **more: Any
) -> Outputs:
    """Outputs of samples 1 and 0, in this order, with one token each."""
    return Outputs(
        request_ids=[request_id] * 2,
        samples=int32(1, 0),
        texts=list(texts),
        num_token_ids=int32(1, 1),
        token_ids=int32(11, 10),
        finals=list(ends),
        **more,
    )


def test_a_whole_answer_holds_every_sample_and_counts_the_prompt_once(gateway: FakeGateway, client: Client) -> None:
    logprobs = TokenLogprobs(num_top=0, logprobs=array("f", [-1.0]).tobytes(), top_ids=b"", top_logprobs=b"")
    gateway.on_generate = lambda g: [
        both(g.request_id, ("one", "zero"), ((0, end_of(1, 1, "stop")),), logprobs=[(0, logprobs)]),
        news(g.request_id, "!", (12,), msgspec.structs.replace(end_of(2, 0), stop_string="?")),
    ]
    output = client.generate("hi", SamplingParams(n=2))
    assert gateway.expect(Generate).params.n == 2
    assert [(c.index, c.text, c.token_ids, c.finish_reason) for c in output.completions] == [
        (0, "zero!", [10, 12], "length"),
        (1, "one", [11], "stop"),
    ]
    assert [completion.stop_reason for completion in output.completions] == ["?", None]
    assert [completion.times for completion in output.completions] == [times_of(0), times_of(1)]
    assert output.times == times_of(0)
    assert (output.text, output.token_ids, output.finish_reason, output.finished) == ("zero!", [10, 12], "length", True)
    assert output.usage is not None
    assert (output.usage.prompt_tokens, output.usage.completion_tokens, output.usage.num_cached_tokens) == (3, 3, 2)
    second = output.completions[1].logprobs
    assert second is not None
    assert [(t.token_id, t.logprob) for t in second] == [(11, -1.0)]


def test_a_stream_says_of_which_sample_its_news_are_and_ends_with_the_last(
    gateway: FakeGateway, client: Client
) -> None:
    stream = client.generate("hi", SamplingParams(n=2), stream=True, request_id="r")
    gateway.expect(Generate)
    gateway.say(both("r", ("a", "b"), ((0, end_of(1, 1, "stop")),), prompts=[(1, 3, 2)]))
    first, second = next(stream), next(stream)
    assert (first.prompt_usage, second.prompt_usage) == (None, Usage(3, 0, 2))
    assert (first.index, first.text, first.finish_reason, first.finished) == (1, "a", "stop", False)
    assert (second.index, second.text, second.finish_reason, second.finished) == (0, "b", None, False)
    assert (first.times, second.times) == (times_of(1), None)
    gateway.say(news("r", "c", (5,), end_of(2, 0)))
    [last] = list(stream)
    assert (last.stop_reason, last.prompt_usage) == (None, None)
    assert (last.index, last.text, last.finish_reason, last.finished) == (0, "c", "length", True)
    assert last.usage is not None
    assert last.usage.completion_tokens == 3


def test_a_final_answer_of_the_gateways_own_ends_all_samples(gateway: FakeGateway, client: Client) -> None:
    cancelled = FinalOutput("cancelled", 0, 0)
    gateway.on_generate = lambda g: [news(g.request_id, end=cancelled)]
    output = client.generate("hi", SamplingParams(n=3))
    assert [completion.finish_reason for completion in output.completions] == ["cancelled"] * 3
    assert [o.finish_reason for o in client.generate("hi", SamplingParams(n=3), stream=True)] == ["cancelled"] * 3
    failed = FinalOutput("error", 0, 0, error_code="unavailable", error_message="died")
    gateway.on_generate = lambda g: [both(g.request_id, ("a", "b")), news(g.request_id, end=failed)]
    with pytest.raises(EngineUnavailable, match="died"):
        client.generate("hi", SamplingParams(n=2))
    stream = client.generate("hi", SamplingParams(n=2), stream=True)
    assert [next(stream).text, next(stream).text] == ["a", "b"]
    with pytest.raises(EngineUnavailable, match="died"):
        next(stream)
