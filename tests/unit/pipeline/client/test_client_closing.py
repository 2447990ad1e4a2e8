"""The end of a client: closed beside threads, interrupted, dropped, or open when the interpreter exits."""

from __future__ import annotations

import asyncio
import gc
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from ipc.errors import EngineUnavailable, InvalidRequest
from ipc.messages import Cancel, FinalOutput, Generate
from pipeline import AsyncClient, Client
from pipeline.client.loop_thread import LoopThread
from pipeline.environment.module_search import module_environment
from tests.unit.pipeline.client.client_scripts import WAIT_S, run_script, wait_until
from tests.unit.pipeline.client.fake_gateway import END, FakeGateway, news

FULL = FinalOutput("error", 3, 0, "queue_full", "full", retry_after_s=60.0)


def ask_for_ever(client: Client) -> None:
    while True:
        client.health()


CALLS: dict[str, Callable[[Client], object]] = {
    "generate": lambda client: client.generate("hi"),
    "batch": lambda client: {output.error for output in client.generate_batch(["hi"] * 30)},
    "stream": lambda client: list(client.generate("hi", stream=True)),
    "wait_ready": lambda client: client.wait_ready(None),
    "one call after another": ask_for_ever,
}


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_threads_that_wait_for_a_client_come_back_when_it_is_closed(
    gateway: FakeGateway, call: str, is_full: bool
) -> None:
    gateway.state = "starting"
    if is_full:
        gateway.on_generate = lambda g: [news(g.request_id, end=FULL)]
    ends: list[str] = []

    def use() -> None:
        begun.release()
        try:
            ends.append(str(CALLS[call](client)))
        except EngineUnavailable as error:
            ends.append(str(error))
        except Exception as error:
            ends.append("full" if is_full else repr(error))

    begun = threading.Semaphore(0)
    client = Client(gateway.endpoint)
    client.health()
    threads = [threading.Thread(target=use, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert begun.acquire(timeout=WAIT_S)
    if call in ("generate", "batch", "stream"):
        gateway.expect(Generate)
    closers = [threading.Thread(target=client.close, daemon=True) for _ in range(2)]
    for thread in closers:
        thread.start()
    for thread in [*threads, *closers]:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "it waits for ever"
    assert len(ends) == 3
    assert all("this client was closed" in end or (is_full and end == "full") for end in ends), ends


def test_a_finalizer_may_close_a_client_on_the_clients_own_thread_and_may_not_wait_there(gateway: FakeGateway) -> None:
    client = Client(gateway.endpoint)
    client.health()
    loop, thread = client._thread._loop, client._thread._thread
    assert loop is not None
    assert thread is not None
    outcomes: list[str] = []

    def finalizer() -> None:
        try:
            client.health()
        except InvalidRequest as error:
            outcomes.append(str(error))
        client.close()

    loop.call_soon_threadsafe(finalizer)
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert "from its own thread" in outcomes[0]
    client.close()
    with pytest.raises(EngineUnavailable, match="this client was closed"):
        client.health()


def test_an_asyncio_client_that_is_closed_ends_the_tasks_that_use_it(gateway: FakeGateway) -> None:
    async def body() -> list[object]:
        client = AsyncClient(gateway.endpoint)
        gateway.state = "starting"

        async def stream() -> None:
            async for _ in client.generate("hi", stream=True):
                pass

        asking = [client.generate("hi"), client.generate_batch(["hi"] * 3), client.wait_ready(None), stream()]
        tasks = [asyncio.create_task(each) for each in asking]
        for _ in range(3):
            await client.stats()
        await client.close()
        await client.close()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), WAIT_S)

    whole, batch, *rest = asyncio.run(body())
    assert isinstance(batch, list)
    assert {output.error for output in batch} == {"this client was closed"}
    assert [str(error) for error in (whole, *rest)] == ["this client was closed"] * 3


