"""Configuration of the gateway: [frontend], and what it is given at birth."""

from __future__ import annotations

from typing import Final

import msgspec

from ipc.stats_page import StatsHandle
from workers.process import WorkerBootstrap
from workers.queueing.policies import PolicyConfig

UNCREDITED_ANSWERS: Final = 1_024  # of queries, probes and refusals that a client may leave unread


class FrontendConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[frontend]: the socket that clients connect to.

    Args:
        endpoint: where to listen: "ipc:///path" or "tcp://host:port"; None = this user's own ipc socket, which is
            also where a client without an endpoint looks.
        max_connections: of all clients together. Further connections are closed at once, and so are connections that
            would leave the process too few descriptors (`ulimit -n`).
        max_open_requests: of one client; more are refused at once. One of n samples counts n times.
        max_queued_bytes: of memory for requests, of all clients together, that wait for a tokenizer: their frames and
            1,408 bytes and more for each (`PromptQueue.held_bytes`); more are refused at once.
        slow_client_timeout_s: a client that takes in nothing for so long, though there is news for it, has its requests
            cancelled, and new ones refused until it does take something in.
        drain_timeout_s: how long a draining engine waits for open requests.
    """

    endpoint: str | None = None
    max_connections: int = 4_096
    max_open_requests: int = 16_384
    max_queued_bytes: int = 256 << 20
    slow_client_timeout_s: float = 30.0
    drain_timeout_s: float = 30.0


class GatewayBootstrap(msgspec.Struct, frozen=True, kw_only=True):
    worker: WorkerBootstrap
    frontend: FrontendConfig
    endpoint: str  # where to listen, resolved
    endpoint_folder: str | None  # of the endpoint, if it is to go with it once it is empty; None: it is the user's own
    run_dir: str  # the engine's private folder; removed here if the launcher dies before it could
    model_name: str
    max_model_len: int
    policy: PolicyConfig
    tokenizer_window: int  # Tokenize messages under way to one tokenizer
    tokenizer_window_bytes: int  # bytes of these; the prompt that reaches the bound is the last one
    client_window: int  # Outputs messages under way to one client
    tokenize_endpoint: str  # ROUTER, bound here: tokenizers connect under their role
    deliver_endpoint: str  # ROUTER, bound here: the detokenizer connects
    schedule_endpoint: str  # connected here under `identity`
    detokenize_endpoint: str
    identity: bytes
    stats: list[StatsHandle]  # of every worker, for `stats()`


def send_mark(bootstrap: GatewayBootstrap) -> int:
    """How many messages may be queued to one client that is slow to read.

    All that a client within its rights can be sent unread: one answer or refusal for every request that it may have
    open, the outputs that it has credit for, and some that need no credit. So it bounds only what a client that never
    reads costs; outputs, the only large messages, are bounded by credit besides.
    """
    return bootstrap.frontend.max_open_requests + bootstrap.client_window + UNCREDITED_ANSWERS
