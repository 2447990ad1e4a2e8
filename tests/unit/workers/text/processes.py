"""Real gateway, tokenizer and detokenizer processes around a scheduler that says each prompt back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

from ipc.channels import connect_dealer, receive_frames, receive_from, send, send_to
from ipc.codec import decode, encode
from ipc.descriptor_passing import descriptor_channel, send_with_descriptors
from ipc.doorbell import Doorbell
from ipc.messages import (
    Accepted,
    CancelRequests,
    ClientMessage,
    Delivered,
    Ended,
    FinalOutput,
    GatewayToClient,
    Opened,
    Outputs,
    Ready,
    Refused,
    Start,
    StepOutputs,
    Stop,
    TextOptions,
    Tokenized,
    ToScheduler,
    Withdraw,
    Withdrawn,
    WorkerToLauncher,
)
from ipc.records import PROMPT_RECORD_TOKENS, FinishCode, StepShape, prompt_layout
from ipc.ring import Ring
from ipc.stats_page import StatsPage
from tests.unit.workers.gateway.gateway_tools import bootstrap as gateway_bootstrap
from tests.unit.workers.private_sockets import PrivateSockets
from workers.bootstrap import RingEnd, WorkerBootstrap
from workers.detokenizer.config import ARRAYS as DETOKENIZER_ARRAYS
from workers.detokenizer.config import COUNTERS as DETOKENIZER_COUNTERS
from workers.detokenizer.config import DetokenizerBootstrap
from workers.gateway.config import COUNTERS as GATEWAY_COUNTERS
from workers.tokenizer.config import COUNTERS as TOKENIZER_COUNTERS
from workers.tokenizer.config import TokenizerBootstrap, TokenizerConfig

ROOT = Path(__file__).resolve().parents[4]
DEADLINE_S = 30.0
COUNTERS = {"gateway": GATEWAY_COUNTERS, "tokenizer.0": TOKENIZER_COUNTERS, "detokenizer": DETOKENIZER_COUNTERS}
ARRAYS = {"detokenizer": DETOKENIZER_ARRAYS}


def wait_until(condition: Callable[[], Any], what: str) -> None:
    """Look again and again; the pause only spares the machine."""
    deadline = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        pause.wait(0.01)


def spawn(role: str, bootstrap: Any) -> subprocess.Popen[bytes]:
    fds: list[int] = []

    def position(fd: int) -> int:
        fds.append(fd)
        return len(fds) - 1

    worker = bootstrap.worker.renumbered(position)
    worker = msgspec.structs.replace(worker, descriptors=[str(place) for place in range(len(fds))])
    bootstrap = msgspec.structs.replace(bootstrap, worker=worker)
    ours, theirs = descriptor_channel()
    with ours, theirs:
        send_with_descriptors(ours, encode(bootstrap), fds)
        command = [sys.executable, "-m", f"workers.{role.split('.')[0]}", "--bootstrap-fd", str(theirs.fileno())]
        return subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT)


class EchoScheduler(threading.Thread):
    """Accepts everything; each request generates its own prompt, and a request named "hold..." does not end."""

    def __init__(
        self, context: zmq.Context[Any], sockets: PrivateSockets, ring: Ring, tokenizer_doorbell: Doorbell
    ) -> None:
        super().__init__(daemon=True)
        self.inbox = sockets.bind(context, "schedule")
        self.detokenizer = sockets.connect(context, "detokenize")
        self.ring = ring
        self.tokenizer_doorbell = tokenizer_doorbell
        self.held: set[int] = set()
        self.cancelled: list[int] = []
        self.echoed: set[int] = set()
        self.tokenized: dict[str, Tokenized] = {}  # by request id
        self.withdrawn: set[int] = set()  # to be declined when they arrive
        self.may_release = threading.Event()  # the records of prompts
        self.may_release.set()
        self.is_over = threading.Event()

    def run(self) -> None:
        while not self.is_over.is_set():
            self.inbox.poll(20)
            for _, message in receive_from(self.inbox, ToScheduler):
                if isinstance(message, CancelRequests):
                    self._cancel(message.keys)
                elif isinstance(message, Withdraw):
                    withdrawn = [key for key in message.keys if key not in self.echoed]
                    self.withdrawn.update(withdrawn)
                    send_to(self.inbox, b"gateway@1", Withdrawn(keys=withdrawn))
                else:
                    self._echo(message)
        self.inbox.close(0)
        self.detokenizer.close(0)

    def _cancel(self, keys: list[int]) -> None:
        self.cancelled += keys
        found = [key for key in keys if key in self.held]
        self.held -= set(found)
        send(self.detokenizer, StepOutputs(ended=[Ended(key, "cancelled") for key in found]))

    def _echo(self, request: Tokenized) -> None:
        if request.key in self.withdrawn:
            self.ring.release_through(request.ticket)
            return
        opened = Opened(request.key, request.route, request.num_prompt_tokens, TextOptions.of(request.params))
        accepted = Accepted(keys=[request.key])
        while not send_to(self.inbox, b"gateway@1", accepted):  # it may not be connected yet
            self.inbox.poll(1)
        self.echoed.add(request.key)
        self.tokenized[request.route.request_id] = request
        if request.error_code:
            ended = Ended(request.key, "error", request.error_code, request.error_message)
            send(self.detokenizer, StepOutputs(opened=[opened], ended=[ended]))
            return
        num_records = -(-request.num_prompt_tokens // PROMPT_RECORD_TOKENS)
        tickets = range(request.ticket, request.ticket + num_records)
        token_ids = np.concatenate([self.ring.record(ticket).token_ids for ticket in tickets])
        token_ids = token_ids[: request.num_prompt_tokens].copy()
        assert self.may_release.wait(DEADLINE_S), "the test did not let the records go"
        self.ring.release_through(tickets[-1])
        self.tokenizer_doorbell.ring()
        send(self.detokenizer, StepOutputs(opened=[opened]))
        holds = request.route.request_id.startswith("hold")
        if holds:
            self.held.add(request.key)
        for at, token_id in enumerate(token_ids[:200]):
            is_last = at == min(len(token_ids), 200) - 1 and not holds
            code = FinishCode.LENGTH if is_last else FinishCode.RUNNING
            key = np.array([request.key], "<i8").tobytes()
            token = np.array([token_id], "<i4").tobytes()
            send(self.detokenizer, StepOutputs(keys=key, token_ids=token, finish=bytes([code])))


class TextClient:
    """A client of the test's: collects texts and ends."""

    def __init__(self, context: zmq.Context[Any], endpoint: str, *, read_ahead: int = 0) -> None:
        def limit(socket: zmq.Socket[Any]) -> None:
            socket.setsockopt(zmq.RCVHWM, read_ahead)  # 0 = everything lands here at once, read or not

        self.socket = connect_dealer(context, endpoint, prepare=limit)
        self.texts: dict[str, str] = {}
        self.finals: dict[str, FinalOutput] = {}
        self.refused: list[Refused] = []
        self.others: list[Any] = []

    def say(self, message: ClientMessage | bytes) -> None:
        self.socket.send(message if isinstance(message, bytes) else encode(message))

    def read(self) -> None:
        """Process the messages that have arrived."""
        for frames in receive_frames(self.socket):
            message = decode(frames[-1], GatewayToClient)
            if isinstance(message, Outputs):
                for request_id, text in zip(message.request_ids, message.texts, strict=True):
                    self.texts[request_id] = self.texts.get(request_id, "") + text
                for index, final in message.finals:
                    assert message.request_ids[index] not in self.finals, "two final answers"
                    self.finals[message.request_ids[index]] = final
                self.say(Delivered(count=1))
            elif isinstance(message, Refused):
                self.refused.append(message)
            else:
                self.others.append(message)

    def finish(self, *request_ids: str) -> None:
        def have_ended() -> bool:
            self.read()
            refused = [refusal for refusal in self.refused if refusal.request_id in request_ids]
            assert not refused, f"these will never end: {refused}"
            return set(request_ids) <= set(self.finals)

        wait_until(have_ended, f"ends of {len(request_ids)} requests; {len(self.finals)} have come")


