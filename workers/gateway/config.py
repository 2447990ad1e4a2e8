"""Configuration of the gateway: [frontend], its counters, and its bootstrap."""

from __future__ import annotations

from typing import Final

import msgspec

from workers.bootstrap import WorkerBootstrap
from workers.queueing.policies import PolicyConfig

COUNTERS: Final = (
    "num_open", "num_received", "num_refused", "num_finished", "num_cancelled", "num_clients",
    # Like the scheduler's counters, for requests that have not reached it: requests that wait for a tokenizer, requests
    # refused because a queue was full, and requests that ran out of time.
    "num_waiting", "num_queue_full", "num_deadline", "num_queue_timeout",
    "num_connections", "num_connections_refused",
)  # fmt: skip
MAX_UNREAD_ANSWERS: Final = 1_024  # answers that need no credit: to queries, probes, refusals


class FrontendConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[frontend]: the socket that clients connect to.

    Args:
        endpoint: where to listen: "ipc:///path" or "tcp://host:port"; None = this user's own ipc socket, to which a
            client without an endpoint connects.
        max_connections: connections of all clients together. The gateway closes further connections at once, and also
            connections that would leave the process too few descriptors (`ulimit -n`).
        max_open_requests: open requests of one client; the gateway refuses more. A request of n samples counts n times.
        max_queued_bytes: memory of the requests of all clients that wait for a tokenizer: their frames, and at least
            1,408 bytes each (`PromptDispatcher.held_bytes`). The gateway refuses requests that would exceed it.
        slow_client_timeout_s: if a client acknowledges no output for this long while output waits for it, the gateway
            cancels its requests, and refuses new ones until the client acknowledges something.
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
    endpoint_folder: str | None  # the endpoint's folder, removed when empty; None: it belongs to the user
    run_dir: str  # the engine's private folder; the gateway removes it if the launcher dies
    model_name: str
    max_model_len: int
    policy: PolicyConfig
    tokenizer_window: int  # Tokenize messages under way to one tokenizer
    tokenizer_window_bytes: int  # bytes of their frames; the prompt that reaches the bound is the last one
    client_window: int  # Outputs messages under way to one client


def max_unread_messages(bootstrap: GatewayBootstrap) -> int:
    """How many messages libzmq may queue to one client.

    A client that keeps to flow control never reaches this bound. It allows one answer or refusal for every request that
    the client may have open, a full window of outputs, and some answers that need no credit. So it only limits the cost
    of a client that never reads. Outputs are the only large messages, and flow control bounds them as well.
    """
    return bootstrap.frontend.max_open_requests + bootstrap.client_window + MAX_UNREAD_ANSWERS
