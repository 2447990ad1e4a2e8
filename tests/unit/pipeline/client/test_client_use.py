"""How a client may be used: event loops, readers of a stream, and invalid arguments."""

from __future__ import annotations

import asyncio
import math
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ipc.errors import ConfigError, EngineUnavailable, InvalidRequest, RingfeedError
from ipc.messages import Generate
from pipeline import AsyncClient, Client, Pipeline, SamplingParams
from pipeline.client.endpoint import default_endpoint
from pipeline.client.loop_thread import LoopThread
from pipeline.environment.module_search import module_environment
from pipeline.terminal.progress_bar import progress_bar
from tests.unit.pipeline.client.client_scripts import WAIT_S
from tests.unit.pipeline.client.fake_gateway import END, FakeGateway, news


@pytest.fixture
def gateway(gateway: FakeGateway) -> FakeGateway:
    """It answers requests, and leaves streams open."""
    gateway.on_generate = lambda g: [] if g.stream else [news(g.request_id, f"re {g.prompt}", (1,), END)]
    return gateway


def test_an_asyncio_client_serves_one_event_loop_after_another(gateway: FakeGateway) -> None:
    client = AsyncClient(gateway.endpoint)
    streams = []

    async def ask(prompt: str) -> str:
        streams.append(client.generate("left open", stream=True))
        return (await client.generate(prompt)).text

    assert [asyncio.run(ask(prompt)) for prompt in "abc"] == ["re a", "re b", "re c"]

    async def read() -> None:
        await streams[0].aclose()
        with pytest.raises(InvalidRequest, match="belongs to another event loop"):
            await streams[1].next()

    asyncio.run(read())
    asyncio.run(client.close())
    with pytest.raises(EngineUnavailable, match="was closed"):
        asyncio.run(ask("d"))


def test_two_running_event_loops_cannot_share_an_asyncio_client(gateway: FakeGateway) -> None:
    async def first() -> None:
        client = AsyncClient(gateway.endpoint)
        await client.health()

        async def use() -> None:
            with pytest.raises(InvalidRequest, match="belongs to another event loop, which is still in use"):
                await client.generate("hi")
            with pytest.raises(InvalidRequest, match="belongs to another event loop"):
                await client.generate_batch(["hi"])

        await asyncio.to_thread(asyncio.run, use())
        assert (await client.generate("hi")).text == "re hi"
        await asyncio.to_thread(asyncio.run, client.close())
        with pytest.raises(EngineUnavailable, match="was closed"):
            await client.generate("hi")

    asyncio.run(first())


def test_an_asyncio_client_says_that_it_needs_a_loop(gateway: FakeGateway) -> None:
    with pytest.raises(InvalidRequest, match="needs a running event loop"):
        AsyncClient(gateway.endpoint).generate("hi", stream=True)


def test_a_stream_has_one_reader_and_a_second_one_is_told(gateway: FakeGateway) -> None:
    with Client(gateway.endpoint) as client, client.generate("hi", stream=True, request_id="r") as stream:
        gateway.expect(Generate)
        texts: list[str] = []
        reader = threading.Thread(target=lambda: texts.append(next(stream).text), daemon=True)
        reader.start()
        refusals: list[str] = []
        while not refusals:  # until the first one reads
            try:
                client._thread.run(asyncio.wait_for(stream._stream.next(), 0.01))
            except TimeoutError:
                continue
            except InvalidRequest as error:
                refusals.append(str(error))
        assert "is being read by another task or thread" in refusals[0]
        gateway.say(news("r", "a", (1,), END))
        reader.join(WAIT_S)
        assert texts == ["a"]


def test_a_pickled_client_is_another_client_of_the_same_engine(gateway: FakeGateway) -> None:
    with Client(gateway.endpoint, timeout_s=3) as client:
        client.health()
        with pickle.loads(pickle.dumps(client)) as copy:
            assert copy.generate("hi").text == "re hi"
    assert pickle.loads(pickle.dumps(AsyncClient(timeout_s=None))).endpoint == default_endpoint()


def test_batches_of_two_threads_may_both_show_a_bar(gateway: FakeGateway) -> None:
    with Client(gateway.endpoint) as client, progress_bar("other", 3, shown=True):
        assert [output.text for output in client.generate_batch(["a"], progress=True)] == ["re a"]


BATCH_WITH_A_BAR = """
import sys
from pipeline import Client
with Client(sys.argv[1]) as client:
    print([output.text for output in client.generate_batch(["a", "b"], progress=True)], file=sys.stderr)
"""


@pytest.mark.parametrize("output", ["full", "without a reader"])
def test_a_bar_that_cannot_be_written_costs_no_answer(gateway: FakeGateway, output: str) -> None:
    if output == "full":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stdout = os.pipe()
        os.close(reader)
    command = [sys.executable, "-c", BATCH_WITH_A_BAR, gateway.endpoint]
    environment = module_environment()
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=WAIT_S, env=environment)
    os.close(stdout)
    assert done.stderr == "['re a', 're b']\n"


def test_a_coroutine_that_asks_the_process_to_exit_ends_its_own_call_alone() -> None:
    async def leave() -> None:
        sys.exit(3)

    async def answer() -> int:
        return 1

    thread = LoopThread(at_end=leave)
    with pytest.raises(SystemExit):
        thread.run(leave())
    assert thread.run(answer()) == 1
    thread.close()


