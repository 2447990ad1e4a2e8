"""Flow control towards clients: sends their outputs, counts what they acknowledge, finds those that stopped reading.

Every `Outputs` message costs a client one credit until the client acknowledges it with `Delivered`. The detokenizer
keeps within `client_window`. An untrusted client may ignore flow control: it never acknowledges, or it never reads.
Such a client is suspended. Its requests are cancelled, and it may send no new ones until it acknowledges something;
otherwise each new request could leave another window of outputs unread. Knows requests only by their ids.

Large answers to queries cost no credit. Each has a receipt, by which `unread_answers.py` bounds them.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np

from ipc.errors import InvalidRequest, QueueFull, RingfeedError, error_from_code
from ipc.messages import (
    Alive,
    ClientCredit,
    DetokenizedText,
    FinalOutput,
    KeptValue,
    Outputs,
    PromptTokens,
    TokenizeDone,
)
from workers.gateway.client_frames import MAX_ERROR_CHARS
from workers.gateway.config import GatewayBootstrap
from workers.gateway.outbox import Outbox, Peer
from workers.gateway.request_table import ClientSession, RequestTable, SampleEnd
from workers.gateway.unread_answers import UnreadAnswers

PROBE_INTERVAL_S: Final = 1.0
MAX_ANSWERED: Final = 8_192  # requests in one Outputs message of the gateway's own


class ClientFlow:
    """Sends outputs and probes to clients. Times are seconds."""

    def __init__(self, bootstrap: GatewayBootstrap, table: RequestTable, outbox: Outbox) -> None:
        self._window = bootstrap.client_window
        self._timeout_s = bootstrap.frontend.slow_client_timeout_s
        self._table = table
        self._outbox = outbox
        # Suspended clients by identity, each with the outputs for which its queue had no room.
        self._suspended: dict[bytes, list[Outputs | bytes]] = {}
        self._unread = UnreadAnswers()

    @property
    def needs_probes(self) -> bool:
        return bool(self._table.clients or self._suspended or self._unread.clients)

    # Outputs

    def send_outputs(self, client: ClientSession, outputs: Outputs | bytes, now: float) -> None:
        """Send one Outputs message, encoded or not. The client owes an acknowledgement for it."""
        if client.num_outputs == 0:
            client.last_progress = now
        client.num_outputs += 1
        client.was_sent_to = True
        self._outbox.add(Peer.CLIENT, outputs, client.identity)

    def send_finals(self, client: ClientSession, finals: list[SampleEnd], now: float) -> None:
        """Send final answers of requests that the detokenizer does not know."""
        for start in range(0, len(finals), MAX_ANSWERED):
            part = finals[start : start + MAX_ANSWERED]
            samples = [end.sample for end in part]
            outputs = Outputs(
                request_ids=[end.request_id for end in part],
                texts=[""] * len(part),
                num_token_ids=bytes(4 * len(part)),
                token_ids=b"",
                finals=[(index, end.final) for index, end in enumerate(part)],
                samples=np.array(samples, "<i4").tobytes() if any(samples) else b"",
            )
            client.num_own_outputs += 1
            self.send_outputs(client, outputs, now)

    def send_errors(self, client: ClientSession, error: RingfeedError) -> None:
        """Answer all open requests of a client with an error. The caller then takes them out of the table."""
        final = FinalOutput("error", 0, 0, error.code, str(error)[:MAX_ERROR_CHARS])
        self.send_finals(client, [SampleEnd(request_id, 0, final) for request_id in client.keys], client.last_progress)

    def send_answer(self, identity: bytes, answer: PromptTokens | DetokenizedText | KeptValue) -> None:
        """Send a large answer, with a new receipt. Raises QueueFull if the client has left too much unread."""
        receipt = self._unread.add(identity, _num_bytes(answer))
        self._outbox.add(Peer.CLIENT, msgspec.structs.replace(answer, receipt=receipt), identity)

    def answer_query(self, client: ClientSession, request_id: str, done: TokenizeDone, now: float) -> None:
        """Send a tokenizer's answer to a query, or the error that ends the query."""
        error: RingfeedError
        if done.answer is None:
            error = error_from_code(done.error_code, done.error_message)
        else:
            try:
                self.send_answer(client.identity, done.answer)
            except QueueFull as full:
                error = full
            else:
                return
        final = FinalOutput("error", 0, 0, error.code, str(error), retry_after_s=error.retry_after_s)
        self.send_finals(client, [SampleEnd(request_id, 0, final)], now)

    # Acknowledgements

    def received(self, identity: bytes, receipts: list[int]) -> None:
        """A client has read the answers with these receipts."""
        self._unread.received(identity, receipts)

    def acknowledge(self, identity: bytes, count: int, now: float) -> None:
        """A client has received `count` Outputs messages. It gets no credit for more than were sent."""
        if count < 1:
            raise InvalidRequest(f"count ({count}) must be at least 1")
        for outputs in self._suspended.pop(identity, []):
            self._outbox.add(Peer.CLIENT, outputs, identity)
        client = self._table.client(identity)
        count = 0 if client is None else min(count, client.num_outputs)
        if client is None or count == 0:
            return
        client.num_outputs -= count
        client.last_progress = now
        # Which messages it took in does not matter: in the end the detokenizer gets back the credit that it spent.
        own = min(count, client.num_own_outputs)
        client.num_own_outputs -= own
        if count > own:
            self._outbox.add(Peer.DETOKENIZER, ClientCredit(client=client.name, count=count - own))
        self._table.forget_if_idle(client)

    def check_not_suspended(self, identity: bytes) -> None:
        """Raise QueueFull for a suspended client."""
        if identity in self._suspended:
            raise QueueFull(
                "this client was suspended because it stopped reading: read the pending output and acknowledge it "
                "with `Delivered`",
                PROBE_INTERVAL_S,  # by then the gateway sends again what the client has not read
            )

    # Clients that do not read

    def suspend(self, identity: bytes, unsent: Any = None) -> None:
        """Suspend a client. Keeps `unsent` if it is an Outputs message, to send it again; other answers are lost.

        So every request gets its final answer if the client reads on. The client's window bounds what is kept.
        """
        kept = self._suspended.setdefault(identity, [])
        if isinstance(unsent, Outputs | bytes):
            kept.append(unsent)

    def forget(self, identity: bytes) -> None:
        """A client has gone, so its suspension ends, and its unread answers are gone too."""
        self._suspended.pop(identity, None)
        self._unread.forget(identity)

    def slow_clients(self, now: float) -> list[ClientSession]:
        """Clients with a full window of outputs that have acknowledged nothing for `slow_client_timeout_s`."""
        return [
            client
            for client in self._table.clients
            if client.num_outputs >= self._window and now - client.last_progress > self._timeout_s
        ]

    def probe(self) -> None:
        """Send something to every client, so that the worker notices those that have gone."""
        for client in self._table.clients:
            if not client.was_sent_to:
                self._outbox.add(Peer.CLIENT, Alive(), client.identity)
            client.was_sent_to = False
        for identity, kept in self._suspended.items():
            for message in kept or (Alive(),):
                self._outbox.add(Peer.CLIENT, message, identity)
            kept.clear()
        for identity in self._unread.clients - self._suspended.keys():
            if self._table.client(identity) is None:
                self._outbox.add(Peer.CLIENT, Alive(), identity)


def _num_bytes(answer: PromptTokens | DetokenizedText | KeptValue) -> int:
    """About the size of the answer's frame."""
    if isinstance(answer, PromptTokens):
        table = answer.token_bytes
        return sum(map(len, (answer.token_ids, table.token_ids, table.lengths, table.data)))
    return len(answer.value if isinstance(answer, KeptValue) else answer.text.encode())
