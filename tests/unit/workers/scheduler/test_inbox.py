"""What becomes of messages to the scheduler whose senders live, have died, or are not known yet."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ipc.messages import (
    Accepted,
    CacheCleared,
    CancelRequests,
    ClearCache,
    Compiled,
    Fenced,
    Route,
    Tokenized,
    Withdraw,
    Withdrawn,
)
from ipc.sampling_params import SamplingParams
from ipc.stats_page import StatsHandle
from ipc.structured_outputs import StructuredOutputs
from tests.simulation.scheduled_engine import ScheduledEngine
from workers.bootstrap import WorkerBootstrap
from workers.scheduler import inbox as module
from workers.scheduler.inbox import Inbox

GATEWAY, TOKENIZER, GRAMMAR = b"gateway@1", b"tokenizer.0@1", b"grammar.0@1"
NO_SOCKET: Any = None


class SentMessages:
    """In place of the outbox."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, Any]] = []
        self.forgotten: list[bytes] = []

    def add(self, peer: bytes, messages: list[Any]) -> None:
        self.sent += [(peer, message) for message in messages]

    def forget(self, peer: bytes) -> None:
        self.forgotten.append(peer)


class Surroundings:
    """An inbox whose messages the test gives. `launcher` has further bootstraps that nobody has looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = ScheduledEngine(num_grammar_workers=1)
        self.outbox = SentMessages()
        self.launcher: list[WorkerBootstrap] = []
        self.worker = WorkerBootstrap(
            role="scheduler",
            launcher_pid=0,
            doorbell_fd=0,
            stats=StatsHandle("scheduler", 0, (), {}),
            peers={"gateway": [GATEWAY], "tokenizer": [TOKENIZER], "grammar": [GRAMMAR]},
        )
        outbox: Any = self.outbox
        self.inbox = Inbox(NO_SOCKET, self.engine.scheduler, outbox, self.worker, self._take_bootstraps)
        self._arrived: list[tuple[bytes, Any]] = []
        monkeypatch.setattr(module, "receive_from", lambda *_: iter(self._arrived))

    def _take_bootstraps(self) -> None:
        while self.launcher:
            self.inbox.rewire(self.launcher.pop(0))

    def replaced(self, role: str, identity: bytes) -> WorkerBootstrap:
        self.worker = msgspec.structs.replace(self.worker, peers={**self.worker.peers, role: [identity]})
        return self.worker

    def take(self, *arrived: tuple[bytes, Any]) -> list[tuple[bytes, Any]]:
        """Take these messages in. Returns what is sent then."""
        self._arrived = list(arrived)
        self.outbox.sent.clear()
        self.inbox.take()
        return self.outbox.sent

    def arrival(self, key: int, **fields: Any) -> Tokenized:
        ticket = self.engine.publish_prompt([key])
        route = Route(client=b"c", request_id=str(key), stream=True)
        params = SamplingParams(max_tokens=2, **fields)
        return Tokenized(key, route, params, 0, 1, ticket, num_prompt_tokens=1)


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Surroundings:
    return Surroundings(monkeypatch)


def test_a_request_that_arrives_together_with_its_withdrawal_is_either_accepted_or_withdrawn(
    surroundings: Surroundings,
) -> None:
    first, second, third = (surroundings.arrival(key) for key in (1, 2, 3))
    take = surroundings.take
    assert take((GATEWAY, Withdraw(keys=[1])), (TOKENIZER, first)) == [(GATEWAY, Withdrawn(keys=[1]))]
    assert take((TOKENIZER, second), (GATEWAY, Withdraw(keys=[2]))) == [(GATEWAY, Accepted(keys=[2]))]
    third_ends = (GATEWAY, CancelRequests(keys=[3])), (GATEWAY, Withdraw(keys=[3]))
    assert take((TOKENIZER, third), *third_ends) == [(GATEWAY, Accepted(keys=[3])), (GATEWAY, Withdrawn(keys=[3]))]


def test_the_gateway_hears_of_all_that_was_accepted_from_a_dead_tokenizer_before_the_fence(
    surroundings: Surroundings,
) -> None:
    surroundings.launcher.append(surroundings.replaced("tokenizer", b"tokenizer.0@2"))
    sent = surroundings.take(
        (TOKENIZER, surroundings.arrival(1)),
        (b"tokenizer.0@2", surroundings.arrival(2)),  # unknown: the launcher has told us, and we have not looked
        (TOKENIZER, surroundings.arrival(3)),
    )
    assert sent == [
        (GATEWAY, Accepted(keys=[1])),
        (GATEWAY, Fenced(tokenizer=TOKENIZER)),
        (GATEWAY, Accepted(keys=[2])),
    ]
    surroundings.engine.drain()
    assert surroundings.engine.tokens.keys() == {1, 2}


def test_a_fence_frees_the_records_of_prompts_that_never_arrived(surroundings: Surroundings) -> None:
    engine = surroundings.engine
    accepted, _ = surroundings.arrival(1), surroundings.arrival(2)
    surroundings.take((TOKENIZER, accepted))
    surroundings.inbox.rewire(surroundings.replaced("tokenizer", b"tokenizer.0@2"))
    engine.drain()
    assert engine.tokens.keys() == {1}
    engine.check_empty()


def test_messages_of_an_identity_that_never_was_are_dropped(surroundings: Surroundings) -> None:
    surroundings.take((TOKENIZER, surroundings.arrival(1)))
    stranger = (b"\x00\x81", CancelRequests(keys=[1])), (b"gateway@0", ClearCache(query_id=b"q"))
    assert surroundings.take(*stranger) == []
    assert surroundings.take((GATEWAY, ClearCache(query_id=b"q"))) == [(GATEWAY, CacheCleared(query_id=b"q"))]
    surroundings.engine.drain()
    assert surroundings.engine.ends == {1: "length"}


def test_what_a_dead_grammar_process_compiled_is_dropped_and_its_messages_are_forgotten(
    surroundings: Surroundings,
) -> None:
    asked = {"structured_outputs": StructuredOutputs(regex="a")}
    surroundings.take((TOKENIZER, surroundings.arrival(1, **asked)))
    engine = surroundings.engine
    engine.grammar.hear(engine.scheduler)
    surroundings.inbox.rewire(surroundings.replaced("grammar", b"grammar.0@2"))
    assert surroundings.outbox.forgotten == [GRAMMAR]
    assert surroundings.inbox.grammars == [b"grammar.0@2"]
    engine.grammar.restart(0)
    surroundings.take((GRAMMAR, Compiled(key=1)), (TOKENIZER, surroundings.arrival(2, **asked)))
    engine.grammar.hear(engine.scheduler)
    assert [compile.key for _, compile in engine.grammar.compiles] == [2]
    surroundings.take((b"grammar.0@2", Compiled(key=2)))
    engine.grammar.compiles.clear()
    engine.drain()
    assert engine.ends == {1: "error", 2: "length"}
    assert engine.errors[1][0] == "interrupted"
    engine.check_empty()
