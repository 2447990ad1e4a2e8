"""Requests and queries whose engine dies: sent again with what has arrived, against a gateway that the test writes."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from ipc.errors import EngineUnavailable, Interrupted, InvalidRequest, QueueFull, RequestFailed
from ipc.messages import (
    Cancel,
    DetokenizedText,
    DetokenizeQuery,
    FinalOutput,
    Generate,
    Keep,
    KeptValue,
    Outputs,
    Refused,
    ResumedSample,
)
from pipeline import AsyncClient, Client, Output, SamplingParams
from pipeline.client.outputs import Usage
from tests.unit.pipeline.client.client_scripts import WAIT_S, in_child, wait_until
from tests.unit.pipeline.client.fake_gateway import (
    CANCELLED,
    END,
    FakeGateway,
    end_of,
    int32,
    news,
    prompt_part,
    read_prompt,
)

LOST = FinalOutput("error", 3, 0, Interrupted.code, "the scheduler has died")


def rows(request_id: str, *parts: tuple[int, str, tuple[int, ...], FinalOutput | None]) -> Outputs:
    """Outputs with a row for each (sample, text, token ids, end)."""
    return Outputs(
        request_ids=[request_id] * len(parts),
        samples=int32(*(part[0] for part in parts)),
        texts=[part[1] for part in parts],
        num_token_ids=int32(*(len(part[2]) for part in parts)),
        token_ids=int32(*(token for part in parts for token in part[2])),
        finals=[(row, part[3]) for row, part in enumerate(parts) if part[3] is not None],
    )


def attempts(gateway: FakeGateway, *answers: Callable[[Generate], list[Any]]) -> None:
    """Answer the client's attempts one after the other."""
    left = list(answers)
    gateway.on_generate = lambda g: left.pop(0)(g)


def wait_for_resume(client: Client, num: int = 1) -> None:
    wait_until(lambda: len(client._client._session._pending.waiting) == num, "the wait for an engine")


def text_of(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs)


def ids_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_a_request_that_is_interrupted_goes_on_behind_what_has_arrived(gateway: FakeGateway, client: Client) -> None:
    end = FinalOutput("length", 3, 5)
    attempts(
        gateway,
        lambda g: [news(g.request_id, end=LOST)],  # before the first token
        lambda g: [
            news(g.request_id, "ab", (1, 2)),
            news(g.request_id, "\U0001f600", (3,)),
            news(g.request_id, end=LOST),
        ],
        lambda g: [Refused(request_id=g.request_id, error_code="interrupted", error_message="again")],
        lambda g: [news(g.request_id, "c", (4, 5), end)],
    )
    before = time.time()
    outputs = list(client.generate("hi", SamplingParams(max_tokens=5), stream=True, queue_timeout_s=9))
    assert text_of(outputs) == "ab\U0001f600c"
    assert ids_of(outputs) == [1, 2, 3, 4, 5]
    assert outputs[-1].usage == Usage(3, 5)
    first, *others = [gateway.expect(Generate) for _ in range(4)]
    assert (first.resume, first.scheduling.queue_timeout_s) == (None, 9)
    assert before <= first.clock_s <= time.time()
    known = [each.resume.samples for each in others]
    assert known == [
        [ResumedSample()],
        [ResumedSample(token_ids=int32(1, 2, 3), num_chars=3)],
        [ResumedSample(token_ids=int32(1, 2, 3), num_chars=3)],
    ]
    for again in others:
        assert (again.request_id, again.params, again.prompt, again.stream) == (
            first.request_id, first.params, "hi", True,
        )  # fmt: skip
        assert (again.clock_s, again.scheduling.queue_timeout_s) == (first.clock_s, None)
    assert first.params.seed is not None


def test_the_caller_s_seed_is_sent_and_other_requests_draw_different_ones(gateway: FakeGateway, client: Client) -> None:
    gateway.on_generate = lambda g: [news(g.request_id, end=END)]
    for params in (SamplingParams(seed=7), SamplingParams(), SamplingParams()):
        client.generate("hi", params)
    given, *drawn = [gateway.expect(Generate).params.seed for _ in range(3)]
    assert given == 7
    assert None not in drawn
    assert drawn[0] != drawn[1]


