"""Gateway and detokenizer cores around a scripted tokenizer and scheduler, with every message free to be late.

Each arrow is a separate queue, as on sockets. Messages stay in order only along one arrow.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from ipc.codec import decode, encode
from ipc.errors import EngineUnavailable
from ipc.messages import (
    Cancel,
    CancelRequests,
    ClientRequest,
    Delivered,
    Ended,
    FinishReason,
    GatewayToClient,
    Opened,
    Outputs,
    PromptTokens,
    Received,
    Refused,
    StepOutputs,
    TextOptions,
    Tokenize,
    TokenizeDone,
    TokenizeQuery,
    TokenizerQuery,
    Withdraw,
    Withdrawn,
)
from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import SchedulingParams
from tests.unit.workers.gateway.gateway_tools import TOKENIZERS, answer_to, bootstrap, generate
from tests.unit.workers.text.tools import byte_level_tokenizer
from workers.detokenizer.core import Detokenizer
from workers.detokenizer.text_decoding import Decoding
from workers.gateway.core import Gateway
from workers.gateway.outbox import Peer

DECODING = Decoding.of(byte_level_tokenizer())
NUM_CLIENTS = 3


class Engine:
    """Every event is drawn from `draw`."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.now = 0.0
        self.policy = draw.choice(["fifo", "priority", "fair"])
        policy = {"policy": self.policy, "queue_timeout_s": draw.choice([None, 15.0])}
        self.gateway = Gateway(bootstrap(max_open_requests=6, policy=policy), dict)
        self.detokenizer = Detokenizer(DECODING, client_window=3)
        self.arrows: dict[str, deque[Any]] = {}
        self.running: dict[int, int] = {}  # in the scheduler: tokens still to come
        self.withdrawn: set[int] = set()  # to be declined there when they arrive
        self.deadlines: list[tuple[int, range]] = []  # there
        self.clients = [bytes([number]) for number in range(NUM_CLIENTS)]  # those that are there
        self.unread = dict.fromkeys(self.clients, 0)
        self.receipts: dict[bytes, list[int]] = {client: [] for client in self.clients}
        self.unreachable: set[bytes] = set()
        self.num_sent = 0
        self.waiting: dict[str, bytes] = {}  # open requests (sent, not refused, not ended) and their clients
        self.num_finals: dict[str, int] = {}
        self.lost: set[str] = set()  # requests of clients that were away at some time
        self.gateway.serving.start(self.now)
        for tokenizer in TOKENIZERS:
            self.put("tokenizer>gateway", (tokenizer, TokenizeDone(key=0)))

    def put(self, arrow: str, message: Any) -> None:
        self.arrows.setdefault(arrow, deque()).append(message)

    # Clients

    def send(self, client: bytes) -> None:
        self.num_sent += 1
        request_id = f"r{self.num_sent}"
        self.waiting[request_id] = client
        bad = self.draw.random() < 0.1
        params = SamplingParams(n=self.draw.choice([1, 1, 3]))
        scheduling = SchedulingParams(
            priority=self.draw.randint(-1, 1) if self.policy == "priority" else 0,
            tenant=self.draw.choice("ab"),
            deadline_s=self.draw.choice([None, 0.5, 20]),
        )
        message: ClientRequest
        if self.draw.random() < 0.3:
            message = TokenizeQuery(request_id=request_id, prompt=None if bad else "x", scheduling=scheduling)
        else:
            stream, prompt = self.draw.random() < 0.7, "" if bad else "x"
            message = generate(request_id, params=params, scheduling=scheduling, stream=stream, prompt=prompt)
        self.put(f"client>gateway {client!r}", (client, encode(message)))

    def cancel(self, client: bytes) -> None:
        mine = [request_id for request_id, owner in self.waiting.items() if owner == client]
        if mine:
            message = Cancel(request_id=self.draw.choice(mine))
            self.put(f"client>gateway {client!r}", (client, encode(message)))

    def read(self, client: bytes) -> None:
        if self.unread[client]:
            count = self.draw.randint(1, self.unread[client])
            self.unread[client] -= count
            self.put(f"client>gateway {client!r}", (client, encode(Delivered(count=count))))
        if self.receipts[client]:
            self.put(f"client>gateway {client!r}", (client, encode(Received(receipts=self.receipts[client]))))
            self.receipts[client] = []

    def leave(self, client: bytes) -> None:
        """Another client replaces it. Its last messages may still arrive."""
        self.unreachable.add(client)
        self.lost |= {request_id for request_id, owner in self.waiting.items() if owner == client}
        newcomer = bytes([max(max(self.clients + list(self.unreachable))) + 1])
        self.clients[self.clients.index(client)] = newcomer
        self.unread[newcomer] = 0
        self.receipts[newcomer] = []

    def receive(self, client: bytes, frame: bytes) -> None:
        message = decode(frame, GatewayToClient)
        if isinstance(message, Refused):
            del self.waiting[message.request_id]
        if isinstance(message, PromptTokens):
            self.receipts[client].append(message.receipt)
            self.num_finals[message.request_id] = self.num_finals.get(message.request_id, 0) + 1
            self.waiting.pop(message.request_id, None)
        if isinstance(message, Outputs):
            self.unread[client] += 1
            for index, final in message.finals:
                request_id = message.request_ids[index]
                assert request_id not in self.num_finals, "an end after the final answer"
                if final.num_open:
                    continue
                self.num_finals[request_id] = self.num_finals.get(request_id, 0) + 1
                self.waiting.pop(request_id, None)

    # Messages

    def flush(self) -> None:
        while outbox := self.gateway.take_outbox():
            for peer, identity, message in outbox:
                if peer is Peer.CLIENT:
                    if identity in self.unreachable:
                        self.gateway.client_gone(identity)
                    else:
                        self.receive(identity, message if isinstance(message, bytes) else encode(message))
                elif peer is Peer.TOKENIZER:
                    self.put("gateway>" + identity.decode(), (identity, message))
                elif peer is not Peer.LAUNCHER:
                    self.put(f"gateway>{peer.value}", message)

    def move(self, arrow: str) -> None:
        """The first message on an arrow arrives."""
        message = self.arrows[arrow].popleft()
        if not self.arrows[arrow]:
            del self.arrows[arrow]
        source, target = arrow.split()[0].split(">")
        if source == "client":
            self.gateway.client_frames(message[0], [message[1]], self.now)
        elif arrow == "tokenizer>gateway":
            tokenizer, done = message
            self.gateway.tokenizer_done(tokenizer, done.key, self.now)
            if done.answer is not None or done.error_code:
                self.gateway.answered(done, self.now)
        elif arrow == "scheduler>gateway":
            if isinstance(message, Withdrawn):
                self.gateway.withdrawn(message.keys, self.now)
            else:
                self.gateway.accepted(message)
        elif arrow == "detokenizer>gateway":
            self.gateway.delivery(*message, self.now)
        elif target.startswith("tokenizer."):
            tokenizer, request = message
            if isinstance(request, TokenizerQuery):
                done = self.answer(request)
            else:
                self.put(f"{target}>scheduler", request)
                done = TokenizeDone(key=request.key)
            self.put("tokenizer>gateway", (tokenizer, done))
        elif target == "detokenizer":
            self.detokenizer.handle(message)
        elif isinstance(message, CancelRequests):
            self.withdrawn.difference_update(message.keys)
            self.end(message.keys)
        elif isinstance(message, Withdraw):
            withdrawn = [key for key in message.keys if key not in self.running]
            self.withdrawn.update(withdrawn)
            self.put("scheduler>gateway", Withdrawn(keys=withdrawn))
        else:
            self.admit(message)
        self.flush()

    # Tokenizer, scheduler and detokenizer

    def answer(self, message: TokenizerQuery) -> TokenizeDone:
        if self.draw.random() < 0.1:
            return TokenizeDone(key=message.key, error_code="invalid_request", error_message="too long")
        return answer_to(message)

    def admit(self, request: Tokenize) -> None:
        if request.key in self.withdrawn:
            self.withdrawn.discard(request.key)
            return
        self.put("scheduler>gateway", [request.key])
        stop = self.draw.choice([[], ["e"]])
        if self.draw.random() < 0.1:
            opened = Opened(request.key, request.route, 1, TextOptions(stop=stop))
            refused = Ended(request.key, "error", "invalid_request", "too long")
            self.put("scheduler>detokenizer", StepOutputs(opened=[opened], ended=[refused]))
        else:
            keys = range(request.key, request.key + request.params.n)
            for key in keys:
                self.running[key] = self.draw.randint(1, 6)
            opened = Opened(request.key, request.route, 1, TextOptions(stop=stop), num_samples=request.params.n)
            self.put("scheduler>detokenizer", StepOutputs(opened=[opened]))
            if request.deadline_ns:
                self.deadlines.append((request.deadline_ns, keys))
            self.expire()

    def end(self, keys: Iterable[int], reason: FinishReason = "cancelled") -> None:
        ended = [Ended(key, reason) for key in keys if self.running.pop(key, None) is not None]
        self.put("scheduler>detokenizer", StepOutputs(ended=ended))

    def expire(self) -> None:
        """The scheduler's own timers."""
        due = [(at_ns, keys) for at_ns, keys in self.deadlines if at_ns <= self.now * 1e9]
        for entry in due:
            self.deadlines.remove(entry)
            self.end(entry[1], "deadline")

    def step(self) -> None:
        keys = [key for key in self.running if self.draw.random() < 0.7]
        finish = []
        for key in keys:
            self.running[key] -= 1
            finish.append(0 if self.running[key] else self.draw.choice([1, 2]))
            if not self.running[key]:
                del self.running[key]
        token_ids = [self.draw.randint(0, 399) for _ in keys]
        if not keys:
            return
        message = StepOutputs(
            keys=np.array(keys, "<i8").tobytes(), token_ids=np.array(token_ids, "<i4").tobytes(), finish=bytes(finish)
        )
        self.put("scheduler>detokenizer", message)

    def detokenize(self) -> None:
        if cancels := self.detokenizer.take_cancels():
            self.put("detokenizer>scheduler", CancelRequests(keys=cancels))
        for head, frames in self.detokenizer.deliveries():
            self.put("detokenizer>gateway", (head, frames))

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.expire()
        self.gateway.tick(self.now)
        self.flush()

    def anything(self) -> None:
        client = self.draw.choice(self.clients)
        dice = self.draw.random()
        if dice < 0.15:
            self.send(client)
        elif dice < 0.20:
            self.cancel(client)
        elif dice < 0.30:
            self.read(client)
        elif dice < 0.31:
            self.leave(client)
        elif dice < 0.35:
            self.tick(self.draw.choice([0.1, 1.1, 20.0]))
        elif dice < 0.42:
            self.step()
        elif dice < 0.50:
            self.detokenize()
        elif self.arrows:
            self.move(self.draw.choice(list(self.arrows)))

    def come_to_rest(self) -> None:
        """All messages arrive and all clients read."""
        for _ in range(1_000):
            while self.arrows:
                self.move(self.draw.choice(list(self.arrows)))
            self.step()
            self.detokenize()
            for client in self.clients:
                self.read(client)
            self.tick(1.1)
            if not self.arrows and not self.running and not len(self.gateway.table):
                return
        raise AssertionError("the engine does not come to rest")


