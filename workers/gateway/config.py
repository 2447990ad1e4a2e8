"""Configuration of the gateway: [frontend], and what it is given at birth."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from ipc.channels import MAX_CLIENT_FRAME_BYTES
from ipc.scheduling_params import MAX_WAIT_S
from ipc.stats_page import StatsHandle
from workers.process import WorkerBootstrap
from workers.queueing.policies import PolicyConfig

UNCREDITED_ANSWERS: Final = 1_024  # of queries, probes and refusals that a client may leave unread


class FrontendConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The socket that clients connect to, and the limits on clients."""

    endpoint: (
        Annotated[
            str,
            Meta(
                description="Where the engine listens: `ipc:///path` or `tcp://host:port`. Not set: a socket in a "
                "private folder of this user, which `Client()` without an endpoint finds."
            ),
        ]
        | None
    ) = None
    max_connections: Annotated[
        int,
        Meta(
            ge=1,
            le=1_048_576,
            description="Open connections of all clients together. The engine closes further connections at once. It "
            "also closes a connection that would use a reserved file descriptor: the engine reserves 2,048, or half of "
            "`ulimit -n` if that is less. At start the engine raises `ulimit -n` to the hard limit.",
        ),
    ] = 4_096
    max_open_requests: Annotated[
        int,
        Meta(
            ge=1,
            le=16_777_216,
            description="Open requests of one client; a request with `n` samples counts `n` times. The engine refuses "
            "more at once, with a hint when to try again.",
        ),
    ] = 16_384
    max_queued_bytes: Annotated[
        int,
        Meta(
            ge=MAX_CLIENT_FRAME_BYTES,
            le=1 << 40,
            description="Memory of all requests that wait for a tokenizer, in bytes. A request counts its message and "
            "about 1.5 KB more (`PromptQueue.held_bytes`). The engine refuses more at once, with a hint when to try "
            "again. The default is 256 MiB; the least value is the size of the largest message, 16 MiB.",
        ),
    ] = 256 << 20
    slow_client_timeout_s: Annotated[
        float,
        Meta(
            gt=0,
            le=MAX_WAIT_S,
            description="How long a client may read nothing while outputs wait for it. Then the engine cancels the "
            "client's requests, and refuses new ones until the client reads again.",
        ),
    ] = 30.0
    drain_timeout_s: Annotated[
        float,
        Meta(
            gt=0,
            le=MAX_WAIT_S,
            description="How long a stopping engine waits for open requests. It then answers those that are left with "
            "an error.",
        ),
    ] = 30.0


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
