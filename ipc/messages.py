"""Every message of ringfeed. One file, so that the protocol can be read from top to bottom.

A request crosses the processes in this order:

    client --Generate--> gateway --Tokenize--> tokenizer --Tokenized--> scheduler <=== rings ===> GPU process
                                                                            |
    client <--Outputs--- gateway <--Delivery-- detokenizer <--StepOutputs---+

If the request has structured outputs, the scheduler first has their grammar compiled:

    scheduler --Compile--> grammar process --Compiled--> scheduler === mask requests ===> grammar process
                                                                                               |
                                                                 GPU process <=== masks =======+

A client may also ask for token ids or text only. The scheduler does not see these queries:

    client --TokenizeQuery, DetokenizeQuery--> gateway --TokenizerQuery--> tokenizer
    client <--PromptTokens, DetokenizedText--- gateway <--TokenizeDone---- tokenizer

Each socket pair is one ROUTER and the DEALERs that connect to it. Messages travel in both directions:

    ROUTER      bound by     connected by                      to the ROUTER                    from the ROUTER
    frontend    gateway      clients                           ClientMessage                    GatewayToClient
    tokenize    gateway      tokenizers                        TokenizeDone                     GatewayToTokenizer
    schedule    scheduler    tokenizers, gateway, detokenizer  ToScheduler                      SchedulerToGateway
                             grammar processes                 ToScheduler                      SchedulerToGrammar
    detokenize  detokenizer  scheduler, gateway                ToDetokenizer                    -
    deliver     gateway      detokenizer                       Delivery, then Outputs frames    -
    control     launcher     every worker                      WorkerToLauncher                 LauncherToWorker

Names. The client draws `request_id`. The gateway draws `key`, an integer, in order of arrival and never twice. A
request with n samples owns the keys `key` to `key + n - 1`: sample i is the sequence `key + i`.

Order. Messages from one process to another arrive in the order in which they were sent. Messages about one key that
come from different processes can arrive in any order:

- At the scheduler, the gateway's `Withdraw` can arrive before or after the tokenizer's `Tokenized`. `Withdrawn` or
  `Accepted` tells the gateway which one was first.
- At the scheduler, a `CancelRequests` can arrive after the request has ended. The scheduler ignores unknown keys.
- At the gateway, a `Delivery` that ends a request can arrive before its `Accepted`. The gateway ignores the latter.
- At the detokenizer, `ClientGone` can arrive before a request of that client is opened. The gateway receives the
  `Delivery` for the unknown client and sends `ClientGone` again.
- At the scheduler, `Compiled` and `MatcherFailed` can arrive after the request has ended. The scheduler ignores them.
- At a grammar process, `ReleaseMatchers` can arrive before a request for masks of the same sequence, which the
  scheduler wrote earlier. The grammar process then answers with a closed mask, which no process uses.

Arrays travel as raw little-endian bytes; comments give their dtype and shape. A list or map has at most
`codec.MAX_ITEMS` items, and the receiver refuses a message with more. The frame bounds bytes and text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Final, Literal, TypeVar

import msgspec

from ipc.chat import EncodedChat
from ipc.codec import MAX_ITEMS, BoundedList
from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import DEFAULT_SCHEDULING, SchedulingParams
from ipc.structured_outputs import StructuredOutputs

PROTOCOL_VERSION = 5
MAX_REQUEST_ID_CHARS = 256  # a Refused cannot repeat a longer one, so it would name no request
EOS_TOKEN_ID = "eos_token_id"  # a key of Ready.info
PROMPT_TAIL_TOKENS = 16  # the prompt's last tokens, which a text decoder needs to continue the text
MAX_KEPT_KEY_CHARS = 256  # of the name of a kept value
MAX_NAMES = 1_024  # in one map: roles of an engine, statistics of a role, facts of a worker

FinishReason = Literal["stop", "length", "cancelled", "error", "deadline", "queue_timeout"]

V = TypeVar("V")
NameMap = Annotated[dict[str, V], msgspec.Meta(max_length=MAX_NAMES)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Base of all messages; on the wire a map whose `type` is the class name."""


# ---- client -> gateway


