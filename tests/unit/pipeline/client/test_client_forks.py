"""A client in a forked child. It opens its own connection there, and does not touch its parent's."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import socket
import warnings
from collections.abc import Iterator

import pytest

from ipc.messages import Cancel, Generate
from pipeline import AsyncClient, Client
from tests.unit.pipeline.client.client_scripts import in_child, run_script
from tests.unit.pipeline.client.fake_gateway import END, FakeGateway, news


@pytest.fixture
def client(gateway: FakeGateway) -> Iterator[Client]:
    """One that has been used, and whose parent's stream is open."""
    with warnings.catch_warnings(), Client(gateway.endpoint) as client:
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, from Python 3.12 on
        client.health()
        yield client


def echo(gateway: FakeGateway) -> None:
    gateway.on_generate = lambda g: [news(g.request_id, f"re {g.prompt}", (1,), END)]


def expect_no_cancel(gateway: FakeGateway, client: Client) -> None:
    client.generate("barrier")
    while not gateway.heard.empty():
        assert not isinstance(gateway.heard.get(), Cancel), "the child cancelled its parent's request"


def test_a_client_works_on_both_sides_of_a_fork(gateway: FakeGateway, client: Client) -> None:
    stream = client.generate("hi", stream=True, request_id="parent")
    gateway.expect(Generate)
    echo(gateway)
    assert in_child(lambda: client.generate("child").text) == "re child"
    assert in_child(lambda: [o.text for o in client.generate_batch(["a", "b"])]) == "['re a', 're b']"
    assert in_child(lambda: in_child(lambda: client.generate("grandchild").text)) == "re grandchild"
    assert client.generate("parent").text == "re parent"
    gateway.say(news("parent", "still here", (2,), END))
    assert [output.text for output in stream] == ["still here"]


def test_a_child_that_lets_go_of_a_client_does_nothing_to_its_parents_requests(
    gateway: FakeGateway, client: Client
) -> None:
    stream = client.generate("hi", stream=True, request_id="parent")
    gateway.expect(Generate)
    echo(gateway)

    def leave() -> str:
        with client, stream:
            pass
        client.close()
        return "left"

    def drop() -> str:
        nonlocal client, stream
        del client, stream
        gc.collect()
        return "dropped"

    def read() -> object:
        return next(stream)

    assert in_child(leave) == "left"
    assert in_child(drop) == "dropped"
    assert in_child(read).startswith(
        f"InvalidRequest: the stream of request parent was opened by process {os.getpid()}"
    )
    expect_no_cancel(gateway, client)
    gateway.say(news("parent", "still here", (2,), END))
    assert [output.text for output in stream] == ["still here"]


def test_a_client_closed_before_the_fork_stays_closed(gateway: FakeGateway, client: Client) -> None:
    client.close()
    assert in_child(client.health) == "EngineUnavailable: this client was closed"


def test_a_child_does_not_hold_its_parents_connection(gateway: FakeGateway, client: Client) -> None:
    def num_connections() -> int:
        count = 0
        for name in os.listdir("/proc/self/fd"):
            try:
                with socket.socket(fileno=os.dup(int(name))) as each:
                    count += f"ipc://{each.getpeername()}" == gateway.endpoint
            except OSError:
                pass
        return count

    assert num_connections() == 1
    assert in_child(num_connections) == "0"


def test_an_asyncio_client_works_in_a_child_forked_from_its_loop(gateway: FakeGateway) -> None:
    echo(gateway)

    async def body() -> tuple[str, str]:
        async with AsyncClient(gateway.endpoint) as client:
            await client.health()

            async def ask() -> str:
                return (await client.generate("hi")).text

            return in_child(lambda: asyncio.run(ask())), await ask()

    assert asyncio.run(body()) == ("re hi", "re hi")


shared: Client


def _ask(prompt: str) -> str:
    return shared.generate(prompt).text


def test_a_pool_of_forked_processes_shares_a_client(gateway: FakeGateway, client: Client) -> None:
    global shared
    shared = client
    echo(gateway)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_ask, ["a", "b", "c"]) == ["re a", "re b", "re c"]
        pool.close()
        pool.join()
    assert client.generate("d").text == "re d"


def test_a_child_exits_in_silence_while_its_parent_streams(gateway: FakeGateway) -> None:
    script = (
        "import gc, os, sys, threading, warnings; from pipeline import Client\n"
        "warnings.simplefilter('ignore', DeprecationWarning)\n"
        "client = Client(sys.argv[1])\n"
        "def batch(): client.generate_batch(['x'] * 3, progress=True)\n"
        "threading.Thread(target=batch, daemon=True).start()\n"
        "stream = client.generate('hi', stream=True, request_id='parent')\n"
        "client.health()\n"
        "pid = os.fork()\n"
        "if pid: assert os.waitpid(pid, 0)[1] == 0; print(next(stream).text); os._exit(0)\n"
        "del client, stream, batch; gc.collect()\n"
    )
    gateway.on_generate = lambda g: [news("parent", "a", (1,))] if g.request_id == "parent" else []
    done = run_script(script, gateway.endpoint)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_child_forked_from_an_event_loop_does_not_destroy_the_tasks_of_its_parent(gateway: FakeGateway) -> None:
    script = (
        "import asyncio, gc, os, sys; from pipeline import AsyncClient\n"
        "async def main():\n"
        "    client = AsyncClient(sys.argv[1], timeout_s=None)\n"
        "    asyncio.get_running_loop().call_soon(lambda: asyncio.ensure_future(client.generate('parent')))\n"
        "    await client.health()\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        gc.collect()\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(pid, 0)[1] == 0\n"
        "    gc.collect()\n"
        "asyncio.run(main())\n"
    )
    done = run_script(script, gateway.endpoint)
    assert (done.returncode, done.stderr) == (0, "")