def test_a_client_without_a_time_out_waits_for_ever(tmp_path_factory: pytest.TempPathFactory) -> None:
    endpoint = f"ipc://{tmp_path_factory.mktemp('f')}/s"
    for timeout_s in (None, math.inf):
        with Client(endpoint, timeout_s=timeout_s) as client:
            texts: list[str] = []
            asker = threading.Thread(target=lambda: texts.append(client.generate("hi").text), daemon=True)  # noqa: B023
            asker.start()
            gateway = FakeGateway(endpoint)
            gateway.on_generate = lambda g: [news(g.request_id, "x", (1,), END)]
            asker.join(WAIT_S)
            assert texts == ["x"]
            assert client.wait_ready(timeout_s).state == "ready"
            gateway.stop()


@pytest.mark.parametrize("timeout_s", [-1, math.nan, "3", True, []])
def test_a_time_out_that_is_not_a_number_of_seconds_is_refused(timeout_s: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"timeout_s \("):
        Client(timeout_s=timeout_s)
    with Client() as client, pytest.raises(InvalidRequest, match=r"timeout_s \("):
        client.wait_ready(timeout_s)
    with pytest.raises(InvalidRequest, match=r"startup_timeout_s \("):
        Pipeline({"model": {"path": "x"}}, startup_timeout_s=timeout_s)


@pytest.mark.parametrize(
    "endpoint",
    [
        5,
        "",
        b"ipc:///x",
        "/tmp/x",
        Path("/tmp/x"),
        "ipc://x",
        "ipc:///",
        "inproc://x",
        "tcp://a",
        "tcp://a:0",
        "ipc:///\0",
    ],
)
def test_an_endpoint_that_no_client_can_connect_to_is_refused(endpoint: Any) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ConfigError, match=r"endpoint \(.*must have the form"):
            kind(endpoint)


def test_a_client_without_an_engine_at_its_default_endpoint_says_where_it_looked_and_where_one_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.path.exists", lambda path: False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/dev/shm")
    with Client(timeout_s=0.01) as client, pytest.raises(EngineUnavailable) as caught:
        client.health()
    for part in (default_endpoint(), "XDG_RUNTIME_DIR is '/dev/shm';", "give the endpoint that it logs"):
        assert part in str(caught.value)
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    there = default_endpoint()
    monkeypatch.setattr("os.path.exists", lambda path: f"ipc://{path}" == there)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/dev/shm")
    with Client(timeout_s=0.01) as client, pytest.raises(EngineUnavailable, match=f"there is {there}"):
        client.health()
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere")
    with (
        Client(timeout_s=0.01) as client,
        pytest.raises(EngineUnavailable, match="not a folder that can be"),
    ):
        client.health()


WRONG_USES: dict[str, Callable[[Client], object]] = {
    "no prompts": lambda client: client.generate_batch(None),  # type: ignore[arg-type]
    "a number for prompts": lambda client: client.generate_batch(5),  # type: ignore[arg-type]
    "bytes for prompts": lambda client: client.generate_batch(b"abc"),
    "token ids for prompts": lambda client: client.generate_batch([1, 2]),  # type: ignore[list-item]
    "a chat for prompts": lambda client: client.generate_batch([{"role": "user", "content": "x"}]),  # type: ignore[list-item]
    "a mapping for prompts": lambda client: client.generate_batch({"a": 1}),  # type: ignore[arg-type]
    "no params": lambda client: client.generate_batch(["a"], None),  # type: ignore[arg-type]
    "a number for params": lambda client: client.generate_batch(["a"], 5),  # type: ignore[arg-type]
    "a list for a request id": lambda client: client.cancel([]),  # type: ignore[arg-type]
    "not a deadline": lambda client: client.generate("a", deadline_s=math.nan),
    "a text for a sample": lambda _: SamplingParams(seed=1, n=2).of_sample("1"),  # type: ignore[arg-type]
    "a pipeline that is not started": lambda _: Pipeline({"model": {"path": "x"}}).client,
    "the end of a pipeline that is not started": lambda _: Pipeline({"model": {"path": "x"}}).stop(),
    "the log of a pipeline that is not started": lambda _: Pipeline({"model": {"path": "x"}}).log_text(),
    "a copy of a pipeline": lambda _: pickle.dumps(Pipeline({"model": {"path": "x"}})),
    "a number for a configuration": lambda _: Pipeline(5),  # type: ignore[arg-type]
    "a number for overrides": lambda _: Pipeline({"model": {"path": "x"}}, 5),  # type: ignore[arg-type]
    "a number for an override": lambda _: Pipeline({"model": {"path": "x"}}, [5]),  # type: ignore[list-item]
    "a number for a timeline": lambda _: Pipeline({"model": {"path": "x"}}, timeline=5),  # type: ignore[arg-type]
    "a log in no folder": lambda _: Pipeline({"model": {"path": "x"}}, log="/nowhere/log").start(),
}


@pytest.mark.parametrize("use", WRONG_USES)
def test_a_wrong_use_gets_an_error_of_ours_in_one_line(gateway: FakeGateway, use: str) -> None:
    with Client(gateway.endpoint) as client:
        with pytest.raises(RingfeedError) as caught:
            WRONG_USES[use](client)
        assert isinstance(caught.value, InvalidRequest | ConfigError)
        assert "\n" not in str(caught.value)
        assert client.generate("hi").text == "re hi"


def test_an_item_that_is_no_prompt_fails_alone_among_prompts(gateway: FakeGateway) -> None:
    with Client(gateway.endpoint) as client:
        outputs = client.generate_batch(["a", 5, None, [True], "b"])  # type: ignore[list-item]
    assert [output.finish_reason for output in outputs] == ["length", "error", "error", "error", "length"]
