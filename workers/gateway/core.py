"""Decides everything that the gateway says. Knows no sockets: events come in by method, messages go out by `outbox`.

    QUEUED --dispatch--> TOKENIZING --Accepted--> ACCEPTED --Delivery--> closed
      |                      |                       |
    answered here         Withdraw             CancelRequests        (cancelled, its client gone, or out of time)
                             |
            Withdrawn: answered here; Accepted: go on as ACCEPTED

Final answers come from the detokenizer, in frames that the gateway passes on unread. The gateway itself answers
requests that the detokenizer does not know: those that end while QUEUED, or are Withdrawn. It also answers if it drops
a client or the engine fails, and then discards the detokenizer's frames. So every request gets exactly one final
answer. Only the scheduler knows whether a TOKENIZING request has reached it. From then on, the scheduler enforces the
request's time-outs.
"""

from __future__ import annotations

import enum
import logging
import secrets
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal, NamedTuple

from ipc.errors import EngineUnavailable, InvalidRequest, QueueFull, RequestFailed, RingfeedError
from ipc.messages import (
    PROTOCOL_VERSION,
    Alive,
    CacheCleared,
    Cancel,
    CancelRequests,
    ClearCache,
    ClientCredit,
    ClientGone,
    Delivered,
    Delivery,
    Drained,
    FinalOutput,
    Generate,
    Health,
    Outputs,
    Query,
    Refused,
    Stats,
    Withdraw,
    split_keys,
)
from ipc.sampling_params import MAX_SEED
from workers.gateway.cache_clears import CacheClears
from workers.gateway.client_frames import MAX_ERROR_CHARS, UnreadableFrame, read_client_frames
from workers.gateway.config import GatewayBootstrap
from workers.gateway.intake import Ends, Intake
from workers.gateway.request_table import Client, Request, RequestState, RequestTable

logger = logging.getLogger(__name__)

PROBE_INTERVAL_S: Final = 1.0
MAX_ANSWERED: Final = 8_192  # requests in one Outputs of our own


class Peer(enum.Enum):
    """Whom a message is for."""

    CLIENT = "client"
    TOKENIZER = "tokenizer"
    SCHEDULER = "scheduler"
    DETOKENIZER = "detokenizer"
    LAUNCHER = "launcher"


class Send(NamedTuple):
    """A message to send; `identity` on a ROUTER, b"" elsewhere. Bytes are an encoded frame."""

    peer: Peer
    identity: bytes
    message: Any