class ResumedSample(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What a client has received of one sample."""

    token_ids: bytes = b""  # int32 [n]
    num_chars: int = 0  # of text, in code points
    has_ended: bool = False  # its end has arrived too: it is not run again

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) // 4


class Resume(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What a client has received of a request that was interrupted. The engine goes on from there.

    The tokens count as generated ones: in usage, in penalties and in the lengths. Nothing of them is delivered again.
    """

    samples: BoundedList[ResumedSample]  # [params.n]
    num_suspected: int = 0  # deaths of a process that this request may have caused, as `Interrupted` said


def open_samples(num_samples: int, resume: Resume | None) -> dict[int, int]:
    """The samples of a request that have not ended, each with the number of tokens that its client has received.

    These are all `num_samples` samples of a new request, without tokens.
    """
    if resume is None:
        return dict.fromkeys(range(num_samples), 0)
    return {i: sample.num_tokens for i, sample in enumerate(resume.samples) if not sample.has_ended}


class Generate(Message, frozen=True):
    """client -> gateway, for each request: generate from exactly one of `prompt`, `chat` and `token_ids`.

    The gateway queues the request and later answers with `Outputs`, or answers `Refused` at once.
    """

    request_id: str  # of the client's choice; no other open request of this client may have it
    params: SamplingParams
    prompt: str | None = None
    chat: EncodedChat | None = None
    token_ids: bytes | None = None  # int32 [num_prompt_tokens]
    stream: bool = False  # False: the client receives nothing before the request ends
    cache_salt: str = ""  # only requests with the same salt share cached prompt blocks
    scheduling: SchedulingParams = DEFAULT_SCHEDULING
    clock_s: float | None = None  # Unix time of the first attempt: the present time of chat templates; None = now
    resume: Resume | None = None  # None: a first attempt


class Cancel(Message, frozen=True):
    """client -> gateway, when the caller abandons a request: end it.

    The gateway ends the request with finish reason `cancelled`. It ignores ids that this client has not open.
    """

    request_id: str


class Delivered(Message, frozen=True):
    """client -> gateway, after the client has read `count` messages of type `Outputs`: credit for as many more.

    The gateway passes the credit on to the detokenizer. It drops a client that gives no credit for
    `frontend.slow_client_timeout_s` while outputs wait.
    """

    count: int


class Query(Message, frozen=True):
    """client -> gateway, at any time: ask for `Health` or `Stats`. The answer carries the same `query_id`."""

    query_id: int
    what: Literal["health", "stats"]
    arrays: BoundedList[str] = []  # names of the arrays that `Stats` shall have; the gateway ignores unknown names


class ClearCache(Message, frozen=True):
    """client -> gateway -> scheduler, at any time: forget all cached blocks.

    The scheduler answers `CacheCleared`. A request that is sent after that answer finds no block from before.
    """

    query_id: int  # towards the scheduler, a number that the gateway draws


class TokenizeQuery(Message, frozen=True):
    """client -> gateway, at any time: the token ids of exactly one of `prompt`, `chat` and `token_ids`.

    To the gateway it is a request like `Generate`: it counts as an open request, waits for a tokenizer, and `Cancel`
    ends it. The answer is `PromptTokens`, or the error of a final answer in `Outputs`.
    """

    request_id: str  # as of Generate
    prompt: str | None = None
    chat: EncodedChat | None = None
    token_ids: bytes | None = None  # int32 [num_prompt_tokens]
    add_special_tokens: bool = True  # of a prompt; a chat's template writes its special tokens itself
    scheduling: SchedulingParams = DEFAULT_SCHEDULING


class DetokenizeQuery(Message, frozen=True):
    """client -> gateway, at any time: the text of these tokens. Like `TokenizeQuery`, answered by `DetokenizedText`."""

    request_id: str  # as of Generate
    token_ids: bytes  # int32 [n]
    skip_special_tokens: bool = False
    scheduling: SchedulingParams = DEFAULT_SCHEDULING


class Keep(Message, frozen=True):
    """client -> gateway, at any time: keep a value for any client. The answer is `KeptValue`, or `Refused`.

    The gateway forgets the values that were not used for longest, within `frontend.max_kept_bytes`.
    """

    request_id: str  # of the client's choice, for the answer; no other open request of this client may have it
    key: str  # 1 to MAX_KEPT_KEY_CHARS characters; replaces an earlier value
    value: bytes


class Recall(Message, frozen=True):
    """client -> gateway, at any time: read a kept value, or forget it. The answer is `KeptValue`, or `Refused`."""

    request_id: str  # as of Keep
    key: str
    forget: bool = False  # True: the gateway forgets the value and does not send it


class Received(Message, frozen=True):
    """client -> gateway, after the client has read answers with a receipt: the gateway may send it more of these.

    Only the answer itself names the receipt, so the gateway knows that the answer waits in no queue any more.
    """

    receipts: BoundedList[int]


ClientMessage = (
    Generate | Cancel | Delivered | Query | ClearCache | TokenizeQuery | DetokenizeQuery | Keep | Recall | Received
)
ClientRequest = Generate | TokenizeQuery | DetokenizeQuery  # those that wait for a tokenizer


# ---- gateway -> client


class TokenLogprobs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Log-probabilities of n consecutive sampled tokens of one sample, each with `num_top` alternatives."""

    num_top: int
    logprobs: bytes  # float32 [n]
    top_ids: bytes  # int32 [n, num_top], likeliest first
    top_logprobs: bytes  # float32 [n, num_top]
    extra_ids: bytes = b""  # int32 [num_extra], SamplingParams.logprob_token_ids
    extra_logprobs: bytes = b""  # float32 [n, num_extra]


class TokenBytes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bytes of m distinct tokens. The text of a special token is its name, in UTF-8."""

    token_ids: bytes  # int32 [m]
    lengths: bytes  # int32 [m], in bytes
    data: bytes  # of all tokens, one after the other


class PromptLogprobs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Log-probabilities of n consecutive tokens of a prompt. A prompt's first token has none."""

    token_ids: bytes  # int32 [n]
    columns: TokenLogprobs  # of these tokens


class RequestTimes(msgspec.Struct, frozen=True, array_like=True):
    """When one sample of a request passed each stage, in nanoseconds of the engine machine's CLOCK_MONOTONIC.

    Only differences between these times have a meaning on another machine.

    Args:
        arrived_ns: the gateway received the request.
        tokenized_ns: a tokenizer finished encoding the prompt; None if the request ended before.
        admitted_ns: the scheduler first admitted the sample; None if the sample ended in the queue. A preempted sample
            keeps this time when it resumes.
        first_token_ns: the sample's first token reached the detokenizer; None if it has no token.
        last_token_ns: the same of its last token.
    """

    arrived_ns: int
    tokenized_ns: int | None = None
    admitted_ns: int | None = None
    first_token_ns: int | None = None
    last_token_ns: int | None = None


class FinalOutput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The end of a sample. With `num_open` 0 it is the request's final answer and ends samples that are still open."""

    finish_reason: FinishReason
    num_prompt_tokens: int  # 0 for a text that was never tokenized
    num_completion_tokens: int  # of the sample
    error_code: str = ""
    error_message: str = ""
    num_cached_tokens: int = 0  # prompt tokens found in the cache when the first running sample was admitted
    num_open: int = 0  # samples of the request that have not ended
    retry_after_s: float = 0.0  # of a full queue: when to try again
    times: RequestTimes | None = None  # of the sample; None with an error that the gateway reports
    stop_string: str = ""  # the one of SamplingParams.stop that ended the text; "" = none did
    suspected: bool = False  # with `Interrupted`: the request may have ended the process that died (`Resume`)


class Outputs(Message, frozen=True):
    """gateway -> client, when samples have new tokens or end: columns with one item per sample. Costs one credit.

    The detokenizer writes the frame, and the gateway passes it on unread; the gateway writes it itself for requests
    that the detokenizer does not know. The client adds each item to its request and answers `Delivered`.
    """

    request_ids: BoundedList[str]  # [n], the requests that the samples belong to
    texts: BoundedList[str]  # [n], new text of each sample
    num_token_ids: bytes  # int32 [n], new tokens of each sample
    token_ids: bytes  # int32 [sum of num_token_ids]
    finals: BoundedList[tuple[int, FinalOutput]] = []  # (index into request_ids, the end of that sample)
    logprobs: BoundedList[tuple[int, TokenLogprobs]] = []  # (index into request_ids, of the new tokens there)
    token_bytes: TokenBytes | None = None  # of every token that has a log-probability here; None: there are none
    samples: bytes = b""  # int32 [n], index of each sample in its request; empty: all are sample 0
    prompt_logprobs: BoundedList[tuple[int, PromptLogprobs]] = []  # (index into request_ids, next part of its prompt)
    # (index into request_ids, tokens of the prompt, those found in the cache), with sample 0's first tokens of a
    # stream. A resumed request gets it only if it brings no tokens of sample 0.
    prompts: BoundedList[tuple[int, int, int]] = []


class Refused(Message, frozen=True):
    """gateway -> client, at once: the gateway did not accept a message. The client's request ends with this error."""

    request_id: str  # empty if the message names none
    error_code: str
    error_message: str
    retry_after_s: float = 0.0  # of a full queue: when to try again


class Health(Message, frozen=True):
    """gateway -> client, answers a `Query`: the state of the engine and the limits that a client needs."""

    query_id: int
    state: Literal["starting", "ready", "recovering", "draining", "failed"]
    detail: str  # the stage of a starting engine, which process is started again, or why a failed engine failed
    protocol_version: int
    model: str
    max_model_len: int
    max_open_requests: int  # of one client; the gateway refuses more at once
    model_folder: str = ""  # of the model's files, on the engine's machine
    chat_template: str | None = None  # a file there that replaces the model's own templates
    policy: str = "fcfs"  # of the scheduler
    served_model_names: BoundedList[str] = []  # names that HTTP requests may give; empty: `model`
    tool_parser: str = "auto"  # of the HTTP server
    reasoning_parser: str = "auto"


class StatsArray(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A copy of an array of integers on a statistics page."""

    shape: BoundedList[int]
    values: bytes  # int64, of this shape


class Stats(Message, frozen=True):
    """gateway -> client, answers a `Query`: counters and gauges of every process by role.

    For example {"scheduler": {"num_steps": 12, ...}, "tokenizer.0": {...}}.
    """

    query_id: int
    roles: NameMap[NameMap[float]]
    arrays: NameMap[NameMap[StatsArray]] = {}  # of each role that has arrays of the names in the query


class CacheCleared(Message, frozen=True):
    """scheduler -> gateway -> client, answers `ClearCache`: the cache has no block from before."""

    query_id: int


class PromptTokens(Message, frozen=True):
    """gateway -> client, answers a `TokenizeQuery`: its only answer. The client answers `Received`."""

    request_id: str
    receipt: int
    token_ids: bytes  # int32 [n]
    token_bytes: TokenBytes  # of these tokens


class DetokenizedText(Message, frozen=True):
    """gateway -> client, answers a `DetokenizeQuery`: its only answer. The client answers `Received`."""

    request_id: str
    receipt: int
    text: str


class KeptValue(Message, frozen=True):
    """gateway -> client, answers `Keep` and `Recall`. The client answers `Received` if there is a receipt."""

    request_id: str
    found: bool  # whether a value with this key was kept before the message
    receipt: int = 0  # 0: there is no value here, and the client owes no answer
    value: bytes = b""  # only for `Recall` without `forget`


class Alive(Message, frozen=True):
    """gateway -> client, every few seconds to a known client that received nothing else. The client ignores it.

    The gateway's socket refuses the message if the client is gone. Then the gateway cancels the client's requests.
    """


GatewayToClient = Outputs | Refused | Health | Stats | CacheCleared | PromptTokens | DetokenizedText | KeptValue | Alive


# ---- a request inside the engine


class Route(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a request's text goes. Every message along the path carries it; detokenizer and gateway read it."""

    client: bytes  # drawn by the gateway for each connection of a client; opaque to the other processes
    request_id: str
    stream: bool


class Tokenize(Message, frozen=True):
    """gateway -> tokenizer, when the policy picks the request and the tokenizer has credit.

    The tokenizer encodes the prompt, writes the ids into its prompt ring, sends `Tokenized` to the scheduler and then
    `TokenizeDone` to the gateway.
    """

    key: int
    route: Route
    params: SamplingParams  # with a seed: the gateway draws one if the client gave none
    arrived_ns: int  # at the gateway, CLOCK_MONOTONIC; queue time-outs and aging count from here
    prompt: str | None = None
    chat: EncodedChat | None = None
    token_ids: bytes | None = None
    cache_salt: str = ""
    scheduling: SchedulingParams = DEFAULT_SCHEDULING
    deadline_ns: int = 0  # by the same clock; 0 = none
    clock_s: float | None = None  # of Generate
    resume: Resume | None = None


class Tokenized(Message, frozen=True):
    """tokenizer -> scheduler, for each `Tokenize`: the prompt's ids lie in consecutive records of the prompt ring.

    The scheduler queues the request and sends the gateway `Accepted`. If `error_code` is set, the ring has no ids, and
    the scheduler ends the request with that error. If the gateway has withdrawn the request, the scheduler drops it.
    """

    key: int
    route: Route
    params: SamplingParams
    arrived_ns: int
    ring: int = 0  # index of the prompt ring; ring 0 is the scheduler's own
    ticket: int = 0  # of the first record
    num_prompt_tokens: int = 0
    block_hashes: bytes = b""  # of the prompt, by `ipc.block_hash.chain_hashes`; empty: do not cache it
    long_values: bytes = b""  # int32, by `ipc.long_values`; of these, the params repeat only logprob_token_ids
    thinking: tuple[int, int] | None = None  # the model's tokens that begin and end thinking; only with a budget
    scheduling: SchedulingParams = DEFAULT_SCHEDULING
    deadline_ns: int = 0
    error_code: str = ""
    error_message: str = ""
    tokenized_ns: int = 0  # when the prompt was encoded, CLOCK_MONOTONIC
    resume: Resume | None = None


class TokenizerQuery(Message, frozen=True):
    """gateway -> tokenizer, in the same order and with the same credit as `Tokenize`: answer this query.

    The tokenizer sends the answer in `TokenizeDone`, and the scheduler nothing.
    """

    key: int
    query: TokenizeQuery | DetokenizeQuery
    arrived_ns: int  # as of Tokenize

    @property
    def scheduling(self) -> SchedulingParams:
        return self.query.scheduling


GatewayToTokenizer = Tokenize | TokenizerQuery


class TokenizeDone(Message, frozen=True):
    """tokenizer -> gateway, after the request's `Tokenized`, or with a query's answer: credit for one more message.

    Key 0, once after the tokenizer has connected: the gateway may send it prompts. If the query's client has gone, the
    gateway drops the answer.
    """

    key: int
    answer: PromptTokens | DetokenizedText | None = None  # of a TokenizerQuery; the gateway sets the receipt
    error_code: str = ""  # a TokenizerQuery ends with this error
    error_message: str = ""


class Accepted(Message, frozen=True):
    """scheduler -> gateway, after `Tokenized` of these requests: the scheduler has them.

    That includes a request that it refuses (a full queue, for example): its end follows by way of the detokenizer. From
    now on the scheduler enforces the time-outs, and the gateway cancels with `CancelRequests`.
    """

    keys: BoundedList[int]


class Fenced(Message, frozen=True):
    """scheduler -> gateway, after a tokenizer was replaced: nothing more is taken from the dead one.

    `Accepted` was sent for everything that had arrived from it. The gateway gives the rest to another tokenizer.
    """

    tokenizer: bytes  # identity of the dead one


class CancelRequests(Message, frozen=True):
    """gateway -> scheduler, when a client cancels or is gone; detokenizer -> scheduler, at a stop string.

    The scheduler ends these sequences now. It ignores unknown keys: those sequences have ended already.
    """

    keys: BoundedList[int]  # of sequences: one for each sample


class Withdraw(Message, frozen=True):
    """gateway -> scheduler, when a request ends at the gateway before its `Accepted` has arrived.

    The scheduler ignores keys of requests that it has and that are open. It answers `Withdrawn` for the others, drops
    their `Tokenized` when it arrives, and tells the detokenizer nothing.
    """

    keys: BoundedList[int]


class Withdrawn(Message, frozen=True):
    """scheduler -> gateway, answers `Withdraw`: these requests are not open and will not be. No `Accepted` follows.

    The gateway answers the client. If `Accepted` for a key came earlier, that request has already ended; the gateway
    then sends `CancelRequests`, and the scheduler stops expecting the request.
    """

    keys: BoundedList[int]


K = TypeVar("K", CancelRequests, Withdraw, "ReleaseMatchers")


def split_keys(kind: type[K], keys: Sequence[int]) -> Iterator[K]:
    """Messages of `kind` that together name `keys` in order, at most MAX_ITEMS each; none for no keys."""
    for start in range(0, len(keys), MAX_ITEMS):
        yield kind(keys=list(keys[start : start + MAX_ITEMS]))


class TextOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """How a request's tokens become text: fields of SamplingParams."""

    stop: BoundedList[str] = []
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    @classmethod
    def of(cls, params: SamplingParams) -> TextOptions:
        options = cls(**{name: getattr(params, name) for name in cls.__struct_fields__})
        return PLAIN_TEXT if options == PLAIN_TEXT else options  # msgspec omits a default only if it is this object


PLAIN_TEXT: Final = TextOptions()


class Opened(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the detokenizer must know of a request before its first token."""

    key: int
    route: Route
    num_prompt_tokens: int
    text: TextOptions = PLAIN_TEXT
    num_logprobs: int | None = None  # SamplingParams.num_logprobs
    logprob_token_ids: BoundedList[int] = []  # of SamplingParams
    num_samples: int = 1  # with ended ones; a request that the scheduler refuses has one, which ends at once
    prompt_tail: bytes = b""  # int32, the prompt's last ids, at most PROMPT_TAIL_TOKENS; empty if it was refused
    arrived_ns: int = 0  # see RequestTimes
    tokenized_ns: int = 0
    resume: Resume | None = None  # None if it was refused


class Ended(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The end of a sequence that no token of this step caused: it was cancelled, timed out, was refused, or failed."""

    key: int
    finish_reason: FinishReason
    error_code: str = ""
    error_message: str = ""
    retry_after_s: float = 0.0
    suspected: bool = False  # with `Interrupted`: the sequence may have ended the process that died


class StepLogprobs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For the tokens of one StepOutputs, in its order. Rows of sequences that asked for none are undefined."""

    num_top: int
    logprobs: bytes  # float32 [n]
    top_ids: bytes  # int32 [n, num_top]
    top_logprobs: bytes  # float32 [n, num_top]
    num_extra: int = 0
    extra_logprobs: bytes = b""  # float32 [n, num_extra], of each sequence's own logprob_token_ids


class StepOutputs(Message, frozen=True):
    """scheduler -> detokenizer, one message per step: requests that open, n sampled tokens, sequences that end.

    The detokenizer handles the fields in their order. It turns the tokens into text and sends `Delivery`.
    """

    opened: BoundedList[Opened] = []
    # Sequences that were admitted: (key, when by CLOCK_MONOTONIC in ns, prompt tokens found in the cache).
    admitted: BoundedList[tuple[int, int, int]] = []
    prompt_logprobs: BoundedList[tuple[int, PromptLogprobs]] = []  # (key of sample 0, next part of its prompt)
    keys: bytes = b""  # int64 [n]
    token_ids: bytes = b""  # int32 [n]
    finish: bytes = b""  # uint8 [n], FinishCode
    logprobs: StepLogprobs | None = None
    ended: BoundedList[Ended] = []


class Delivery(Message, frozen=True):
    """detokenizer -> gateway, when clients with credit have new text: head of a multipart message.

    Frame i + 1 is an encoded `Outputs`. The gateway passes it on to `clients[i]` and closes the requests in
    `finished[i]`.
    """

    clients: BoundedList[bytes]  # Route.client of each frame
    finished: BoundedList[BoundedList[int]]  # keys of the requests whose final answer is in that frame


class ClientCredit(Message, frozen=True):
    """gateway -> detokenizer, after `Delivered`: the detokenizer may send this client `count` more `Outputs`."""

    client: bytes
    count: int


class ClientGone(Message, frozen=True):
    """gateway -> detokenizer, when a client is gone or dropped: forget the client and its undelivered text.

    The gateway cancels the client's requests at the same time.
    """

    client: bytes


# ---- structured outputs: scheduler -> grammar process, grammar process -> scheduler


class Compile(Message, frozen=True):
    """scheduler -> grammar process, when a request with structured outputs has arrived: compile its grammar.

    The grammar process answers `Compiled`. It then has a matcher for each of the sequences `key` to
    `key + num_samples - 1`.
    """

    key: int
    num_samples: int
    spec: StructuredOutputs
    end_ids: BoundedList[int]  # the tokens that end the sequences; they are allowed where the text is complete
    known: BoundedList[bytes] = []  # int32 tokens that each sequence has already, in order of the keys; empty: none


class Compiled(Message, frozen=True):
    """grammar process -> scheduler, answers `Compile`: the sequences can run, or the request ends with this error."""

    key: int
    error_code: str = ""
    error_message: str = ""


class ReleaseMatchers(Message, frozen=True):
    """scheduler -> grammar process, when sequences with structured outputs have ended: forget their matchers.

    The grammar process ignores unknown keys. A sequence may end before its grammar is compiled.
    """

    keys: BoundedList[int]


class MatcherFailed(Message, frozen=True):
    """grammar process -> scheduler, when it cannot say which tokens a sequence may sample: its masks are closed.

    The scheduler ends the sequence with this error.
    """

    key: int
    reason: str


ToScheduler = Tokenized | CancelRequests | Withdraw | ClearCache | Compiled | MatcherFailed
SchedulerToGateway = Accepted | Withdrawn | CacheCleared | Fenced
SchedulerToGrammar = Compile | ReleaseMatchers
ToDetokenizer = StepOutputs | ClientCredit | ClientGone


# ---- life of a process: worker -> launcher, launcher -> worker


class Progress(Message, frozen=True):
    """worker -> launcher, during start-up: how far the worker is. The launcher shows it."""

    role: str
    stage: str
    fraction: float  # of the stage, in [0, 1]
    total_bytes: int = 0  # of a stage that counts bytes; 0 otherwise


class Ready(Message, frozen=True):
    """worker -> launcher, once start-up is complete. The launcher collects `info` and starts the next workers.

    The gateway says it twice: once when it answers queries, and after `Start` when it accepts requests.
    """

    role: str
    info: NameMap[int] = {}  # facts for other workers: `num_blocks` of the GPU process, EOS_TOKEN_ID of a tokenizer


class Failed(Message, frozen=True):
    """worker -> launcher, before the worker exits with an error. The launcher stops the engine and names this cause."""

    role: str
    error_code: str
    error_message: str


class Drained(Message, frozen=True):
    """gateway -> launcher, after `Drain` or `Abort`: no request is open, and every client has its answers.

    The launcher then stops all workers.
    """


class Pong(Message, frozen=True):
    """worker -> launcher, answers a `Ping`: the process's loop goes round."""

    stalled_s: float = 0.0  # for how long work that others wait for has made no progress here; 0 = there is none


class Busy(Message, frozen=True):
    """worker -> launcher, before work that may take longer than a hang would: it may answer nothing for so long."""

    seconds: float


class Ping(Message, frozen=True):
    """launcher -> worker, every few seconds once the worker is ready. A worker that answers nothing is killed."""


class EngineState(Message, frozen=True):
    """launcher -> gateway, when a process is started again or answers nothing, and when all of them serve again."""

    state: Literal["recovering", "ready"]
    detail: str = ""  # what a recovering engine waits for


class Start(Message, frozen=True):
    """launcher -> worker, when everything that the worker needs is ready: begin to work."""

    info: NameMap[int] = {}  # Ready.info of all workers, merged


class Drain(Message, frozen=True):
    """launcher -> gateway, at the first signal to end: refuse new requests, finish the open ones, say `Drained`."""


class Abort(Message, frozen=True):
    """launcher -> gateway, when a worker is lost or draining takes too long: answer every open request with this error.

    A second signal has the same effect. The gateway then says `Drained`.
    """

    error_message: str


class Stop(Message, frozen=True):
    """launcher -> worker, at the end: exit now, with status 0."""


WorkerToLauncher = Progress | Ready | Failed | Drained | Pong | Busy
LauncherToWorker = Start | Drain | Abort | Stop | Ping | EngineState