class TextEngine:
    """The three workers, as their launcher sees them. `folder` must be short: sockets lie in it."""

    def __init__(
        self, folder: Path, model: Path, vocab_size: int, *, max_model_len: int = 12_000, max_open_requests: int = 100
    ) -> None:
        self.folder = folder
        self.context: zmq.Context[Any] = zmq.Context()
        self.sockets = PrivateSockets(folder)
        self.control = self.sockets.bind(self.context, "control")
        self.said: list[Any] = []
        self.stats = {
            role: StatsPage.create(role, counters, ARRAYS.get(role, ())) for role, counters in COUNTERS.items()
        }
        self.doorbells = {role: Doorbell.create() for role in self.stats}
        self.ring = Ring.create("prompts", prompt_layout(), 3, 1)
        prompts = RingEnd(handle=msgspec.structs.replace(self.ring.handle, index=1), writes=True)
        self.scheduler = EchoScheduler(self.context, self.sockets, self.ring, self.doorbells["tokenizer.0"])
        self.scheduler.start()
        (folder / "front").mkdir(mode=0o700)
        self.endpoint = f"ipc://{folder}/front/client.sock"
        tokenizer = TokenizerBootstrap(
            cache_seed=None,
            worker=self._worker("tokenizer.0", rings={"prompt": [prompts]}),
            tokenizer=TokenizerConfig(template_timeout_s=0.2),
            model_path=str(model),
            shape=StepShape(4, 16, max_model_len, 4, vocab_size),
        )
        detokenizer = DetokenizerBootstrap(
            worker=self._worker("detokenizer"),
            model_path=str(model),
            client_window=8,
        )
        gateway = gateway_bootstrap(
            str(folder),
            worker=self._worker("gateway", all_stats=list(self.stats.values()), outlives_launcher=True),
            client_window=8,
            max_model_len=max_model_len,
            max_open_requests=max_open_requests,
        )
        self.workers = {
            "gateway": spawn("gateway", gateway),
            "tokenizer.0": spawn("tokenizer.0", tokenizer),
            "detokenizer": spawn("detokenizer", detokenizer),
        }

    def _worker(self, role: str, **changes: Any) -> WorkerBootstrap:
        return WorkerBootstrap(
            role=role,
            listeners=self.sockets.listeners,
            sockets=self.sockets.sockets,
            peers={name.partition(".")[0]: [f"{name}@1".encode()] for name in self.stats},
            doorbell_fd=self.doorbells[role].fd,
            stats=self.stats[role],
            launcher_pid=os.getpid(),
            **changes,
        )

    def hear(self) -> list[Any]:
        self.said += [message for _, message in receive_from(self.control, WorkerToLauncher)]
        return self.said

    def start(self) -> None:
        """Wait until all are ready, say so, and wait until the gateway has heard it: it refuses requests before."""

        def num_ready(role: str) -> int:
            return sum(isinstance(message, Ready) and message.role == role for message in self.hear())

        wait_until(lambda: all(num_ready(role) == 1 for role in self.workers), "three workers to be ready")
        self.tell(Start())
        wait_until(lambda: num_ready("gateway") == 2, "the gateway to take requests")

    def tell(self, message: Any) -> None:
        for role in self.workers:
            send_to(self.control, f"{role}@1".encode(), message)

    def client(self, *, read_ahead: int = 0) -> TextClient:
        return TextClient(self.context, self.endpoint, read_ahead=read_ahead)

    def count(self, name: str) -> int:
        """A counter of the gateway's."""
        return int(StatsPage(self.stats["gateway"]).snapshot()[name])

    def stop(self) -> dict[str, int]:
        """Stop all running processes. Returns exit codes by role."""
        self.tell(Stop())
        try:
            return {role: worker.wait(DEADLINE_S) for role, worker in self.workers.items()}
        finally:
            for worker in self.workers.values():
                worker.kill()
            self.scheduler.is_over.set()
            self.scheduler.join()
            self.context.destroy(0)
