"""Tokenizers and cores that die at any time: every request has one answer, and no prompt is lost or accepted twice.

Random traces over the real core and the real handling of messages. The sockets are queues, and all other processes and
the launcher are played here, every one of them as late as it likes.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
import zmq

from ipc.codec import decode, encode
from ipc.errors import Interrupted, RequestFailed
from ipc.messages import (
    Accepted,
    Cancel,
    CancelRequests,
    ClientRequest,
    Delivered,
    Delivery,
    Fenced,
    FinalOutput,
    GatewayToClient,
    GatewayToTokenizer,
    Outputs,
    PromptTokens,
    SchedulerToGateway,
    Tokenize,
    TokenizeDone,
    TokenizeQuery,
    TokenizerQuery,
    ToScheduler,
    Withdraw,
    Withdrawn,
)
from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import SchedulingParams
from ipc.tracer import tracer
from tests.unit.workers.gateway.gateway_tools import answer_to, bootstrap, generate, snapshot_stats
from workers.gateway import prompt_dispatch
from workers.gateway.config import GatewayBootstrap
from workers.gateway.core import Gateway
from workers.gateway.prompt_dispatch import PromptDispatcher
from workers.gateway.recovery import _POISON, Recovery
from workers.gateway.worker import GatewayWorker
from workers.queueing.policies import FairShare

NUM_TRACES = 40
NUM_TOKENIZERS = 2
CLIENTS = (b"a", b"b", b"c")
DEADLY = "deadly "  # a prompt that begins so ends the tokenizer that encodes it


class Socket:
    """A socket as the worker sees it. `connected`: a ROUTER's peers. It may notice late that one has died."""

    def __init__(self, connected: set[bytes] | None = None, rng: random.Random | None = None) -> None:
        self.inbox: deque[list[bytes]] = deque()
        self.sent: list[list[bytes]] = []
        self._connected = connected
        self._rng = rng or random.Random(0)

    def recv_multipart(self, flags: int) -> list[bytes]:
        if not self.inbox:
            raise zmq.Again
        return self.inbox.popleft()

    def send_multipart(self, frames: tuple[bytes, ...], **_: Any) -> None:
        if self._connected is not None and frames[0] not in self._connected and self._rng.random() < 0.5:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        self.sent.append(list(frames))

    def send(self, frame: bytes) -> None:
        self.sent.append([frame])

    def take_sent(self) -> list[list[bytes]]:
        sent, self.sent = self.sent, []
        return sent


class Process:
    """In place of the worker's process. `launcher` has bootstraps that the gateway has not taken in."""

    def __init__(self) -> None:
        self.launcher: deque[GatewayBootstrap] = deque()
        self.trace = tracer(None)
        self.rewire: Callable[[GatewayBootstrap], None]
        self.schedule: dict[int, Socket] = {1: Socket()}  # by the scheduler's epoch
        self.watch: Callable[[Any], None] = lambda _: None
        self._scheduler = 1

    def take_bootstraps(self) -> None:
        while self.launcher:
            bootstrap = self.launcher.popleft()
            self._scheduler = int(bootstrap.worker.peers["detokenizer"][0].rpartition(b"@")[2])  # they restart together
            self.rewire(bootstrap)

    def reconnect(self, name: str, former: Socket) -> Socket:
        return self.schedule[self._scheduler] if name == "schedule" else Socket()


class Scheduler:
    """What the scheduler does with messages. One of each epoch."""

    def __init__(self, epoch: int, tokenizers: list[bytes], schedule: Socket) -> None:
        self.launcher: deque[list[bytes]] = deque()  # identities of tokenizers
        self.detokenizer = f"detokenizer@{epoch}".encode()
        self.inbox: dict[bytes, deque[Any]] = {b"gateway@1": deque()}
        self.accepted: set[int] = set()
        self.running: dict[int, Tokenize] = {}
        self.withdrawn: set[int] = set()
        self.schedule = schedule
        self._tokenizers = tokenizers

    def tell_gateway(self, message: Any) -> None:
        self.schedule.inbox.append([encode(message)])

    def take_bootstraps(self) -> None:
        while self.launcher:
            before, self._tokenizers = self._tokenizers, self.launcher.popleft()
            for old in set(before) - set(self._tokenizers):
                self.tell_gateway(Fenced(tokenizer=old))

    def take_message(self, sender: bytes) -> None:
        message = self.inbox[sender].popleft()
        if sender != b"gateway@1" and sender not in self._tokenizers:
            self.take_bootstraps()
        if isinstance(message, Tokenize) and sender in self._tokenizers:
            if message.key in self.withdrawn:
                self.withdrawn.remove(message.key)
                return
            assert message.key not in self.accepted, "a prompt is accepted twice"
            self.accepted.add(message.key)
            self.running[message.key] = message
            self.tell_gateway(Accepted(keys=[message.key]))
        elif isinstance(message, Withdraw):
            absent = [key for key in message.keys if key not in self.running]
            self.withdrawn.update(absent)
            if absent:
                self.tell_gateway(Withdrawn(keys=absent))
        elif isinstance(message, CancelRequests):
            self.withdrawn.difference_update(message.keys)


