"""Configuration of the gateway: [frontend], its counters, and its bootstrap."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from ipc.channels import MAX_CLIENT_FRAME_BYTES
from ipc.scheduling_params import MAX_WAIT_S
from workers.bootstrap import WorkerBootstrap
from workers.queueing.config import PolicyConfig

COUNTERS: Final = (
    "num_open", "num_received", "num_refused", "num_finished", "num_cancelled", "num_clients",
    # Like the scheduler's counters, for requests that have not reached it: requests that wait for a tokenizer, requests
    # refused because a queue was full, and requests that ran out of time.
    "num_waiting", "num_queue_full", "num_deadline", "num_queue_timeout",
    "num_connections", "num_connections_refused", "num_kept_bytes",
)  # fmt: skip
MAX_UNREAD_ANSWERS: Final = 1_024  # answers that need no credit: to queries, probes, refusals


class FrontendConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The socket that clients connect to, and the limits on clients."""

    endpoint: (
        Annotated[
            str,
            Meta(
                description="Where the engine listens: `ipc:///path` or `tcp://host:port`. A TCP address that other "
                "machines can reach needs `server_key_file` and `client_keys_folder`. Not set: a socket in a private "
                "folder of this user, which `Client()` without an endpoint finds."
            ),
        ]
        | None
    ) = None
    server_key_file: (
        Annotated[
            str,
            Meta(
                description="The engine's key pair (ZeroMQ CURVE): `server.key_secret` of `ringfeed keys`, with mode "
                "0600. Connections to a TCP endpoint are then encrypted, and only clients of `client_keys_folder` can "
                "connect."
            ),
        ]
        | None
    ) = None
    client_keys_folder: (
        Annotated[
            str,
            Meta(
                description="The folder with the public keys of the clients that may connect, one file `NAME.key` "
                "each: `clients` of `ringfeed keys`. The engine sees added, changed and removed files within a second; "
                "it disconnects a client whose key is removed when the client next sends a message."
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
    max_connections_per_address: Annotated[
        int,
        Meta(
            ge=1,
            le=1_048_576,
            description="Open TCP connections from one IP address. The engine closes further connections at once. "
            "Loopback addresses are exempt.",
        ),
    ] = 256
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
            "about 1.5 KB more (`PromptDispatcher.held_bytes`). The engine refuses more at once, with a hint when to "
            "try again. The default is 256 MiB; the least value is the size of the largest message, 16 MiB.",
        ),
    ] = 256 << 20
    max_kept_bytes: Annotated[
        int,
        Meta(
            ge=0,
            le=1 << 40,
            description="Memory for values that clients keep in the engine (`Client.keep`), in bytes; the HTTP server "
            "keeps its stored responses there. The engine forgets the values that were not used for longest. The "
            "default is 64 MiB. 0: the engine keeps none.",
        ),
    ] = 64 << 20
    slow_client_timeout_s: Annotated[
        float,
        Meta(
            gt=0,
            le=MAX_WAIT_S,
            description="How long a client may leave a full window of outputs unacknowledged. Then the engine cancels "
            "the client's requests, and refuses new ones until the client reads again.",
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
    """Sockets: binds `tokenize` and `deliver`; connects to `schedule` and `detokenize`. Clients: see `endpoint`."""

    worker: WorkerBootstrap
    frontend: FrontendConfig
    endpoint: str  # where to listen, resolved
    local_endpoint: str  # a Unix socket where to listen as well, without keys; equal to `endpoint` if that is one
    endpoint_folder: str | None  # the local endpoint's folder, removed when empty; None: it belongs to the user
    model_name: str
    model_folder: str = ""
    chat_template: str | None = None
    served_model_names: list[str] = []  # these three are of the HTTP server, for clients that do its work
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    max_model_len: int
    policy: PolicyConfig
    tokenizer_window: int  # Tokenize messages under way to one tokenizer
    tokenizer_window_bytes: int  # bytes of their frames; the prompt that reaches the bound is the last one
    client_window: int  # Outputs messages under way to one client


HEALTH_FIELDS: Final = (  # of GatewayBootstrap; `Health` has them under the same names
    "model_folder", "chat_template", "served_model_names", "tool_parser", "reasoning_parser", "max_model_len",
)  # fmt: skip


def max_unread_messages(bootstrap: GatewayBootstrap) -> int:
    """How many messages libzmq may queue to one client.

    A client that keeps to flow control never reaches this bound. It allows one answer or refusal for every request that
    the client may have open, a full window of outputs, and some answers that need no credit. So it only limits the cost
    of a client that never reads. Flow control bounds large messages as well: outputs, and answers with a receipt.
    """
    return bootstrap.frontend.max_open_requests + bootstrap.client_window + MAX_UNREAD_ANSWERS
