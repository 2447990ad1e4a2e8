"""A gateway core between scripted neighbours, and a client that checks what reaches it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from ipc.codec import decode, encode
from ipc.messages import (
    ClientMessage,
    Delivery,
    DetokenizedText,
    DetokenizeQuery,
    FinalOutput,
    GatewayToClient,
    Generate,
    Outputs,
    PromptTokens,
    Refused,
    RequestTimes,
    TokenBytes,
    Tokenize,
    TokenizeDone,
    TokenizerQuery,
)
from ipc.sampling_params import SamplingParams
from ipc.stats_page import StatsHandle
from workers.bootstrap import WorkerBootstrap
from workers.gateway.config import COUNTERS, FrontendConfig, GatewayBootstrap
from workers.gateway.core import Gateway, RoleArrays, RoleStats
from workers.gateway.outbox import Peer
from workers.queueing.config import PolicyConfig

TOKENIZERS = (b"tokenizer.0", b"tokenizer.1")


def bootstrap(folder: str = "/nowhere", **changes: Any) -> GatewayBootstrap:
    frontend = FrontendConfig(
        max_open_requests=changes.pop("max_open_requests", 100),
        max_queued_bytes=changes.pop("max_queued_bytes", 256 << 20),
        slow_client_timeout_s=30.0,
        drain_timeout_s=20.0,
    )
    fields: dict[str, Any] = {
        "worker": WorkerBootstrap(
            role="gateway",
            doorbell_fd=-1,
            stats=StatsHandle("gateway", -1, COUNTERS),
            launcher_pid=1,
        ),
        "frontend": frontend,
        "endpoint": f"ipc://{folder}/front/client.sock",
        "local_endpoint": f"ipc://{folder}/front/client.sock",
        "endpoint_folder": None,
        "model_name": "tiny",
        "max_model_len": 128,
        "policy": PolicyConfig(**changes.pop("policy", {})),
        "tokenizer_window": 2,
        "tokenizer_window_bytes": 1 << 20,
        "client_window": 3,
        **changes,
    }
    return GatewayBootstrap(**fields)


def generate(request_id: str, **changes: Any) -> Generate:
    fields: dict[str, Any] = {"params": SamplingParams(max_tokens=4), **changes}
    if not {"prompt", "chat", "token_ids"} & set(changes):
        fields["prompt"] = "hello"
    return Generate(request_id=request_id, **fields)


def answer_to(message: TokenizerQuery, text: str = "x") -> TokenizeDone:
    """A tokenizer's answer to a query: one token, or a text."""
    request_id = message.query.request_id
    if isinstance(message.query, DetokenizeQuery):
        return TokenizeDone(key=message.key, answer=DetokenizedText(request_id=request_id, receipt=0, text=text))
    table = TokenBytes(token_ids=bytes(4), lengths=bytes([1, 0, 0, 0]), data=b"x")
    answer = PromptTokens(request_id=request_id, receipt=0, token_ids=bytes(4), token_bytes=table)
    return TokenizeDone(key=message.key, answer=answer)


def snapshot_stats(names: Sequence[str]) -> tuple[RoleStats, RoleArrays]:
    arrays = {"scheduler": {"recent": np.arange(6).reshape(3, 2)}} if "recent" in names else {}
    return {"gateway": {"num_open": 0.0}}, arrays


class Harness:
    """The core, and the frames that it sent to each peer. Sends to `unreachable` clients fail, and sends to `full`
    clients find no room."""

    def __init__(self, *, started: bool = True, **changes: Any) -> None:
        self.core = Gateway(bootstrap(**changes), snapshot_stats)
        self.now = 100.0
        self.sent: dict[Peer, list[tuple[bytes, Any]]] = {peer: [] for peer in Peer}
        self.unreachable: set[bytes] = set()
        self.full: set[bytes] = set()
        self.finals: dict[tuple[bytes, str], list[FinalOutput]] = {}  # without their times
        self.times: dict[tuple[bytes, str], RequestTimes | None] = {}
        if started:
            self.core.serving.start(self.now)
            for tokenizer in TOKENIZERS:
                self.core.tokenizer_done(tokenizer, 0, self.now)

    def flush(self) -> None:
        while outbox := self.core.take_outbox():
            for peer, identity, message in outbox:
                if peer is Peer.CLIENT and identity in self.unreachable:
                    self.core.client_gone(identity)
                    continue
                if peer is Peer.CLIENT and identity in self.full:
                    self.core.client_full(identity, message)
                    continue
                self.sent[peer].append((identity, message))
                if peer is Peer.CLIENT:
                    self._note(identity, message)

    def _note(self, identity: bytes, message: Any) -> None:
        if isinstance(message, bytes):
            message = decode(message, GatewayToClient)
        if isinstance(message, Outputs):
            for index, final in message.finals:
                request = (identity, message.request_ids[index])
                self.finals.setdefault(request, []).append(msgspec.structs.replace(final, times=None))
                self.times[request] = final.times

    def client(self, message: ClientMessage | bytes, identity: bytes = b"c") -> None:
        frame = message if isinstance(message, bytes) else encode(message)
        self.core.client_frames(identity, [frame], self.now)
        self.flush()

    def answers(self, kind: type, identity: bytes = b"c") -> list[Any]:
        return [message for to, message in self.sent[Peer.CLIENT] if to == identity and isinstance(message, kind)]

    def refusal(self) -> Refused:
        """The last thing that happened was a refusal."""
        _, message = self.sent[Peer.CLIENT][-1]
        assert isinstance(message, Refused), message
        return message

    def messages(self, peer: Peer, kind: type) -> list[Any]:
        return [message for _, message in self.sent[peer] if isinstance(message, kind)]

    def tokenized(self) -> list[tuple[bytes, Tokenize]]:
        return self.sent[Peer.TOKENIZER]

    def answer(self, tokenizer: bytes, done: TokenizeDone) -> None:
        """A tokenizer has answered a query."""
        self.core.tokenizer_done(tokenizer, done.key, self.now)
        self.core.answered(done, self.now)
        self.flush()

    def pass_on(self) -> list[Tokenize]:
        """The tokenizers answer all their queries and pass on all their requests, and the scheduler accepts these."""
        taken = []
        while self.sent[Peer.TOKENIZER]:
            tokenizer, message = self.sent[Peer.TOKENIZER].pop(0)
            if isinstance(message, TokenizerQuery):
                self.answer(tokenizer, answer_to(message))
                continue
            self.core.tokenizer_done(tokenizer, message.key, self.now)
            self.core.accepted([message.key])
            self.flush()
            taken.append(message)
        return taken

    def withdrawn(self, *keys: int) -> None:
        """The scheduler says that it does not have these."""
        self.core.withdrawn(keys, self.now)
        self.flush()

    def deliver(self, *requests: Tokenize, reason: Any = "length") -> None:
        """The detokenizer's final answers to some requests of one client."""
        outputs = Outputs(
            request_ids=[request.route.request_id for request in requests],
            texts=["x"] * len(requests),
            num_token_ids=bytes(4 * len(requests)),
            token_ids=b"",
            finals=[(index, FinalOutput(reason, 1, 1)) for index in range(len(requests))],
        )
        head = Delivery(clients=[requests[0].route.client], finished=[[request.key for request in requests]])
        self.core.delivery(head, [encode(outputs)], self.now)
        self.flush()

    def tick(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.core.tick(self.now)
        self.flush()