def test_a_sample_that_has_ended_keeps_its_end_and_is_not_run_again(gateway: FakeGateway, client: Client) -> None:
    attempts(
        gateway,
        lambda g: [
            rows(g.request_id, (0, "a", (1,), None), (1, "bb", (2,), end_of(1, 2, "stop")), (2, "c", (3,), None)),
            news(g.request_id, end=LOST),
        ],
        lambda g: [rows(g.request_id, (2, "C", (4,), end_of(2, 1)), (0, "A", (5,), end_of(2, 0)))],
    )
    output = client.generate("hi", SamplingParams(n=3))
    assert [(c.text, c.token_ids, c.finish_reason) for c in output.completions] == [
        ("aA", [1, 5], "length"), ("bb", [2], "stop"), ("cC", [3, 4], "length"),
    ]  # fmt: skip
    assert output.usage == Usage(3, 5, 2)
    gateway.expect(Generate)
    assert gateway.expect(Generate).resume.samples == [
        ResumedSample(token_ids=int32(1), num_chars=1),
        ResumedSample(has_ended=True),
        ResumedSample(token_ids=int32(3), num_chars=1),
    ]


def test_samples_that_are_interrupted_one_by_one_are_resumed_after_the_last(
    gateway: FakeGateway, client: Client
) -> None:
    def lost(num_open: int) -> FinalOutput:  # the first of them is suspected
        return FinalOutput(
            "error", 3, 0, Interrupted.code, "the grammar process has died", num_open=num_open, suspected=num_open > 0
        )

    attempts(
        gateway,
        lambda g: [rows(g.request_id, (1, "", (), lost(2))), rows(g.request_id, (0, "a", (1,), end_of(1, 1)))],
        lambda g: [rows(g.request_id, (1, "b", (2,), end_of(1, 1)), (2, "c", (3,), end_of(1, 0)))],
    )
    with client.generate("hi", SamplingParams(n=3), stream=True, request_id="r") as stream:
        assert (next(stream).text, gateway.expect(Generate).resume) == ("a", None)
        gateway.say(rows("r", (2, "", (), lost(0))))
        outputs = list(stream)
    assert [(output.index, output.text) for output in outputs] == [(1, "b"), (2, "c")]
    resume = gateway.expect(Generate).resume
    assert [sample.has_ended for sample in resume.samples] == [True, False, False]
    assert resume.num_suspected == 1, "one death, however many samples"


def test_the_last_sample_s_end_resumes_those_that_were_interrupted_before(gateway: FakeGateway, client: Client) -> None:
    lost = FinalOutput("error", 3, 0, Interrupted.code, "died", num_open=1)
    attempts(
        gateway,
        lambda g: [rows(g.request_id, (0, "", (), lost)), rows(g.request_id, (1, "b", (2,), end_of(1, 0, "stop")))],
        lambda g: [rows(g.request_id, (0, "a", (1,), end_of(1, 0)))],
    )
    output = client.generate("hi", SamplingParams(n=2))
    assert [(c.text, c.finish_reason) for c in output.completions] == [("a", "length"), ("b", "stop")]


def test_the_engine_hears_how_often_a_request_was_suspected(gateway: FakeGateway, client: Client) -> None:
    suspected = FinalOutput("error", 3, 0, Interrupted.code, "died", suspected=True)
    failed = FinalOutput("error", 3, 0, "request_failed", "its grammar has ended a process twice")
    attempts(
        gateway,
        lambda g: [news(g.request_id, end=suspected)],
        lambda g: [news(g.request_id, "a", (1,)), news(g.request_id, end=LOST)],
        lambda g: [news(g.request_id, end=suspected)],
        lambda g: [news(g.request_id, end=failed)],
    )
    with pytest.raises(RequestFailed, match="twice"):
        client.generate("hi")
    heard = [gateway.expect(Generate).resume for _ in range(4)]
    assert [resume and resume.num_suspected for resume in heard] == [None, 1, 1, 2]


def test_a_lost_connection_resumes_on_the_next_engine_and_repeats_nothing(gateway: FakeGateway, client: Client) -> None:
    stream = client.generate("hi", stream=True, request_id="r")
    first = gateway.expect(Generate)
    gateway.say(news("r", "a", (1,)))
    assert next(stream).text == "a"
    gateway.say(news("r", "\u00e9", (2,)))  # it arrives, and the caller does not read it
    wait_until(lambda: client._client._session._pending.requests["r"].samples[0].resumed.num_chars == 2)
    gateway.stop()
    wait_for_resume(client)
    successor = FakeGateway(gateway.endpoint)
    again = successor.expect(Generate)
    assert again.resume.samples == [ResumedSample(token_ids=int32(1, 2), num_chars=2)]
    assert (again.request_id, again.params.seed) == ("r", first.params.seed)
    successor.say(news("r", "b", (3,), END))
    outputs = list(stream)
    assert (text_of(outputs), ids_of(outputs)) == ("\u00e9b", [2, 3])
    successor.stop()