class Trace:
    """One life of a gateway from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.policy = rng.choice(["fifo", "priority", "fair"])
        self.now = 100.0
        self.epochs = {f"tokenizer.{i}": 1 for i in range(NUM_TOKENIZERS)} | {"scheduler": 1}
        self.connected: set[bytes] = set()
        self.process = Process()
        made = bootstrap(policy={"policy": self.policy}, tokenizer_window=rng.choice([1, 2, 4]))
        self.bootstrap: GatewayBootstrap = msgspec.structs.replace(made, worker=self._with_peers(made.worker))
        self.core = Gateway(self.bootstrap, snapshot_stats)
        self.core.serving.start(0.0)
        self.clients, self.deliveries, self.tokenizers = Socket(), Socket(), Socket(self.connected, rng)
        self.worker = self._worker()
        self.process.rewire = self._rewire
        self.scheduler = Scheduler(1, self.identities(), self.process.schedule[1])
        self.inboxes: dict[bytes, deque[GatewayToTokenizer]] = {}
        self.unfenced: set[bytes] = set()  # dead tokenizers of which the gateway was told
        self.fenced: set[bytes] = set()
        self.requests: dict[str, tuple[bytes, ClientRequest]] = {}
        self.names: dict[int, str] = {}  # request ids by key
        self.finals: dict[str, list[FinalOutput]] = {}
        self.queries_answered: Counter[str] = Counter()
        self.has_output: set[str] = set()
        self.num_deaths_under_way: Counter[str] = Counter()
        self.num_killed: Counter[str] = Counter()
        self.gone: set[bytes] = set()

    def _worker(self) -> Any:
        worker: Any = object.__new__(GatewayWorker)
        worker.process, worker.bootstrap, worker.core = self.process, self.bootstrap, self.core
        worker.peers = self.bootstrap.worker.peers
        worker.clients = SimpleNamespace(router=self.clients)
        worker.deliveries, worker.tokenizers = self.deliveries, self.tokenizers
        worker.scheduler, worker.detokenizer = self.process.schedule[1], Socket()
        worker._read_scheduler = self._read_scheduler
        return worker

    def identities(self) -> list[bytes]:
        return [f"{name}@{epoch}".encode() for name, epoch in self.epochs.items() if name != "scheduler"]

    def _with_peers(self, worker: Any) -> Any:
        peers = {"tokenizer": self.identities(), "detokenizer": [f"detokenizer@{self.epochs['scheduler']}".encode()]}
        return msgspec.structs.replace(worker, peers=peers)

    def _rewire(self, bootstrap: GatewayBootstrap) -> None:
        if bootstrap.worker.peers["detokenizer"] == self.worker.peers["detokenizer"]:
            for identity in set(self.worker.peers["tokenizer"]) - set(bootstrap.worker.peers["tokenizer"]):
                self.unfenced.add(identity)
                load = self.core.requests.prompts._loads.get(identity)
                for prompt in load.prompts.values() if load is not None else ():
                    self.num_deaths_under_way[self.names[prompt.key]] += prompt.was_sent
        else:
            self.unfenced.clear()
        self.worker._on_rewire(bootstrap)

    # Clients

    def send(self) -> None:
        rng = self.rng
        client = rng.choice([name for name in CLIENTS if name not in self.gone])
        request_id, prompt = f"r{len(self.requests)}", rng.choice(["", "", "", "", DEADLY]) + "x" * rng.choice([1, 300])
        scheduling = SchedulingParams(
            priority=rng.randint(-2, 2) if self.policy == "priority" else 0, tenant=rng.choice("pq"),
            deadline_s=rng.choice([None, None, 3.0]), queue_timeout_s=rng.choice([None, None, 1.0]),
        )  # fmt: skip
        message: ClientRequest
        if rng.random() < 0.2:
            message = TokenizeQuery(request_id=request_id, prompt=prompt, scheduling=scheduling)
        else:
            params = SamplingParams(n=rng.choice([1, 3]))
            message = generate(request_id, prompt=prompt, params=params, scheduling=scheduling)
        self.requests[request_id] = client, message
        self.names[self.core.table._last_key + 1] = request_id
        self.core.client_frames(client, [encode(message)], self.now)

    def cancel(self) -> None:
        client, message = self.rng.choice(list(self.requests.values()))
        self.core.client_frames(client, [encode(Cancel(request_id=message.request_id))], self.now)

    def leave(self) -> None:
        client = self.rng.choice(CLIENTS[:2])
        self.gone.add(client)
        self.core.client_gone(client)

    def pass_time(self) -> None:
        self.now += self.rng.choice([0.1, 0.5])

    # Tokenizers

    def connect(self) -> None:
        for identity in self.identities():
            if identity not in self.connected:
                self.connected.add(identity)
                self.inboxes[identity] = deque()
                self.tokenizers.inbox.append([identity, encode(TokenizeDone(key=0))])
                return

    def tokenize(self) -> None:
        busy = [identity for identity, inbox in self.inboxes.items() if inbox]
        if not busy:
            return
        identity = self.rng.choice(busy)
        message = self.inboxes[identity][0]
        prompt = message.prompt if isinstance(message, Tokenize) else getattr(message.query, "prompt", "")
        if str(prompt).startswith(DEADLY):
            name = self.names[message.key]
            self.num_killed[name] += 1
            # The gateway may blame the prompt before it, or forget a death when the core dies too.
            at_most = prompt_dispatch.MAX_DEATHS + self.epochs["scheduler"]
            assert self.num_killed[name] <= at_most, "a prompt ends one tokenizer after the other"
            self.kill_tokenizer(identity)
            return
        self.inboxes[identity].popleft()
        done = TokenizeDone(key=message.key)
        if isinstance(message, TokenizerQuery):
            done = answer_to(message)
        else:
            self.scheduler.inbox.setdefault(identity, deque()).append(message)
        self.tokenizers.inbox.append([identity, encode(done)])

    def kill_tokenizer(self, identity: bytes = b"") -> None:
        """A tokenizer dies, and what it had not written to its sockets dies with it."""
        identity = identity or self.rng.choice(self.identities())
        name = identity.decode().partition("@")[0]
        unread = self.scheduler.inbox.get(identity, deque())
        for _ in range(self.rng.randint(0, len(unread))):
            unread.pop()
        self.epochs[name] += 1
        self._bury(identity)
        self.scheduler.launcher.append(self.identities())
        self._rewire_gateway()

    def _bury(self, identity: bytes) -> None:
        done = [frames for frames in self.tokenizers.inbox if frames[0] == identity]
        for frames in done[len(done) - self.rng.randint(0, len(done)) :]:
            self.tokenizers.inbox.remove(frames)
        self.inboxes.pop(identity, None)
        self.connected.discard(identity)

    def _rewire_gateway(self) -> None:
        self.bootstrap = msgspec.structs.replace(self.bootstrap, worker=self._with_peers(self.bootstrap.worker))
        self.process.launcher.append(self.bootstrap)

    # The core

    def schedule(self) -> None:
        scheduler = self.scheduler
        if scheduler.launcher and self.rng.random() < 0.2:
            scheduler.take_bootstraps()
        if senders := [sender for sender, inbox in scheduler.inbox.items() if inbox]:
            scheduler.take_message(self.rng.choice(senders))

    def generate(self) -> None:
        """The detokenizer has tokens of a request, perhaps its last ones."""
        if self.scheduler.running:
            key = self.rng.choice(list(self.scheduler.running))
            self._deliver(key, is_final=self.rng.random() < 0.5)

    def _deliver(self, key: int, *, is_final: bool) -> None:
        route = self.scheduler.running[key].route
        finals = [(0, FinalOutput("length", 1, 1))] if is_final else []
        outputs = Outputs(
            request_ids=[route.request_id], texts=["x"], num_token_ids=bytes(4), token_ids=b"", finals=finals
        )
        head = Delivery(clients=[route.client], finished=[[key] if is_final else []])
        self.deliveries.inbox.append([self.scheduler.detokenizer, encode(head), encode(outputs)])
        if is_final:
            del self.scheduler.running[key]

    def kill_core(self) -> None:
        for _ in range(self.rng.randint(0, len(self.scheduler.schedule.inbox))):
            self.scheduler.schedule.inbox.pop()
        for identity in self.identities():
            self._bury(identity)
        self.epochs = {name: epoch + 1 for name, epoch in self.epochs.items()}
        epoch = self.epochs["scheduler"]
        self.process.schedule[epoch] = Socket()
        self.scheduler = Scheduler(epoch, self.identities(), self.process.schedule[epoch])
        self._rewire_gateway()

    # The gateway

    def turn(self) -> None:
        """One turn of the gateway's loop, and a look at what came of it."""
        if self.rng.random() < 0.8:  # else the launcher's message comes after `wait` has returned
            self.process.take_bootstraps()
        self.worker._read_workers(self.now)
        self.core.tick(self.now)
        self.worker._flush()
        for identity, frame in self.tokenizers.take_sent():
            self._dispatched(identity, decode(frame, GatewayToTokenizer))
        for frames in self.worker.scheduler.take_sent():
            if self.worker.scheduler is self.scheduler.schedule:
                self.scheduler.inbox[b"gateway@1"].append(decode(frames[0], ToScheduler))
        while sent := self.clients.take_sent():
            for client, frame in sent:
                self._heard(client, decode(frame, GatewayToClient))
            self.worker._flush()
        self.check()

    def _read_scheduler(self, now: float) -> None:
        messages = [decode(frame, SchedulerToGateway) for [frame] in self.worker.scheduler.inbox]
        self.fenced |= {message.tokenizer for message in messages if isinstance(message, Fenced)}
        GatewayWorker._read_scheduler(self.worker, now)

    def _dispatched(self, identity: bytes, message: GatewayToTokenizer) -> None:
        if identity not in self.worker.peers["tokenizer"]:
            return  # it was on its way when the gateway was told
        name = identity.partition(b"@")[0]
        assert not any(dead.partition(b"@")[0] == name for dead in self.unfenced - self.fenced), (
            "it is sent before the fence"
        )
        if identity in self.inboxes:
            self.inboxes[identity].append(message)

    def _heard(self, client: bytes, message: Any) -> None:
        if isinstance(message, PromptTokens):
            self.queries_answered[message.request_id] += 1
        if not isinstance(message, Outputs):
            return
        for request_id in message.request_ids:
            assert request_id not in self.finals, f"{request_id} hears something after its end"
            self.has_output.add(request_id)
        for index, final in message.finals:
            self.finals.setdefault(message.request_ids[index], []).append(final)
        if client not in self.gone:
            self.core.client_frames(client, [encode(Delivered(count=1))], self.now)

    def check(self) -> None:
        prompts = self.core.requests.prompts
        waiting = [*prompts._waiting.values(), *prompts._suspects.values()]
        assert prompts.num_bytes == sum(prompt.held_bytes for prompt in waiting), "memory is miscounted"
        for key in prompts._waiting.keys() | prompts._suspects.keys():
            assert self.names[key] not in self.has_output, "a request begins again that its client has a part of"
        for load in prompts._loads.values():
            suspects = [prompt for prompt in load.prompts.values() if prompt.num_deaths]
            assert not suspects or len(load.prompts) == 1, "a suspect is not alone"

    # A whole life

    def run(self) -> None:
        events: list[tuple[Callable[[], None], float]] = [
            (self.send, 2.0), (self.tokenize, 3.0), (self.schedule, 4.0), (self.generate, 2.0), (self.turn, 5.0),
            (self.connect, 1.0), (self.pass_time, 0.3), (self.cancel, 0.3), (self.leave, 0.01),
            (self.kill_tokenizer, self.rng.choice([0.0, 0.3])), (self.kill_core, self.rng.choice([0.0, 0.2])),
        ]  # fmt: skip
        self.send()
        for event in self.rng.choices([each for each, _ in events], [weight for _, weight in events], k=250):
            event()
        self.come_to_rest()

    def come_to_rest(self) -> None:
        for _ in range(10_000):
            self.rng.choice([self.tokenize, self.schedule, self.connect, self.generate, self.turn])()
            scheduler = self.scheduler
            queues = [*self.inboxes.values(), *scheduler.inbox.values(), self.deliveries.inbox, self.tokenizers.inbox]
            is_idle = not (any(queues) or scheduler.running or scheduler.launcher or scheduler.schedule.inbox)
            if is_idle and not self.process.launcher and not len(self.core.table):
                break
        else:
            raise AssertionError(f"requests are lost: {[each.state for each in self.core.table.requests()]}")
        for _ in range(20):
            self.turn()
            self.schedule()
        self.check_rest()

    def check_rest(self) -> None:
        prompts = self.core.requests.prompts
        assert (prompts.num_waiting, prompts.num_bytes) == (0, 0)
        assert not [*prompts._sent, *prompts._dead, *prompts._charged], "a prompt is kept"
        assert not any(load.prompts or load.num_bytes for load in prompts._loads.values())
        if isinstance(prompts._policy, FairShare):
            assert not prompts._policy._tenants, "a tenant is remembered"
        assert not self.scheduler.withdrawn, "the scheduler waits for what will not come"
        for request_id, (client, message) in self.requests.items():
            finals = self.finals.get(request_id, [])
            num_answers = len(finals) + self.queries_answered[request_id]
            assert num_answers == 1 or client in self.gone, f"{request_id} has {num_answers} answers"
            for final in finals:
                if final.error_code == RequestFailed.code:
                    assert final.error_message == _POISON
                    assert self.num_deaths_under_way[request_id] >= prompt_dispatch.MAX_DEATHS
                if final.error_code == Interrupted.code:
                    assert isinstance(message, type(generate("r"))), "a query is interrupted"


