"""Configuration of the gateway: [frontend], its counters, and its bootstrap."""

from __future__ import annotations

from typing import Final

import msgspec

from workers.bootstrap import WorkerBootstrap
from workers.queueing.policies import PolicyConfig

UNCREDITED_ANSWERS: Final = 1_024  # of queries, probes and refusals that a client may leave unread
COUNTERS: Final = (
    "num_open", "num_received", "num_refused", "num_finished", "num_cancelled", "num_clients",
    # Like the scheduler's counters, for requests that have not reached it: requests that wait for a tokenizer, requests
    # refused because a queue was full, and requests that ran out of time.
    "num_waiting", "num_queue_full", "num_deadline", "num_queue_timeout",
    "num_connections", "num_connections_refused",
)  # fmt: skip


class FrontendConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[frontend]: the socket that clients connect to.

    Args:
        endpoint: where to listen: "ipc:///path" or "tcp://host:port"; None = this user's own ipc socket, which is
            also where a client without an endpoint looks.
        max_connections: of all clients together. The gateway closes further connections at once, and also connections
            that would leave the process too few descriptors (`ulimit -n`).
        max_open_requests: of one client; the gateway refuses more. A request with n samples counts n times.
        max_queued_bytes: memory of all clients' requests that wait for a tokenizer: their frames, and at least 1,408
            bytes for each (`PromptQueue.held_bytes`); the gateway refuses more.
        slow_client_timeout_s: if a client reads nothing for this long although there are messages for it, the gateway
            cancels its requests, and refuses new ones until the client reads again.
        drain_timeout_s: how long a draining engine waits for open requests.
    """

    endpoint: str | None = None
    max_connections: int = 4_096
    max_open_requests: int = 16_384
    max_queued_bytes: int = 256 << 20
    slow_client_timeout_s: float = 30.0
    drain_timeout_s: float = 30.0


class GatewayBootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """Sockets: binds `tokenize` and `deliver`; connects to `schedule` and `detokenize`."""

    worker: WorkerBootstrap
    frontend: FrontendConfig
    endpoint: str  # where to listen, resolved
    endpoint_folder: str | None  # the endpoint's folder, if the gateway removes it at the end; None: it is the user's
    run_dir: str  # the engine's private folder; the gateway removes it if the launcher dies without doing so
    model_name: str
    max_model_len: int
    policy: PolicyConfig
    tokenizer_window: int  # Tokenize messages under way to one tokenizer
    tokenizer_window_bytes: int  # bytes of these; the prompt that reaches the bound is the last one
    client_window: int  # Outputs messages under way to one client


def send_mark(bootstrap: GatewayBootstrap) -> int:
    """How many messages may be queued to one client that is slow to read.

    A client that keeps to the protocol never reaches it. Such a client may leave unread one answer or refusal for each
    request that it may have open, the outputs that it has credit for, and some answers that need no credit. So the
    mark bounds only the cost of a client that never reads. Credit also bounds outputs, the only large messages.
    """
    return bootstrap.frontend.max_open_requests + bootstrap.client_window + UNCREDITED_ANSWERS