def test_an_engine_that_starts_is_waited_for_and_one_that_recovers_queues(gateway: FakeGateway, client: Client) -> None:
    gateway.state = "starting"
    attempts(
        gateway,
        lambda g: [news(g.request_id, end=LOST)],
        lambda g: [Refused(request_id=g.request_id, error_code="unavailable", error_message="the engine is starting")],
        lambda g: [news(g.request_id, "a", (1,), END)],
    )
    stream = client.generate("hi", stream=True)
    gateway.expect(Generate)
    wait_for_resume(client)
    wait_until(lambda: "starting" in client._client._session._resumer._state)
    assert gateway.heard.empty(), "it is not sent to an engine that starts"
    gateway.state = "recovering"
    assert text_of(list(stream)) == "a"
    assert gateway.expect(Generate).resume is not None


def test_a_request_is_not_continued_by_another_model(gateway: FakeGateway, client: Client) -> None:
    client.health()
    stream = client.generate("hi", stream=True)
    gateway.expect(Generate)
    gateway.stop()
    wait_for_resume(client)
    successor = FakeGateway(gateway.endpoint)
    successor.model = "other"
    with pytest.raises(Interrupted, match="now has model 'other', and model 'm' began the request: send it again"):
        next(stream)
    successor.on_generate = lambda g: [news(g.request_id, "new", (1,), END)]
    assert client.generate("hi").text == "new"
    successor.stop()


def test_a_full_queue_delays_a_resumed_request_and_refuses_a_new_one(gateway: FakeGateway, client: Client) -> None:
    full = FinalOutput("error", 3, 0, QueueFull.code, "full", retry_after_s=0.01)
    attempts(
        gateway,
        lambda g: [news(g.request_id, end=full)],
        lambda g: [news(g.request_id, end=LOST)],
        lambda g: [news(g.request_id, end=full)],
        lambda g: [Refused(request_id=g.request_id, error_code=QueueFull.code, error_message="full")],
        lambda g: [news(g.request_id, "a", (1,), END)],
    )
    with pytest.raises(QueueFull):
        client.generate("hi")
    assert client.generate("hi").text == "a"


def test_other_errors_of_a_resumed_request_are_final(gateway: FakeGateway, client: Client) -> None:
    attempts(
        gateway,
        lambda g: [news(g.request_id, end=LOST)],
        lambda g: [Refused(request_id=g.request_id, error_code="invalid_request", error_message="too many tokens")],
        lambda g: [news(g.request_id, end=LOST)],
        lambda g: [news(g.request_id, end=FinalOutput("error", 3, 0, "unavailable", "the engine ends"))],
    )
    with pytest.raises(InvalidRequest, match="too many tokens"):
        client.generate("hi")
    with pytest.raises(EngineUnavailable, match="the engine ends"):
        client.generate("hi")


def test_a_resumed_request_has_what_is_left_of_its_deadline(gateway: FakeGateway, client: Client) -> None:
    attempts(
        gateway,
        lambda g: [news(g.request_id, "a", (1,)), news(g.request_id, end=LOST)],
        lambda g: [news(g.request_id, "b", (2,), END)],
    )
    assert client.generate("hi", deadline_s=60).text == "ab"
    first, again = gateway.expect(Generate), gateway.expect(Generate)
    assert (first.scheduling.deadline_s, again.scheduling.deadline_s < 60) == (60, True)
    assert again.scheduling.deadline_s > 60 - WAIT_S


def test_a_deadline_that_passes_without_an_engine_ends_the_open_samples(gateway: FakeGateway, client: Client) -> None:
    gateway.state = "starting"
    gateway.on_generate = lambda g: [
        Outputs(
            request_ids=[g.request_id] * 2, samples=int32(0, 1), texts=["ab", "c"], num_token_ids=int32(2, 1),
            token_ids=int32(1, 2, 3), finals=[(1, end_of(1, 1, "stop"))], prompts=[(0, 3, 2)],
        ),
        news(g.request_id, end=LOST),
    ]  # fmt: skip
    output = client.generate("hi", SamplingParams(n=2), deadline_s=0.1)
    assert [(c.text, c.finish_reason) for c in output.completions] == [("ab", "deadline"), ("c", "stop")]
    assert output.usage == Usage(3, 3, 2)
    assert client.generate("hi", SamplingParams(n=2), deadline_s=0.1, request_id="r").finish_reason == "deadline"


