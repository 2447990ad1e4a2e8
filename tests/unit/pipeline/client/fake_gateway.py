"""A gateway whose answers the test writes, and the parts of such answers."""

from __future__ import annotations

import os
import queue
import struct
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from ipc.channels import bind_router, receive_from, send_to
from ipc.messages import (
    PROTOCOL_VERSION,
    ClientMessage,
    Delivered,
    DetokenizeQuery,
    FinalOutput,
    Generate,
    Health,
    Keep,
    Outputs,
    PromptLogprobs,
    Query,
    Recall,
    RequestTimes,
    Stats,
    StatsArray,
    TokenizeQuery,
    TokenLogprobs,
)
from pipeline import Output
from tests.unit.pipeline.client.client_scripts import WAIT_S


def int32(*values: int) -> bytes:
    return array("i", values).tobytes()


def news(
    request_id: str, text: str = "", ids: tuple[int, ...] = (), end: FinalOutput | None = None, **more: Any
) -> Outputs:
    """Outputs with one row."""
    return Outputs(
        request_ids=[request_id],
        texts=[text],
        num_token_ids=int32(len(ids)),
        token_ids=int32(*ids),
        finals=[] if end is None else [(0, end)],
        **more,
    )


END = FinalOutput(finish_reason="length", num_prompt_tokens=3, num_completion_tokens=2)
CANCELLED = FinalOutput(finish_reason="cancelled", num_prompt_tokens=3, num_completion_tokens=1)


def end_of(num_completion_tokens: int, num_open: int, reason: Any = "length") -> FinalOutput:
    return FinalOutput(
        reason, 3, num_completion_tokens, num_cached_tokens=2, num_open=num_open, times=times_of(num_open)
    )


def times_of(num_open: int) -> RequestTimes:
    return RequestTimes(1, 2, 3, 10 - num_open, 20 - num_open)


def prompt_part(*token_ids: int) -> PromptLogprobs:
    """Each token's log-probability is minus its id, and the likeliest token is the next id."""
    columns = TokenLogprobs(
        num_top=1,
        logprobs=array("f", [-float(token) for token in token_ids]).tobytes(),
        top_ids=int32(*(token + 1 for token in token_ids)),
        top_logprobs=array("f", [-0.5] * len(token_ids)).tobytes(),
    )
    return PromptLogprobs(int32(*token_ids), columns)


def read_prompt(output: Output) -> list[tuple[int, float, dict[int, float]] | None] | None:
    entries = output.prompt_logprobs
    return entries and [entry and (entry.token_id, entry.logprob, entry.top) for entry in entries]


class FakeGateway(threading.Thread):
    """Answers `Query` itself. Its other frames come from `on_generate`, `on_question` and the test."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(daemon=True)
        self.endpoint = endpoint
        self.heard: queue.Queue[Any] = queue.Queue()
        self.on_generate: Callable[[Generate], list[Any]] = lambda _: []
        self.on_question: Callable[[Any], list[Any]] = lambda _: []  # TokenizeQuery, Keep and the like
        self.max_open_requests = 100
        self.state: Any = "ready"
        self.model = "m"
        self.num_delivered = 0
        self._orders: queue.Queue[Any] = queue.Queue()
        self._wake_reader, self._wake_writer = os.pipe()
        self._bound = threading.Event()
        self.start()
        assert self._bound.wait(WAIT_S)

    def run(self) -> None:
        context: zmq.Context[Any] = zmq.Context()
        socket = bind_router(context, self.endpoint)
        self._bound.set()
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._wake_reader, zmq.POLLIN)
        client = b""
        while True:
            readable = dict(poller.poll())
            for identity, message in receive_from(socket, ClientMessage):
                client = identity
                for answer in self._answer(message):
                    send_to(socket, identity, answer)
            if self._wake_reader in readable:
                os.read(self._wake_reader, 1)
                order = self._orders.get()
                if order is None:
                    context.destroy(linger=1_000)
                    return
                send_to(socket, client, order)

    def say(self, message: Any) -> None:
        self._orders.put(message)
        os.write(self._wake_writer, b"x")

    def stop(self) -> None:
        if self.is_alive():
            self.say(None)
            self.join()
            os.close(self._wake_reader)
            os.close(self._wake_writer)
            Path(self.endpoint.removeprefix("ipc://")).unlink(missing_ok=True)

    def expect(self, kind: type) -> Any:
        """The next message of the client's that is no credit and no query."""
        message = self.heard.get(timeout=WAIT_S)
        assert isinstance(message, kind), message
        return message

    def _answer(self, message: Any) -> list[Any]:
        match message:
            case Query(query_id=query_id, what="health"):
                return [Health(
                    query_id=query_id, state=self.state, detail="", protocol_version=PROTOCOL_VERSION, model=self.model,
                    max_model_len=64, max_open_requests=self.max_open_requests,
                )]  # fmt: skip
            case Query(query_id=query_id, arrays=names):
                arrays = {name: StatsArray([2, 2], struct.pack("4q", 1, 2, 3, -4)) for name in names}
                return [Stats(
                    query_id=query_id, roles={"scheduler": {"num_steps": 12.0}}, arrays={"scheduler": arrays},
                )]  # fmt: skip
            case Delivered(count=count):
                self.num_delivered += count
                return []
        self.heard.put(message)
        if isinstance(message, TokenizeQuery | DetokenizeQuery | Keep | Recall):
            return self.on_question(message)
        return self.on_generate(message) if isinstance(message, Generate) else []
