"""The table of open requests, and of the client sessions that they belong to."""

from __future__ import annotations

import enum
from collections.abc import ValuesView
from typing import Final, NamedTuple

from ipc.errors import InvalidRequest, QueueFull, RingfeedError
from ipc.messages import FinalOutput, FinishReason, RequestTimes
from workers.queueing.drain_rate import DrainRate

_KEY_BITS: Final = 48  # of the requests of one epoch


class RequestState(enum.Enum):
    """Where a request is, which decides how it is cancelled. `request_lifecycle.py` draws the transitions."""

    QUEUED = "queued"  # in the gateway, waiting for a tokenizer
    TOKENIZING = "tokenizing"  # on its way to the scheduler, which may not have it yet: a Withdraw stops it there
    ACCEPTED = "accepted"  # the scheduler has it: a CancelRequests finds it


_NEW: Final = {0: 0}  # one answer ends all samples of a new request


class SampleEnd(NamedTuple):
    """A final answer that the gateway itself gives."""

    request_id: str
    sample: int
    final: FinalOutput


class Request:
    """An open request. `client` is None if its client was dropped; then it is cancelled as soon as possible."""

    __slots__ = (
        "arrived_ns", "client", "is_cancelled", "is_query", "key", "keys", "known", "num_prompt_tokens", "request_id",
        "state", "withdrawn_as",
    )  # fmt: skip

    def __init__(
        self,
        key: int,
        num_samples: int,
        client: ClientSession,
        request_id: str,
        num_prompt_tokens: int,
        arrived_ns: int,
    ) -> None:
        self.key = key
        self.keys = range(key, key + num_samples)  # of its samples
        self.client: ClientSession | None = client
        self.request_id = request_id
        self.arrived_ns = arrived_ns
        self.num_prompt_tokens = num_prompt_tokens  # 0 for a text, whose tokens are not counted yet
        self.state = RequestState.QUEUED
        self.is_cancelled = False
        self.is_query = False  # a tokenizer answers it, and the scheduler never sees it
        self.withdrawn_as: FinishReason | None = None  # the reason, if a Withdraw was sent
        self.known = _NEW  # the samples that need a final answer each, with the number of tokens that the client has

    def ends(self, reason: FinishReason) -> list[SampleEnd]:
        """The final answers of a request that ends here. They count the tokens that its client has already."""
        times, num_open = RequestTimes(self.arrived_ns), len(self.known)
        ends = []
        for sample, num_tokens in self.known.items():
            num_open -= 1
            final = FinalOutput(reason, self.num_prompt_tokens, num_tokens, num_open=num_open, times=times)
            ends.append(SampleEnd(self.request_id, sample, final))
        return ends

    def failed(self, error: RingfeedError) -> list[SampleEnd]:
        """The final answer of a request that ends here with an error. It ends all samples."""
        times = RequestTimes(self.arrived_ns)
        final = FinalOutput("error", self.num_prompt_tokens, 0, error.code, str(error), times=times)
        return [SampleEnd(self.request_id, 0, final)]


class ClientSession:
    """A client from its first request until it has no open request and has acknowledged everything, or is dropped.

    No two sessions have the same `name`. After a client was dropped, messages under the old name are dropped, even if
    the client is back under the same socket identity.
    """

    __slots__ = (
        "departures", "identity", "keys", "last_progress", "name", "num_outputs", "num_own_outputs", "num_samples",
        "was_sent_to",
    )  # fmt: skip

    def __init__(self, identity: bytes, name: bytes) -> None:
        self.identity = identity  # on the clients' socket
        self.name = name  # in routes
        self.keys: dict[str, int] = {}  # of its open requests, by request_id
        self.num_samples = 0  # of its open requests
        self.departures = DrainRate()  # of samples
        self.num_outputs = 0  # sent, and not acknowledged
        self.num_own_outputs = 0  # the part of num_outputs that the gateway made itself, unknown to the detokenizer
        self.last_progress = 0.0  # when it last acknowledged something, or last began to owe that
        self.was_sent_to = False  # since the last probe


class RequestTable:
    """Open requests by key, and client sessions by identity and by name. Draws keys and names, each only once.

    `epoch`: of the gateway; gateways of different epochs draw different keys.
    """

    def __init__(self, epoch: int = 1) -> None:
        self._requests: dict[int, Request] = {}
        self._by_identity: dict[bytes, ClientSession] = {}
        self._by_name: dict[bytes, ClientSession] = {}
        self._last_key = (epoch - 1) << _KEY_BITS
        self._last_name = 0

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def clients(self) -> ValuesView[ClientSession]:
        return self._by_identity.values()

    def client(self, identity: bytes) -> ClientSession | None:
        return self._by_identity.get(identity)

    def client_named(self, name: bytes) -> ClientSession | None:
        return self._by_name.get(name)

    def requests(self) -> list[Request]:
        """All open requests, oldest first."""
        return list(self._requests.values())

    def request(self, key: int) -> Request | None:
        return self._requests.get(key)

    def open(
        self, identity: bytes, request_id: str, num_samples: int, now_ns: int, num_prompt_tokens: int = 0
    ) -> Request:
        """Add a new request, and a session if its client has none."""
        client = self._by_identity.get(identity)
        if client is None:
            self._last_name += 1
            client = ClientSession(identity, self._last_name.to_bytes(8, "big"))
            self._by_identity[identity] = self._by_name[client.name] = client
        if not client.num_samples:
            client.departures.begin(now_ns)
        request = Request(self._last_key + 1, num_samples, client, request_id, num_prompt_tokens, now_ns)
        self._last_key += num_samples
        self._requests[request.key] = request
        client.keys[request_id] = request.key
        client.num_samples += num_samples
        return request

    def check_open_requests(self, identity: bytes, request_id: str, num_samples: int, limit: int, now_ns: int) -> None:
        """Raise InvalidRequest or QueueFull if a client may not open this request. `limit`: of its open samples."""
        if num_samples > limit:
            raise InvalidRequest(f"n ({num_samples}) is more than frontend.max_open_requests ({limit})")
        client = self.client(identity)
        if client is None:
            return
        if request_id in client.keys:
            raise InvalidRequest(
                f"request_id ({request_id!r}) belongs to a request that is still open: choose another one"
            )
        num_excess = client.num_samples + num_samples - limit
        if num_excess > 0:
            retry_s = client.departures.retry_after_s(num_excess, now_ns)
            raise QueueFull(
                f"this client has {client.num_samples} requests open, each sample counted, and "
                f"frontend.max_open_requests is {limit}: wait for one to end, or try again in {retry_s:g} s",
                retry_s,
            )

    def close(self, request: Request) -> None:
        del self._requests[request.key]
        if request.client is not None:
            del request.client.keys[request.request_id]
            request.client.num_samples -= len(request.keys)
            self.forget_if_idle(request.client)

    def forget_if_idle(self, client: ClientSession) -> None:
        if not client.keys and not client.num_outputs:
            self.forget(client)

    def forget(self, client: ClientSession) -> list[Request]:
        """Remove a client's session. Returns its open requests, whose `client` is None from now on."""
        self._by_identity.pop(client.identity, None)
        self._by_name.pop(client.name, None)
        orphans = [self._requests[key] for key in client.keys.values()]
        for request in orphans:
            request.client = None
        return orphans

    def clear(self) -> None:
        self._requests.clear()
        self._by_identity.clear()
        self._by_name.clear()