def test_without_a_time_to_resume_an_interrupted_request_fails_at_once(gateway: FakeGateway) -> None:
    gateway.on_generate = lambda g: [news(g.request_id, "a", (1,)), news(g.request_id, end=LOST)]
    with Client(gateway.endpoint, resume_timeout_s=0) as client:
        stream = client.generate("hi", stream=True)
        assert next(stream).text == "a"
        with pytest.raises(Interrupted, match="the scheduler has died"):
            next(stream)
        gateway.expect(Generate)
        assert gateway.heard.empty()


def test_the_error_after_the_time_to_resume_says_what_happened_and_how_long_was_waited(gateway: FakeGateway) -> None:
    gateway.state = "starting"
    gateway.on_generate = lambda g: [news(g.request_id, end=LOST)]
    with Client(gateway.endpoint, resume_timeout_s=0.1) as client:
        with pytest.raises(Interrupted) as caught:
            client.generate("hi")
        assert str(caught.value) == (
            "the scheduler has died; no engine continued it within 0.1 s (resume_timeout_s of the client): "
            "the engine is starting"
        )
        gateway.on_generate = lambda g: []
        gateway.state = "ready"
        stream = client.generate("hi", stream=True)
        for _ in range(2):
            gateway.expect(Generate)
        gateway.stop()
        with pytest.raises(Interrupted, match=r"is gone; no engine .* within 0\.1 s .*: no engine answers at ipc"):
            next(stream)


def test_news_begin_a_new_wait_and_attempts_without_news_share_one(gateway: FakeGateway) -> None:
    num = 0

    def answer(g: Generate) -> list[Any]:
        nonlocal num
        num += 1
        if num < 9:
            return [news(g.request_id, "x", (num,)), news(g.request_id, end=LOST)]
        return [news(g.request_id, end=LOST)]

    gateway.on_generate = answer
    with Client(gateway.endpoint, resume_timeout_s=0.5) as client:
        stream = client.generate("hi", stream=True)
        with pytest.raises(Interrupted, match=r"within 0\.5 s \(resume_timeout_s of the client\)"):
            list(stream)
    assert num > 9, "news came eight times, each with a new time"


def test_a_request_that_is_cancelled_while_it_waits_ends_at_once(gateway: FakeGateway, client: Client) -> None:
    gateway.state = "starting"
    gateway.on_generate = lambda g: [news(g.request_id, "a", (1,)), news(g.request_id, end=LOST)]
    stream = client.generate("hi", stream=True, request_id="r")
    wait_for_resume(client)
    client.cancel("r")
    outputs = list(stream)
    assert (text_of(outputs), outputs[-1].finish_reason, outputs[-1].usage) == ("a", "cancelled", Usage(0, 1))
    gateway.state = "ready"
    gateway.on_generate = lambda g: [news(g.request_id, "new", (2,), END)]
    assert client.generate("again", request_id="r").text == "new"
    assert [gateway.expect(Generate).prompt for _ in range(2)] == ["hi", "again"]


def test_a_cancelled_or_abandoned_request_is_not_resumed(gateway: FakeGateway, client: Client) -> None:
    cancelled = client.generate("hi", stream=True, request_id="c")
    abandoned = client.generate("hi", stream=True, request_id="a")
    for _ in range(2):
        gateway.expect(Generate)
    client.cancel("c")
    abandoned.close()
    for _ in range(2):
        gateway.expect(Cancel)
    gateway.say(news("c", end=LOST))
    gateway.say(news("a", end=LOST))
    assert [output.finish_reason for output in cancelled] == ["cancelled"]
    waiting = client.generate("hi", stream=True, request_id="w")
    gateway.expect(Generate)
    gateway.state = "starting"
    gateway.say(news("w", end=LOST))
    wait_for_resume(client)
    waiting.close()
    wait_for_resume(client, 0)
    assert client._client._session._pending.requests == {}
    assert gateway.heard.empty(), "the engine hears nothing of a request that it does not have"