def run_traces(seeds: range) -> Counter[str]:
    """The errors that requests ended with."""
    errors: Counter[str] = Counter()
    for seed in seeds:
        trace = Trace(seed)
        try:
            trace.run()
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        errors.update(final.error_code for finals in trace.finals.values() for final in finals)
    return errors


def test_every_request_has_one_answer_whatever_dies_and_no_prompt_is_lost_or_accepted_twice() -> None:
    errors = run_traces(range(NUM_TRACES))
    assert errors[RequestFailed.code] > 5
    assert errors[Interrupted.code] > 5


@pytest.mark.slow
def test_every_request_has_one_answer_in_many_more_traces() -> None:
    run_traces(range(NUM_TRACES, NUM_TRACES + 800))


# Faults that must be found


def send_before_the_fence(prompts: PromptDispatcher, load: Any) -> bool:
    """A new tokenizer gets prompts while the scheduler may still clear its ring."""
    return not load.is_gone


def drop_an_early_fence(recovery: Recovery, identity: bytes, now: float, fenced: Any = Recovery.fenced) -> None:
    """A fence that comes before the launcher's message is forgotten, and waited for."""
    if recovery._requests.prompts.is_replaced(identity):
        fenced(recovery, identity, now)


def send_all_again(prompts: PromptDispatcher, lost_all: Any = PromptDispatcher.lost_all) -> set[int]:
    """What the dead core may have begun begins again, though its client may have a part of it."""
    for load in prompts._loads.values():
        load.prompts |= {key: prompt for key, prompt in prompts._sent.items() if prompt.tokenizer == load.identity}
    lost_all(prompts)
    return set()