class Gateway:
    """The role's whole behaviour. Times are seconds of one monotonic clock.

    After every event the owner sends what `take_outbox()` gives, and reports a client that cannot be reached with
    `client_gone()`, and a message for which a client's queue has no room with `client_full()`.
    """

    def __init__(self, bootstrap: GatewayBootstrap, snapshot_stats: Callable[[], dict[str, dict[str, float]]]) -> None:
        self.table = RequestTable()
        self.state: Literal["starting", "ready", "draining", "failed"] = "starting"
        self.num_received = 0
        self.num_refused = 0
        self.num_queue_full = 0  # refused because something was full
        self.num_finished = 0
        self.num_cancelled = 0
        self.num_out_of_time: Counter[str] = Counter()  # before they reached the scheduler, by finish reason
        self._bootstrap = bootstrap
        self._snapshot_stats = snapshot_stats
        self._detail = "the engine's workers are starting"
        self._intake = Intake(bootstrap, self.table)
        self._clears = CacheClears()
        # Clients that were dropped because they take in nothing, and the outputs that had no room in their queues. They
        # may ask for nothing new before they take something in: each stay could leave another window of outputs unread.
        self._deaf: dict[bytes, list[Outputs | bytes]] = {}
        self._cancels: list[int] = []
        self._outbox: list[Send] = []
        self._next_probe = 0.0
        self._drain_deadline = float("inf")
        self._has_drained = False

    def take_outbox(self) -> list[Send]:
        """What has to be sent, in order."""
        for cancels in split_keys(CancelRequests, self._cancels):
            self._send(Peer.SCHEDULER, cancels)
        self._cancels = []
        for withdraw in split_keys(Withdraw, self._intake.take_withdraws()):
            self._send(Peer.SCHEDULER, withdraw)
        outbox, self._outbox = self._outbox, []
        return outbox

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a tokenizer."""
        return len(self._intake.queue)

    def timeout_s(self, now: float) -> float | None:
        """How long `tick` may wait; None: until something happens."""
        times = [self._drain_deadline]
        if self.table.clients or self._deaf:
            times.append(now + PROBE_INTERVAL_S)
        if self._intake.first_timer_ns is not None:
            times.append(self._intake.first_timer_ns / 1e9)
        first = min(times)
        return None if first == float("inf") else max(0.0, first - now)

    def _send(self, peer: Peer, message: Any, identity: bytes = b"") -> None:
        self._outbox.append(Send(peer, identity, message))

    # The launcher

    def start(self) -> None:
        if self.state == "starting":
            self.state, self._detail = "ready", ""

    def drain(self, now: float) -> None:
        """Take nothing new; `Drained` is said when nothing is open, or at the time-out."""
        if self.state in ("starting", "ready"):
            self.state, self._detail = "draining", "the engine is draining"
            self._drain_deadline = now + self._bootstrap.frontend.drain_timeout_s
        self._say_drained_if_so()

    def abort(self, error_message: str) -> None:
        """Answer every open request with an error."""
        self.state, self._detail = "failed", error_message
        self._answer_all(error_message)

    def _answer_all(self, error_message: str) -> None:
        """What the detokenizer says after this is too late: it is for clients that the table does not know."""
        for client in list(self.table.clients):
            self._answer_open_requests(client, EngineUnavailable(error_message))
        self.num_finished += len(self.table)
        self.table.clear()
        self._intake.clear()
        self._say_drained_if_so()

    def _say_drained_if_so(self) -> None:
        if self.state in ("draining", "failed") and not len(self.table) and not self._has_drained:
            self._has_drained = True
            self._drain_deadline = float("inf")
            self._send(Peer.LAUNCHER, Drained())

    # Clients

    def client_frames(self, identity: bytes, frames: list[bytes], now: float) -> None:
        """A client's message, whatever it holds."""
        self.num_received += 1
        request_id = ""
        try:
            message = read_client_frames(frames)
            if isinstance(message, Generate):
                request_id = message.request_id
                self._generate(identity, message, len(frames[0]), now)
            elif isinstance(message, Query):
                self._answer_query(identity, message)
            elif isinstance(message, ClearCache):
                clear_id = self._clears.add(identity, message.query_id, _ns(now))
                self._send(Peer.SCHEDULER, ClearCache(query_id=clear_id))
            elif isinstance(message, Cancel):
                self._cancel(identity, message.request_id, now)
            else:
                self._credit(identity, message, now)
        except UnreadableFrame as unreadable:
            self._refuse(identity, unreadable.request_id, unreadable.error)
        except RingfeedError as error:
            self._refuse(identity, request_id, error)

    def _refuse(self, identity: bytes, request_id: str, error: RingfeedError) -> None:
        self.num_refused += 1
        self.num_queue_full += isinstance(error, QueueFull)
        logger.debug("refused %s: %s", request_id or "a message", error)
        text = str(error)[:MAX_ERROR_CHARS]
        refused = Refused(
            request_id=request_id, error_code=error.code, error_message=text, retry_after_s=error.retry_after_s
        )
        self._send(Peer.CLIENT, refused, identity)

    def _generate(self, identity: bytes, message: Generate, frame_bytes: int, now: float) -> None:
        if self.state != "ready":
            raise EngineUnavailable("the engine is starting" if self.state == "starting" else self._detail)
        if identity in self._deaf:
            raise QueueFull(
                "this client was dropped and has taken in no output since (`Delivered` says that it has)",
                PROBE_INTERVAL_S,  # by then the gateway sends again what the client has not read
            )
        priority = message.scheduling.priority
        if priority and self._bootstrap.policy.policy != "priority":
            raise InvalidRequest(
                f"priority ({priority}) has no effect in this engine: leave it out, or start the engine with "
                'scheduler.policy = "priority"'
            )
        client = self.table.client(identity)
        params, now_ns = message.params, _ns(now)
        limit = self._bootstrap.frontend.max_open_requests
        if params.n > limit:
            raise InvalidRequest(f"n ({params.n}) is more than frontend.max_open_requests ({limit})")
        if client is not None:
            if message.request_id in client.keys:
                raise InvalidRequest(f"request_id ({message.request_id!r}) is that of a request that is still open")
            num_over = client.num_samples + params.n - limit
            if num_over > 0:
                retry_s = client.departures.retry_after_s(num_over, now_ns)
                raise QueueFull(
                    f"this client has {client.num_samples} requests open, each sample counted, and "
                    f"frontend.max_open_requests is {limit}: wait for one to end, or try again in {retry_s:g} s",
                    retry_s,
                )
        num_bytes = self._intake.queue.held_bytes(message, frame_bytes)
        self._intake.queue.check_room(num_bytes, now_ns)
        if params.seed is None:
            params = params.with_seed(secrets.randbelow(MAX_SEED + 1))
        num_prompt_tokens = len(message.token_ids or b"") // 4
        request = self.table.open(identity, message.request_id, params.n, now_ns, num_prompt_tokens)
        self._intake.add(request, message, params, frame_bytes, num_bytes, now_ns)
        self._dispatch(now)

    def _answer_query(self, identity: bytes, query: Query) -> None:
        if query.what == "stats":
            self._send(Peer.CLIENT, Stats(query_id=query.query_id, roles=self._snapshot_stats()), identity)
            return
        health = Health(
            query_id=query.query_id,
            state=self.state,
            detail=self._detail,
            protocol_version=PROTOCOL_VERSION,
            model=self._bootstrap.model_name,
            max_model_len=self._bootstrap.max_model_len,
            max_open_requests=self._bootstrap.frontend.max_open_requests,
        )
        self._send(Peer.CLIENT, health, identity)

    def cache_cleared(self, clear_id: int, now: float) -> None:
        """The scheduler has emptied its cache."""
        identity, query_id = self._clears.done(clear_id, _ns(now))
        self._send(Peer.CLIENT, CacheCleared(query_id=query_id), identity)

    def _cancel(self, identity: bytes, request_id: str, now: float) -> None:
        client = self.table.client(identity)
        key = None if client is None else client.keys.get(request_id)
        request = None if key is None else self.table.request(key)
        if client is None or request is None or request.is_cancelled:
            return
        request.is_cancelled = True
        self.num_cancelled += 1
        if request.state is RequestState.ACCEPTED:
            self._cancels += request.keys
        else:
            self._end(self._intake.stop([(request, "cancelled")]), now)

    def _credit(self, identity: bytes, delivered: Delivered, now: float) -> None:
        """The client has taken in some `Outputs`. Nobody gets credit for more than was sent."""
        if delivered.count < 1:
            raise InvalidRequest(f"count ({delivered.count}) must be at least 1")
        for outputs in self._deaf.pop(identity, []):
            self._send(Peer.CLIENT, outputs, identity)
        client = self.table.client(identity)
        count = 0 if client is None else min(delivered.count, client.num_outputs)
        if client is None or count == 0:
            return
        client.num_outputs -= count
        client.last_progress = now
        # Which ones it took in does not matter: in the end the detokenizer gets back what it spent.
        own = min(count, client.num_own_outputs)
        client.num_own_outputs -= own
        if count > own:
            self._send(Peer.DETOKENIZER, ClientCredit(client=client.name, count=count - own))
        self.table.forget_if_idle(client)

    def _end(self, ends: Ends, now: float) -> None:
        """Answer requests that the detokenizer does not know, and close them."""
        answers: defaultdict[Client, list[tuple[str, FinalOutput]]] = defaultdict(list)
        for request, reason in ends:
            if reason in ("deadline", "queue_timeout"):
                self.num_out_of_time[reason] += 1
            if request.client is not None:
                answers[request.client].append((request.request_id, FinalOutput(reason, request.num_prompt_tokens, 0)))
        for client, finals in answers.items():
            self._answer(client, finals, now)
        for request, _ in ends:
            self._close(request, now)

    def _answer_open_requests(self, client: Client, error: RingfeedError) -> None:
        """Errors for all of a client's open requests; the caller takes them out of the table."""
        final = FinalOutput("error", 0, 0, error.code, str(error)[:MAX_ERROR_CHARS])
        self._answer(client, [(request_id, final) for request_id in client.keys], client.last_progress)

    def _answer(self, client: Client, finals: list[tuple[str, FinalOutput]], now: float) -> None:
        """Send final answers to some requests in the detokenizer's place."""
        for start in range(0, len(finals), MAX_ANSWERED):
            part = finals[start : start + MAX_ANSWERED]
            outputs = Outputs(
                request_ids=[request_id for request_id, _ in part],
                texts=[""] * len(part),
                num_token_ids=bytes(4 * len(part)),
                token_ids=b"",
                finals=[(index, final) for index, (_, final) in enumerate(part)],
            )
            client.num_own_outputs += 1
            self._send_outputs(client, outputs, now)

    def _send_outputs(self, client: Client, outputs: Outputs | bytes, now: float) -> None:
        if client.num_outputs == 0:
            client.last_progress = now
        client.num_outputs += 1
        client.was_sent_to = True
        self._send(Peer.CLIENT, outputs, client.identity)

    def client_gone(self, identity: bytes) -> None:
        """A client cannot be reached: nobody waits for its requests any more."""
        self._deaf.pop(identity, None)
        client = self.table.client(identity)
        if client is not None:
            if client.keys:
                logger.info("a client has gone; %d of its requests are cancelled", len(client.keys))
            self._drop(client)

    def client_full(self, identity: bytes, message: Any) -> None:
        """A client has left so much unread that `message` had no room.

        Its requests are cancelled. What tells of them is kept, and tried again, so that none goes without its end if
        the client should read on; credit bounds it. Answers that cost no credit are lost.
        """
        client = self.table.client(identity)
        if client is None and not isinstance(message, Outputs | bytes):
            return
        outputs = self._deaf.setdefault(identity, [])
        if isinstance(message, Outputs | bytes):
            outputs.append(message)
        if client is not None:
            logger.warning(
                "a client leaves everything unread and is dropped; %d requests are cancelled", len(client.keys)
            )
            self._answer_open_requests(client, RequestFailed("cancelled: this client left too many messages unread"))
            self._drop(client)

    def _drop(self, client: Client) -> None:
        self._send(Peer.DETOKENIZER, ClientGone(client=client.name))
        for request in self.table.forget(client):
            is_new = not request.is_cancelled
            request.is_cancelled = True
            self.num_cancelled += is_new
            if request.state is RequestState.ACCEPTED:
                if is_new:
                    self._cancels += request.keys
                self._close(request)
            else:  # a request at a tokenizer stays in the table until the scheduler has answered
                for ended, _ in self._intake.stop([(request, "cancelled")]):
                    self._close(ended)

    def _close(self, request: Request, now: float | None = None) -> None:
        """`now` may be None for a request without a client."""
        self.num_finished += 1
        if request.client is not None and now is not None:
            request.client.departures.leave(_ns(now), len(request.keys))
        self.table.close(request)
        self._say_drained_if_so()

    # The other workers

    def tokenizer_done(self, identity: bytes, key: int, now: float) -> None:
        """A tokenizer has passed on a request, or (key 0) has connected."""
        self._intake.tokenizer_done(identity, key)
        self._dispatch(now)

    def _dispatch(self, now: float) -> None:
        """Give the tokenizers as many prompts as they have room for. Requests out of time end first."""
        self._expire(now)
        for identity, message in self._intake.dispatch(_ns(now)):
            self._send(Peer.TOKENIZER, message, identity)

    def accepted(self, keys: Iterable[int]) -> None:
        """The scheduler has these requests and enforces their time-outs. Pass on cancellations that came earlier."""
        for key in keys:
            request = self.table.request(key)
            if request is None:  # ended already
                continue
            request.state = RequestState.ACCEPTED
            if request.is_cancelled:
                self._cancels += request.keys
                if request.client is None:
                    self._close(request)

    def withdrawn(self, keys: Iterable[int], now: float) -> None:
        """The scheduler does not have these requests, and will drop them when they arrive."""
        ended, over = self._intake.withdrawn(keys)
        self._cancels += over
        self._end(ended, now)

    def delivery(self, head: Delivery, frames: list[bytes], now: float) -> None:
        """The detokenizer's news: one encoded frame for each client that the head names."""
        for name, finished, frame in zip(head.clients, head.finished, frames, strict=True):
            client = self.table.client_named(name)
            if client is None:
                # Its requests are cancelled, and these are their ends; what it owed is nobody's debt.
                self._send(Peer.DETOKENIZER, ClientGone(client=name))
            else:
                self._send_outputs(client, frame, now)
            for key in finished:
                request = self.table.request(key)
                if request is not None:
                    self._close(request, now)

    # Time

    def _expire(self, now: float) -> None:
        """End the requests whose time runs out before they reach the scheduler."""
        if due := self._intake.take_due(_ns(now)):
            self._end(self._intake.stop(due), now)

    def tick(self, now: float) -> None:
        """End requests that are out of time, and drop clients that have vanished or stopped reading.

        Call at least as often as `timeout_s` says.
        """
        self._expire(now)
        if now >= self._drain_deadline:
            self._drain_deadline = float("inf")
            self._answer_all("the engine was stopped before this request was finished")
        if now < self._next_probe:
            return
        self._next_probe = now + PROBE_INTERVAL_S
        patience = self._bootstrap.frontend.slow_client_timeout_s
        for client in list(self.table.clients):
            if client.num_outputs >= self._bootstrap.client_window and now - client.last_progress > patience:
                logger.warning("a client has taken in nothing for %g s and is dropped", patience)
                error = RequestFailed(f"cancelled: this client took in no output for {patience:g} s")
                self._answer_open_requests(client, error)
                self._drop(client)
                self._deaf.setdefault(client.identity, [])
            elif not client.was_sent_to:
                self._send(Peer.CLIENT, Alive(), client.identity)
            client.was_sent_to = False
        for identity, outputs in self._deaf.items():
            for message in outputs:
                self._send(Peer.CLIENT, message, identity)
            if not outputs:
                self._send(Peer.CLIENT, Alive(), identity)
            outputs.clear()


def _ns(now: float) -> int:
    """Seconds as the nanoseconds of messages and timers."""
    return round(now * 1e9)
