"""Configuration of the HTTP server: [http], its counters, and its bootstrap."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from ipc.channels import MAX_CLIENT_FRAME_BYTES
from ipc.scheduling_params import MAX_WAIT_S
from workers.bootstrap import WorkerBootstrap

HTTP_LISTENER: Final = "http listener"  # the descriptor that the launcher lends: the one listening socket
DEFAULT_PORT: Final = 8000
STATUS_CLASSES: Final = ("2xx", "4xx", "429", "499", "5xx", "503")  # 429, 499 and 503 are not in 4xx and 5xx

COUNTERS: Final = (
    "num_connections",  # open ones
    "num_connections_refused",  # closed at once because too many were open
    "num_header_timeouts",  # connections closed because a request's headers or body took too long
    "num_send_timeouts",  # connections closed because the client read nothing of its answer for too long
    "num_headers_too_large",
    "num_requests",  # requests whose headers have arrived
    "num_open_requests",
    "num_open_streams",
    "num_stream_events",  # server-sent events written
    "num_disconnects",  # clients that left before their answer was complete
    "num_unauthorized",
    *(f"num_responses_{each}" for each in STATUS_CLASSES),
)


class HttpConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The HTTP server for clients of OpenAI's and Anthropic's APIs. Without this section there is no server."""

    host: Annotated[
        str,
        Meta(description="Address to listen on: a name or an IP address. `0.0.0.0` and `::` are all of the machine."),
    ] = "127.0.0.1"
    port: (
        Annotated[
            int,
            Meta(
                ge=0,
                le=65_535,
                description="TCP port; 0 = a free one, which the log names. Not set: 8000, or a free one for an engine "
                "that `Pipeline` or `ringfeed demo` starts.",
            ),
        ]
        | None
    ) = None
    num_workers: Annotated[int, Meta(ge=1, le=64, description="Server processes. They share one listening socket.")] = 1
    served_model_names: Annotated[
        list[str],
        Meta(
            description="Names that requests may give as `model`; `/v1/models` lists them, and answers carry the first "
            "one. Empty: the model's folder name or hub id."
        ),
    ] = []
    api_key_file: (
        Annotated[
            str,
            Meta(
                description="A file with one key a line. With keys, requests below `/v1`, `/tokenize` and "
                "`/detokenize` need `Authorization: Bearer KEY` or `x-api-key: KEY`. Not set: no key is needed."
            ),
        ]
        | None
    ) = None
    tls_cert: Annotated[str, Meta(description="Certificate chain as a PEM file, for HTTPS.")] | None = None
    tls_key: Annotated[str, Meta(description="Private key of `tls_cert`, a PEM file.")] | None = None
    cors_origins: Annotated[
        list[str],
        Meta(
            description="Origins whose pages may send requests from a browser, such as `https://example.org`; `*` = "
            "every origin. Empty: none but the server's own page."
        ),
    ] = []
    max_body_bytes: Annotated[
        int,
        Meta(
            ge=1_024,
            le=MAX_CLIENT_FRAME_BYTES,
            description="Largest body of a request, in bytes. A larger one is refused with status 413.",
        ),
    ] = MAX_CLIENT_FRAME_BYTES
    max_body_values: Annotated[
        int,
        Meta(
            ge=1_024,
            le=MAX_CLIENT_FRAME_BYTES,
            description="Most values in the JSON of a body, such as token ids. More are refused with status 413: a "
            "server process does nothing else while it reads them, about 0.1 ms for 1,000 token ids.",
        ),
    ] = 524_288
    max_body_objects: Annotated[
        int,
        Meta(
            ge=1_024,
            le=MAX_CLIENT_FRAME_BYTES,
            description="Most texts, lists and objects in the JSON of a body; the names in an object are texts too. "
            "More are refused with status 413: they cost more time than numbers, about 1 ms for 1,000.",
        ),
    ] = 32_768
    max_connections: Annotated[
        int,
        Meta(
            ge=1,
            le=1_048_576,
            description="Open connections of one server process. It closes further ones at once.",
        ),
    ] = 4_096
    receive_timeout_s: Annotated[
        float,
        Meta(
            gt=0,
            le=MAX_WAIT_S,
            description="How long a client may take to send a request: its headers, then its body. The server closes a "
            "slower connection, one that sends no further request for this long, and one that reads nothing of its "
            "answer for this long.",
        ),
    ] = 30.0
    tool_parser: Annotated[
        str,
        Meta(
            description="How the model writes calls of tools: `auto` = found out from the model's files, `none`, or "
            "the name of a parser."
        ),
    ] = "auto"
    reasoning_parser: Annotated[
        str,
        Meta(
            description="How the model writes its reasoning: `auto` = found out from the model's files, `none`, or "
            "the name of a parser."
        ),
    ] = "auto"


class HttpBootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """What a server process is given. It holds the listening socket as `worker.kept[HTTP_LISTENER]`."""

    worker: WorkerBootstrap
    http: HttpConfig
    endpoint: str  # of the engine, for its client
    model_name: str
    model_folder: str
    chat_template: str | None  # a file that replaces the model's own templates
    max_model_len: int
    policy: str  # of the scheduler
    drain_timeout_s: float