def send_nothing_again(prompts: PromptDispatcher, again: list[Any], suspects: list[Any]) -> list[Any]:
    """The prompts of a dead tokenizer are lost."""
    for prompt in again:
        prompts._sent.pop(prompt.key)
    return []


def expect_for_ever(prompts: PromptDispatcher, key: int) -> None:
    """The scheduler is not told that what it waits for has died with a tokenizer."""
    prompts._sent.pop(key, None)


def suspect_nothing(prompts: PromptDispatcher, again: list[Any], suspects: list[Any]) -> list[Any]:
    """A prompt that ends tokenizers is sent again for ever."""
    for prompt in again:
        del prompts._sent[prompt.key]
        prompts._wait(prompt)
    return []


def crowd_suspects(prompts: PromptDispatcher, load: Any) -> bool:
    """A suspect has company, so that the next death tells nothing."""
    return len(load.prompts) < prompts._max_under_way and prompts._takes_prompts(load)


def hear_the_dead(worker: GatewayWorker, role: str, identity: bytes) -> bool:
    """What a dead process has said counts."""
    worker.process.take_bootstraps()
    return True


def interrupt_nothing(recovery: Recovery, now: float) -> None:
    """Requests that a dead core had accepted stay open."""
    recovery._requests.prompts.lost_all()
    recovery._queue_again(now)


@pytest.mark.parametrize(
    ("owner", "method", "mutant"),
    [
        (PromptDispatcher, "_takes_prompts", send_before_the_fence),
        (Recovery, "fenced", drop_an_early_fence),
        (PromptDispatcher, "lost_all", send_all_again),
        (PromptDispatcher, "_send_again", send_nothing_again),
        (PromptDispatcher, "forget", expect_for_ever),
        (PromptDispatcher, "_send_again", suspect_nothing),
        (PromptDispatcher, "_has_room", crowd_suspects),
        (GatewayWorker, "_is_alive", hear_the_dead),
        (Recovery, "core_replaced", interrupt_nothing),
    ],
)
def test_a_planted_fault_is_found(owner: type, method: str, mutant: Any) -> None:
    with patch.object(owner, method, mutant):
        for seed in range(10 * NUM_TRACES):
            try:
                Trace(seed).run()
            except (AssertionError, KeyError):
                return
    pytest.fail("all traces ran as if nothing were wrong")