def test_closing_a_client_ends_the_wait(gateway: FakeGateway) -> None:
    gateway.state = "starting"
    gateway.on_generate = lambda g: [news(g.request_id, end=LOST)]
    ends: list[str] = []

    def use() -> None:
        with pytest.raises(EngineUnavailable) as caught:
            client.generate("hi")
        ends.append(str(caught.value))

    client = Client(gateway.endpoint)
    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    gateway.expect(Generate)
    wait_for_resume(client)
    client.close()
    thread.join(WAIT_S)
    assert ends == ["this client was closed"]
    assert gateway.heard.empty(), "there is nothing to cancel"


def test_a_client_of_an_engine_that_nobody_starts_again_gives_up(gateway: FakeGateway) -> None:
    class Engine:
        ended = False

        def has_ended(self) -> bool:
            return self.ended

    engine = Engine()
    with Client(gateway.endpoint, resume_timeout_s=None) as client:
        client.keep_alive(engine)
        stream = client.generate("hi", stream=True, request_id="r")
        gateway.expect(Generate)
        gateway.say(news("r", end=LOST))
        assert gateway.expect(Generate).resume is not None, "its engine lives"
        gateway.stop()
        wait_for_resume(client)
        engine.ended = True
        with pytest.raises(EngineUnavailable, match="is gone, and its launcher does not start it again"):
            next(stream)


def test_what_a_resumed_engine_repeats_of_the_prompt_is_dropped(gateway: FakeGateway, client: Client) -> None:
    attempts(
        gateway,
        lambda g: [news(g.request_id, prompt_logprobs=[(0, prompt_part(4, 7, 9))]), news(g.request_id, end=LOST)],
        lambda g: [
            news(g.request_id, prompt_logprobs=[(0, prompt_part(4, 7))]),
            news(g.request_id, "a", (1,), prompt_logprobs=[(0, prompt_part(9, 2, 5))], prompts=[(0, 6, 2)]),
            news(g.request_id, end=LOST),
        ],
        lambda g: [
            news(g.request_id, prompt_logprobs=[(0, prompt_part(4, 7, 9, 2, 5))]),
            news(g.request_id, "b", (2,), END, prompts=[(0, 6, 0)]),
        ],
    )
    outputs = list(client.generate("hi", SamplingParams(prompt_logprobs=1), stream=True))
    entries = [entry for output in outputs for entry in read_prompt(output) or []]
    assert entries == [None, *((token, -float(token), {token + 1: -0.5}) for token in (4, 7, 9, 2, 5))]
    assert [output.prompt_usage for output in outputs if output.prompt_usage] == [Usage(6, 0, 2)]
    assert (text_of(outputs), ids_of(outputs)) == ("ab", [1, 2])


def test_late_outputs_of_an_engine_that_has_lost_a_request_are_dropped(gateway: FakeGateway, client: Client) -> None:
    gateway.state = "starting"
    gateway.on_generate = lambda g: [
        news(g.request_id, "a", (1,)), news(g.request_id, end=LOST), news(g.request_id, "late", (9,), CANCELLED),
    ]  # fmt: skip
    stream = client.generate("hi", stream=True)
    gateway.expect(Generate)
    wait_for_resume(client)
    gateway.on_generate = lambda g: [news(g.request_id, "b", (2,), END)]
    gateway.state = "ready"
    assert text_of(list(stream)) == "ab"


def test_a_batch_outlives_its_engine(gateway: FakeGateway, client: Client) -> None:
    seen: set[str] = set()

    def answer(g: Generate) -> list[Any]:
        if g.request_id not in seen:
            seen.add(g.request_id)
            return [news(g.request_id, end=LOST)]
        return [news(g.request_id, f"re {g.prompt}", (1,), END)]

    gateway.on_generate = answer
    outputs = client.generate_batch([f"p{i}" for i in range(20)])
    assert [output.text for output in outputs] == [f"re p{i}" for i in range(20)]


