"""Every message of ringfeed, by the sockets it travels on.

    client  --DEALER-->  gateway   (ROUTER `frontend`)
    gateway <--ROUTER-- tokenizer  (DEALER to `tokenize`)
    tokenizer, gateway, detokenizer  --DEALER-->  scheduler  (ROUTER `schedule`)
    scheduler, gateway  --DEALER-->  detokenizer  (ROUTER `detokenize`)
    detokenizer  --DEALER-->  gateway  (ROUTER `deliver`)
    every worker  --DEALER-->  launcher  (ROUTER `control`)

A request is known to a client by its own `request_id` and inside the engine by `key`, an integer that the gateway draws
once and never again, in order of arrival. Each of its n samples is a sequence with its own key: sample i has `key + i`,
and no other request uses these keys. A request's messages follow one path (gateway, tokenizer, scheduler, detokenizer,
gateway), so no process receives messages about a key from two others in an unknown order. Arrays travel as raw
little-endian bytes, named with their dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import DEFAULT_SCHEDULING, SchedulingParams

PROTOCOL_VERSION = 2
MAX_REQUEST_ID_CHARS = 256  # a longer one is not told back: its refusal would name no request
EOS_TOKEN_ID = "eos_token_id"  # in Ready.info
PROMPT_TAIL_TOKENS = 16  # the prompt's last tokens that a text decoder needs to continue its text
MAX_CANCELLED_KEYS = 8_192  # in one CancelRequests; a receiver refuses lists of more than `codec.MAX_ITEMS`

FinishReason = Literal["stop", "length", "cancelled", "error", "deadline", "queue_timeout"]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Base of all messages; on the wire a map whose `type` is the class name."""


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a chat."""

    role: str
    content: str


# ---- client -> gateway


class Generate(Message, frozen=True):
    """Ask for a completion of exactly one of `prompt`, `chat` and `token_ids` (int32 bytes)."""

    request_id: str
    params: SamplingParams
    prompt: str | None = None
    chat: list[ChatMessage] | None = None
    token_ids: bytes | None = None
    stream: bool = False  # False: nothing is sent before the end
    cache_salt: str = ""  # only requests of the same salt share cached prompt blocks
    scheduling: SchedulingParams = DEFAULT_SCHEDULING


class Cancel(Message, frozen=True):
    """End one of the client's own requests; it is answered with finish reason `cancelled`. Unknown ids are ignored."""

    request_id: str


class Delivered(Message, frozen=True):
    """Credit: the client has taken in this many `Outputs` messages. One that never says so is dropped in the end."""

    count: int


class Query(Message, frozen=True):
    """Ask for `Health` or `Stats`; the answer carries the same `query_id`."""

    query_id: int
    what: Literal["health", "stats"]


class ClearCache(Message, frozen=True):
    """client -> gateway -> scheduler: forget all cached blocks. Requests sent after its `CacheCleared` find none."""

    query_id: int


ClientMessage = Generate | Cancel | Delivered | Query | ClearCache


# ---- gateway -> client


class TokenLogprobs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Log-probabilities of consecutive sampled tokens of one request, n of them, each with `num_top` alternatives."""

    num_top: int
    logprobs: bytes  # float32 [n]
    top_ids: bytes  # int32 [n, num_top], likeliest first
    top_logprobs: bytes  # float32 [n, num_top]


class FinalOutput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The end of a sample. With `num_open` 0 it is the final answer, and ends whatever is open of the request."""

    finish_reason: FinishReason
    num_prompt_tokens: int  # 0 for a text that was never tokenized
    num_completion_tokens: int  # of the sample
    error_code: str = ""
    error_message: str = ""
    num_cached_tokens: int = 0  # of the prompt: found in the cache when sample 0 was admitted
    num_open: int = 0  # samples of the request that have not ended
    retry_after_s: float = 0.0  # of a full queue: when to try again


