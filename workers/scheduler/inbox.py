"""The messages to the scheduler: who sent them, what becomes of them, and what the gateway is told.

Messages of a process that was started again are dropped: they name what the scheduler has let go of. The launcher tells
the scheduler of the new process before it starts it, so a message of an unknown process says: look at the launcher's
channel first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import zmq

from ipc.channels import receive_from
from ipc.identity import name_of
from ipc.messages import (
    Accepted,
    CacheCleared,
    ClearCache,
    Compiled,
    Fenced,
    MatcherFailed,
    SchedulerToGateway,
    Tokenized,
    ToScheduler,
    Withdraw,
    Withdrawn,
)
from workers.bootstrap import WorkerBootstrap
from workers.scheduler.admission.admission import Arrival
from workers.scheduler.outbox import Outbox
from workers.scheduler.scheduler import Scheduler

MAX_MESSAGES: Final = 32  # received between two looks at the result ring: 1-2 ms, so a burst delays no step for long


class Inbox:
    """Hands messages to the scheduler, and puts the answers for the gateway into the outbox, in order.

    `Accepted` says that a request has arrived, so that the detokenizer will answer it; this holds for a refused request
    too. The gateway gets the `Accepted` of a request before a `Withdrawn` of the same request, and before the `Fenced`
    of the tokenizer that it came from. `take_bootstraps` has `rewire` called with what the launcher has sent.
    """

    def __init__(
        self,
        schedule: zmq.Socket[Any],
        scheduler: Scheduler,
        outbox: Outbox,
        worker: WorkerBootstrap,
        take_bootstraps: Callable[[], None],
    ) -> None:
        self._schedule = schedule
        self._scheduler = scheduler
        self._outbox = outbox
        self._take_bootstraps = take_bootstraps
        self._accepted: list[int] = []
        self._answers: list[SchedulerToGateway] = []
        self._use(worker)

    def _use(self, worker: WorkerBootstrap) -> None:
        self._gateway = worker.peer("gateway")
        self._tokenizers = worker.peers["tokenizer"]
        self.grammars = worker.peers.get("grammar", [])
        self._alive = {identity for identities in worker.peers.values() for identity in identities}

    def take(self) -> None:
        """Take in up to MAX_MESSAGES messages."""
        for sender, message in receive_from(self._schedule, ToScheduler, MAX_MESSAGES):
            if sender not in self._alive:
                self._take_bootstraps()
            if sender in self._alive:
                self._take_message(sender, message)
        self._send_answers()

    def _take_message(self, sender: bytes, message: Any) -> None:
        scheduler = self._scheduler
        if isinstance(message, Tokenized):
            if scheduler.add(message) is not Arrival.WITHDRAWN:
                self._accepted.append(message.key)
        elif isinstance(message, Compiled):
            scheduler.compiled(self.grammars.index(sender), message)
        elif isinstance(message, MatcherFailed):
            scheduler.matcher_failed(message)
        elif isinstance(message, ClearCache):
            scheduler.clear_cache()
            self._answers.append(CacheCleared(query_id=message.query_id))
        elif isinstance(message, Withdraw):
            if withdrawn := scheduler.withdraw(message.keys):
                self._answers.append(Withdrawn(keys=withdrawn))
        else:
            scheduler.cancel(message.keys)

    def _send_answers(self) -> None:
        if self._accepted:
            self._outbox.add(self._gateway, [Accepted(keys=self._accepted)])
        if self._answers:
            self._outbox.add(self._gateway, self._answers)
        self._accepted, self._answers = [], []

    def rewire(self, worker: WorkerBootstrap) -> None:
        """Tokenizers or grammar processes were started again."""
        self._send_answers()
        tokenizers, grammars = self._tokenizers, self.grammars
        self._use(worker)
        for index, (old, new) in enumerate(zip(tokenizers, self._tokenizers, strict=True)):
            if old != new:
                self._scheduler.prompts.fence(index + 1)  # ring 0 is our own
                self._outbox.add(self._gateway, [Fenced(tokenizer=old)])
        for index, (old, new) in enumerate(zip(grammars, self.grammars, strict=True)):
            if old != new:
                name = name_of(old)
                self._scheduler.lose_grammar_worker(index, was_ready=name not in worker.died_starting)
                self._outbox.forget(old)