def test_queries_are_sent_again_after_a_lost_connection(gateway: FakeGateway) -> None:
    async def ask(successors: list[FakeGateway]) -> tuple[str, bytes | None]:
        async with AsyncClient(gateway.endpoint) as client:
            decoding = asyncio.create_task(client.detokenize([1, 2]))
            keeping = asyncio.create_task(client.keep("k", b"v"))
            await asyncio.to_thread(gateway.expect, DetokenizeQuery)
            await asyncio.to_thread(gateway.expect, Keep)
            await asyncio.to_thread(gateway.stop)
            successor = await asyncio.to_thread(FakeGateway, gateway.endpoint)
            successors.append(successor)
            successor.on_question = lambda q: [
                KeptValue(request_id=q.request_id, found=True)
                if isinstance(q, Keep)
                else DetokenizedText(request_id=q.request_id, receipt=1, text="xy")
            ]
            return await decoding, await keeping  # type: ignore[func-returns-value]

    successors: list[FakeGateway] = []
    try:
        assert asyncio.run(asyncio.wait_for(ask(successors), WAIT_S)) == ("xy", None)
    finally:
        for successor in successors:
            successor.stop()


def test_a_query_waits_no_longer_than_its_own_time_out(gateway: FakeGateway) -> None:
    gateway.on_question = lambda _: []
    with Client(gateway.endpoint, timeout_s=0.2) as client:
        ends: list[str] = []

        def use() -> None:
            with pytest.raises(EngineUnavailable) as caught:
                client.keep("k", b"v")
            ends.append(str(caught.value))

        thread = threading.Thread(target=use, daemon=True)
        thread.start()
        gateway.expect(Keep)
        gateway.stop()
        thread.join(WAIT_S)
        assert "no engine answers" in ends[0]
        assert client._client._session._pending.waiting == {}


def test_a_pickled_client_keeps_its_times() -> None:
    client = pickle.loads(pickle.dumps(Client("ipc:///x/y", timeout_s=3, resume_timeout_s=None)))
    assert (client._client._timeout_s, client._client._resume_timeout_s) == (3, None)
    asynchronous = pickle.loads(pickle.dumps(AsyncClient("ipc:///x/y", resume_timeout_s=5)))
    assert asynchronous._resume_timeout_s == 5
    with pytest.raises(InvalidRequest, match=r"resume_timeout_s \(-1\)"):
        Client("ipc:///x/y", resume_timeout_s=-1)


def test_ctrl_c_ends_the_wait_at_once(gateway: FakeGateway, client: Client) -> None:
    gateway.state = "starting"
    gateway.on_generate = lambda g: [news(g.request_id, end=LOST)]

    def interrupt() -> None:
        wait_for_resume(client)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        client.generate("hi")
    thread.join(WAIT_S)
    assert client._client._session._pending.requests == {}
    gateway.expect(Generate)
    assert gateway.heard.empty()


def test_an_asyncio_client_whose_loop_ends_during_the_wait_works_on_the_next_loop(gateway: FakeGateway) -> None:
    gateway.state = "starting"
    gateway.on_generate = lambda g: [news(g.request_id, end=LOST)]
    client = AsyncClient(gateway.endpoint)
    streams = []

    async def begin() -> None:
        streams.append(client.generate("hi", stream=True))
        while not client._session._pending.waiting:
            await client.stats()

    async def go_on() -> str:
        gateway.on_generate = lambda g: [news(g.request_id, "new", (1,), END)]
        text = (await client.generate("again")).text
        await client.close()
        return text

    asyncio.run(begin())
    assert asyncio.run(go_on()) == "new"
    assert [gateway.expect(Generate).prompt for _ in range(2)] == ["hi", "again"], "the first one is not sent again"


def test_a_child_that_is_forked_during_the_wait_asks_for_itself(gateway: FakeGateway, client: Client) -> None:
    gateway.state = "starting"
    gateway.on_generate = lambda g: [news(g.request_id, end=LOST)]
    stream = client.generate("hi", stream=True)
    wait_for_resume(client)
    gateway.on_generate = lambda g: [news(g.request_id, f"re {g.prompt}", (1,), END)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, from Python 3.12 on
        assert in_child(lambda: client.generate("child").text) == "re child"
    gateway.state = "ready"
    assert text_of(list(stream)) == "re hi"


def test_a_dropped_client_sends_nothing_again(gateway: FakeGateway) -> None:
    gateway.state = "starting"
    gateway.on_generate = lambda g: [news(g.request_id, end=LOST)]
    client = Client(gateway.endpoint)
    stream = client.generate("hi", stream=True)
    gateway.expect(Generate)
    wait_for_resume(client)
    session = weakref.ref(client._client._session)
    del client, stream
    wait_until(lambda: session() is None, "the end of the session")
    assert gateway.heard.empty()