class Outputs(Message, frozen=True):
    """News of several samples of one client's requests, in columns. Costs one credit."""

    request_ids: list[str]  # n, of the samples' requests
    texts: list[str]  # n; new text of each
    num_token_ids: bytes  # int32 [n]
    token_ids: bytes  # int32 [sum of num_token_ids]
    finals: list[tuple[int, FinalOutput]] = []  # (index into request_ids, its end)
    logprobs: list[tuple[int, TokenLogprobs]] = []  # (index into request_ids, of its new tokens)
    samples: bytes = b""  # int32 [n], index of each among its request's; empty: all are sample 0


class Refused(Message, frozen=True):
    """A message of the client's that was not taken. `request_id` is empty where none could be read."""

    request_id: str
    error_code: str
    error_message: str
    retry_after_s: float = 0.0  # of a full queue: when to try again


class Health(Message, frozen=True):
    query_id: int
    state: Literal["starting", "ready", "draining", "failed"]
    detail: str  # what a starting engine is at, or why a failed one failed
    protocol_version: int
    model: str
    max_model_len: int
    max_open_requests: int  # of one client: more are refused at once


class Stats(Message, frozen=True):
    """Counters and gauges of every process by role: {"scheduler": {"num_steps": 12, ...}, "tokenizer.0": {...}}."""

    query_id: int
    roles: dict[str, dict[str, float]]


class CacheCleared(Message, frozen=True):
    """scheduler -> gateway -> client: answers `ClearCache`."""

    query_id: int


class Alive(Message, frozen=True):
    """Asks for no answer: a client that cannot be reached with it has gone, and its requests are cancelled."""


GatewayToClient = Outputs | Refused | Health | Stats | CacheCleared | Alive


# ---- a request inside the engine


