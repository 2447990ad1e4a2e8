"""The least that an ASGI server can do for a stream: every few milliseconds, the same bytes to everybody.

`python -m pipeline.bench.bare_asgi STEP_MS` listens on a free port of 127.0.0.1 and prints its URL. `app` also runs
under other ASGI servers, with the step in the environment variable STEP_MS.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from typing import Any, Final

import uvicorn
import uvloop

EVENT: Final = (
    b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1700000000,'
    b'"model":"none","choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}]}\n\n'
)


class Pace:
    """Wakes all streams once a step."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._waiting: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None

    async def next_step(self) -> None:
        loop = asyncio.get_running_loop()
        if self._task is None:
            self._task = loop.create_task(self._tick())
        future = loop.create_future()
        self._waiting.append(future)
        await future

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due = max(due + self._step_s, loop.time())
            await asyncio.sleep(due - loop.time())
            waiting, self._waiting = self._waiting, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)


pace = Pace(float(os.environ.get("STEP_MS", "4")) / 1e3)


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Streams EVENT until the client leaves."""
    if scope["type"] != "http":
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    watcher = asyncio.ensure_future(_gone(receive))
    while not watcher.done():
        await pace.next_step()
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def main() -> None:
    pace._step_s = float(sys.argv[1]) / 1e3
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(app, loop="none", http="httptools", lifespan="off", log_config=None, access_log=False)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(uvicorn.Server(config).serve(sockets=[listener]))


if __name__ == "__main__":
    main()