INTERRUPTED = """
import sys
from pipeline import Client
client = Client(sys.argv[1])
try:
    client.generate_batch(["hi"] * 3, progress=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("is_left_open", [False, True])
def test_ctrl_c_in_a_batch_leaves_the_terminal_as_it_was(gateway: FakeGateway, is_left_open: bool) -> None:
    script = INTERRUPTED if is_left_open else INTERRUPTED + "client.close()\n"
    terminal, end = pty.openpty()
    environment = {**module_environment(), "TERM": "xterm"}
    command = [sys.executable, "-X", "dev", "-c", script, gateway.endpoint]
    with subprocess.Popen(command, stdin=end, stdout=end, stderr=end, env=environment) as process:
        os.close(end)
        for _ in range(3):
            gateway.expect(Generate)
        process.send_signal(signal.SIGINT)
        for _ in range(3):
            gateway.expect(Cancel)
        shown = b""
        try:
            while chunk := os.read(terminal, 65_536):
                shown += chunk
        except OSError:  # the other end is closed
            pass
        os.close(terminal)
    assert process.returncode == 0
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l"), "the cursor stays hidden"
    assert shown.rindex(b"interrupted") > shown.rindex(b"\x1b[?25h"), "the bar ends before the call returns"
    assert b"destroyed" not in shown
    assert b"Traceback" not in shown


@pytest.mark.parametrize(
    "use",
    ["client.health()", "stream = client.generate('hi', stream=True)",
     "import threading; threading.Thread(target=client.generate, args=('hi',), daemon=True).start(); client.health()",
     "import asyncio; client = AsyncClient(sys.argv[1]); asyncio.run(client.health())"],
)  # fmt: skip
def test_the_interpreter_exits_in_silence_with_a_client_open(gateway: FakeGateway, use: str) -> None:
    script = f"import sys; from pipeline import AsyncClient, Client; client = Client(sys.argv[1]); {use}"
    done = run_script(script, gateway.endpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_interrupted_call_that_ends_with_an_error_says_nothing_more(caplog: pytest.LogCaptureFixture) -> None:
    async def nothing() -> None:
        pass

    async def fail() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            raise EngineUnavailable("too late")

    thread = LoopThread(at_end=nothing)
    with pytest.raises(KeyboardInterrupt):
        thread.run(fail())
    thread.close()
    gc.collect()
    assert caplog.messages == []


LATE = """
import sys
from pipeline import Client
class Late:
    client = Client(sys.argv[1])
    def __del__(self):
        for use in (self.client.health, lambda: type(self.client)(self.client.endpoint).health(), self.client.close):
            try:
                use()
            except Exception as error:
                print(type(error).__name__, error)
late = sys.modules["late"] = Late()
late.client.health()
"""


def test_a_client_in_a_finalizer_at_the_end_of_the_interpreter_does_not_wait_for_threads_that_are_gone(
    gateway: FakeGateway,
) -> None:
    done = run_script(LATE, gateway.endpoint)
    line = "EngineUnavailable a Client cannot be used while the interpreter shuts down (in a __del__?)\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, 2 * line, "")


# Dropped


def held() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def wait_until_only(before: tuple[int, int]) -> None:
    wait_until(lambda: held()[0] <= before[0] and held()[1] <= before[1], "the end of what dropped clients held")


def test_a_dropped_client_gives_up_its_thread_and_descriptors(gateway: FakeGateway) -> None:
    gateway.on_generate = lambda g: [news(g.request_id, "x", (1,), END)]
    gc.collect()
    before = held()
    for _ in range(5):
        assert Client(gateway.endpoint).generate("hi").text == "x"
    wait_until_only(before)

    class Handler:
        def __init__(self) -> None:
            self.client = Client(gateway.endpoint)
            self.me = self

    for _ in range(3):
        Handler().client.health()
    gc.collect()
    wait_until_only(before)


def test_a_stream_keeps_its_client_and_goes_with_it(gateway: FakeGateway) -> None:
    gc.collect()
    before = held()
    stream = Client(gateway.endpoint).generate("hi", stream=True, request_id="r")
    gateway.expect(Generate)
    gc.collect()
    gateway.say(news("r", "a", (1,)))
    assert next(stream).text == "a"
    del stream
    gc.collect()
    wait_until_only(before)


def test_a_dropped_asyncio_client_gives_up_its_descriptors_while_its_loop_runs_on_and_after_it(
    gateway: FakeGateway,
) -> None:
    gateway.on_generate = lambda g: [news(g.request_id, "x", (1,), END)]
    gc.collect()
    before = held()

    async def body() -> None:
        with_loop = held()
        for _ in range(5):
            assert (await AsyncClient(gateway.endpoint).generate("hi")).text == "x"
        deadline = asyncio.get_running_loop().time() + WAIT_S
        while held() > with_loop:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0)

    asyncio.run(body())
    wait_until_only(before)
    client = AsyncClient(gateway.endpoint)
    asyncio.run(client.health())
    del client
    wait_until_only(before)


def test_too_few_descriptors_are_an_error_and_not_an_abort(gateway: FakeGateway) -> None:
    script = (
        "import resource, sys; from pipeline import Client\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))\n"
        "clients = [Client(sys.argv[1]) for _ in range(9)]\n"
        "for client in clients: client.health()\n"
    )
    done = run_script(script, gateway.endpoint)
    assert done.returncode == 1
    assert "EngineUnavailable: a c" in done.stderr
    assert "ulimit -n is 60: close files or clients that are not needed" in done.stderr


def test_a_client_leaves_the_numbers_of_closed_standard_streams_alone(gateway: FakeGateway) -> None:
    script = (
        "import os, sys; from pipeline import Client\n"
        "for fd in (0, 1): os.close(fd)\n"
        "client = Client(sys.argv[1]); client.health()\n"
        "os.write(2, os.readlink('/proc/self/fd/0').encode() + os.readlink('/proc/self/fd/1').encode())\n"
        "os._exit(0)\n"
    )
    assert run_script(script, gateway.endpoint).stderr == 2 * os.devnull