@pytest.mark.parametrize("block", range(10))
def test_every_request_gets_exactly_one_final_answer_whatever_comes_late(block: int) -> None:
    for seed in range(block * 40, block * 40 + 40):
        engine = Engine(random.Random(seed))
        for _ in range(400):
            engine.anything()
        engine.come_to_rest()
        assert set(engine.waiting) <= engine.lost, f"seed {seed}: no final answer"
        assert set(engine.num_finals.values()) <= {1}, f"seed {seed}: several final answers"
        assert engine.detokenizer.num_open == 0, f"seed {seed}"
        assert not engine.withdrawn, f"seed {seed}: the scheduler waits for requests that will not come"
        engine.come_to_rest()
        assert len(engine.gateway.table.clients) == 0, f"seed {seed}: clients are left"
        assert not engine.gateway._flow._unread.clients, f"seed {seed}: answers count as unread"
        assert engine.detokenizer.num_clients == 0, f"seed {seed}: clients are left in the detokenizer"


@pytest.mark.parametrize("end", ["abort", "drain"])
def test_an_engine_that_ends_in_the_midst_of_things_answers_everybody_once(end: str) -> None:
    for seed in range(100):
        engine = Engine(random.Random(seed))
        for _ in range(engine.draw.randint(1, 300)):
            engine.anything()
        if end == "abort":
            engine.gateway.abort(EngineUnavailable("the GPU process died"))
        else:
            engine.gateway.serving.drain(engine.now)
            for _ in range(engine.draw.randint(0, 50)):
                engine.anything()
            engine.tick(30.0)
        engine.flush()
        assert len(engine.gateway.table) == 0
        for _ in range(100):
            engine.anything()
        while engine.arrows:
            engine.move(engine.draw.choice(list(engine.arrows)))
        assert set(engine.waiting) <= engine.lost, f"seed {seed}: no final answer"
        assert set(engine.num_finals.values()) <= {1}, f"seed {seed}: several final answers"