class Route(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a request's text goes: carried along its whole path, read by the detokenizer and the gateway."""

    client: bytes  # the gateway's own name for one stay of a client; opaque to all others
    request_id: str
    stream: bool


class Tokenize(Message, frozen=True):
    """gateway -> tokenizer. The seed in `params` is set."""

    key: int
    route: Route
    params: SamplingParams
    arrived_ns: int  # at the gateway, CLOCK_MONOTONIC: queue time-outs and aging count from then
    prompt: str | None = None
    chat: list[ChatMessage] | None = None
    token_ids: bytes | None = None
    cache_salt: str = ""
    scheduling: SchedulingParams = DEFAULT_SCHEDULING
    deadline_ns: int = 0  # by the same clock; 0 = none


class Tokenized(Message, frozen=True):
    """tokenizer -> scheduler: the ids, of all samples, lie in consecutive records of the prompt ring.

    `error_code` set: they do not.
    """

    key: int
    route: Route
    params: SamplingParams
    arrived_ns: int
    ring: int = 0
    ticket: int = 0  # of the first record
    num_prompt_tokens: int = 0
    block_hashes: bytes = b""  # `ipc.block_hash.chain_hashes` of the prompt; empty: it is not cached
    scheduling: SchedulingParams = DEFAULT_SCHEDULING
    deadline_ns: int = 0
    error_code: str = ""
    error_message: str = ""


class TokenizeDone(Message, frozen=True):
    """tokenizer -> gateway: credit for one `Tokenize`; its `Tokenized` has been sent. Key 0: I am connected."""

    key: int


class Accepted(Message, frozen=True):
    """scheduler -> gateway: these requests have arrived, and from now on a `CancelRequests` finds them."""

    keys: list[int]


class CancelRequests(Message, frozen=True):
    """gateway -> scheduler (the client gave up) or detokenizer -> scheduler (a stop string was found).

    Keys that are unknown have ended already and are ignored. Made by `cancel_requests`, which bounds it.
    """

    keys: list[int]


class Withdraw(Message, frozen=True):
    """gateway -> scheduler: drop these requests when they arrive, and tell the detokenizer nothing.

    The scheduler answers with `Withdrawn`. It ignores keys of requests that have arrived and are open.
    """

    keys: list[int]


class Withdrawn(Message, frozen=True):
    """scheduler -> gateway: these requests are not open and never will be. No `Accepted` for them follows.

    If `Accepted` for a key came earlier, that request has already ended. The gateway then sends `CancelRequests`, and
    the scheduler stops expecting the request.
    """

    keys: list[int]


def cancel_requests(keys: Sequence[int]) -> Iterator[CancelRequests]:
    """As many messages as it takes to cancel `keys`, in their order; none for none."""
    for start in range(0, len(keys), MAX_CANCELLED_KEYS):
        yield CancelRequests(keys=list(keys[start : start + MAX_CANCELLED_KEYS]))


class Opened(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the detokenizer must know of a request before its first token."""

    key: int
    route: Route
    stop: list[str]
    num_prompt_tokens: int
    num_logprobs: int | None  # SamplingParams.logprobs
    num_samples: int = 1  # a request that is refused has one, which is ended
    prompt_tail: bytes = b""  # int32, the prompt's last ids, at most PROMPT_TAIL_TOKENS; empty if it was refused


class Ended(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The end of a request that no token of this step brought about: cancelled, out of time, refused, or failed."""

    key: int
    finish_reason: FinishReason
    error_code: str = ""
    error_message: str = ""
    retry_after_s: float = 0.0


class StepLogprobs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For the tokens of one StepOutputs, in its order; rows of tokens that want none are undefined."""

    num_top: int
    logprobs: bytes  # float32 [n]
    top_ids: bytes  # int32 [n, num_top]
    top_logprobs: bytes  # float32 [n, num_top]


class StepOutputs(Message, frozen=True):
    """scheduler -> detokenizer: one message per step. `opened` comes before `tokens` comes before `ended`."""

    opened: list[Opened] = []
    cached: list[tuple[int, int]] = []  # (key, prompt tokens found in the cache), of requests admitted with some
    keys: bytes = b""  # int64 [n]
    token_ids: bytes = b""  # int32 [n]
    finish: bytes = b""  # uint8 [n], FinishCode
    logprobs: StepLogprobs | None = None
    ended: list[Ended] = []


class Delivery(Message, frozen=True):
    """detokenizer -> gateway: head of a multipart message; frame i + 1 is an encoded `Outputs` for `clients[i]`."""

    clients: list[bytes]
    finished: list[list[int]]  # per client: keys whose final answer is in its frame


class ClientCredit(Message, frozen=True):
    """gateway -> detokenizer: this client has taken in `count` more `Outputs`."""

    client: bytes
    count: int


class ClientGone(Message, frozen=True):
    """gateway -> detokenizer: forget what is undelivered to this client; its requests are being cancelled."""

    client: bytes


ToScheduler = Tokenized | CancelRequests | Withdraw | ClearCache
SchedulerToGateway = Accepted | Withdrawn | CacheCleared
ToDetokenizer = StepOutputs | ClientCredit | ClientGone


# ---- lifecycle: worker -> launcher, launcher -> worker


class Progress(Message, frozen=True):
    """How far a worker's start-up is; `fraction` in [0, 1], of `total_bytes` where the stage counts bytes (else 0)."""

    role: str
    stage: str
    fraction: float
    total_bytes: int = 0


class Ready(Message, frozen=True):
    """A worker can take work; the gateway says so again once it takes requests, after `Start`.

    `info` holds what others need of it (the GPU process: num_blocks; a tokenizer: EOS_TOKEN_ID, if it has one).
    """

    role: str
    info: dict[str, int] = {}


class Failed(Message, frozen=True):
    """A worker cannot go on; it exits after this."""

    role: str
    error_code: str
    error_message: str


class Drained(Message, frozen=True):
    """The gateway has no open request left and has told its clients everything."""


class Start(Message, frozen=True):
    """Everything upstream is ready. `info` of all workers, merged."""

    info: dict[str, int] = {}


class Drain(Message, frozen=True):
    """Take no new requests, finish the open ones, say `Drained`."""


class Abort(Message, frozen=True):
    """Answer every open request with an error now, say `Drained`."""

    error_message: str


class Stop(Message, frozen=True):
    """Exit now, with status 0."""


WorkerToLauncher = Progress | Ready | Failed | Drained
LauncherToWorker = Start | Drain | Abort | Stop
