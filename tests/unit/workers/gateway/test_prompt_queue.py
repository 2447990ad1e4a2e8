"""Requests that wait for a tokenizer: their order, time-outs and memory, and the hint of a full queue.

Random traces on a made-up clock first: gateway, tokenizers and scheduler, every one of them as late as it likes.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from typing import Any
from unittest.mock import patch

import pytest

from ipc.errors import InvalidRequest, QueueFull, error_from_code
from ipc.messages import (
    Cancel,
    CancelRequests,
    ClientRequest,
    Delivered,
    Drained,
    FinalOutput,
    GatewayToTokenizer,
    Generate,
    Outputs,
    PromptTokens,
    Refused,
    Route,
    Tokenize,
    TokenizeQuery,
    TokenizerQuery,
    Withdraw,
)
from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import SchedulingParams
from tests.unit.workers.gateway.gateway_tools import TOKENIZERS, Harness, answer_to, generate
from workers.gateway.outbox import Outbox, Peer
from workers.gateway.prompt_dispatch import Prompt, PromptDispatcher
from workers.gateway.request_lifecycle import RequestLifecycle
from workers.gateway.request_table import RequestState
from workers.gateway.request_timers import RequestTimers
from workers.queueing.drain_rate import DrainRate
from workers.queueing.policies import FairShare, RankedRequests, Tenant

SECOND = 1_000_000_000
NUM_TRACES = 150
AGING_S = 4.0
QUANTUM = 60
MAX_COST = 300  # of a prompt, in a policy's tokens
OUT_OF_TIME = ("deadline", "queue_timeout")


class Trace:
    """One life of a gateway from a seed, and what has to become of each request."""

    def __init__(self, seed: int, policy: str) -> None:
        self.rng = rng = random.Random(seed)
        self.policy = policy
        self.default_wait_s = rng.choice([None, None, 6.0])
        config = {
            "policy": policy,
            "priority_aging_s": AGING_S,
            "fair_quantum": QUANTUM,
            "queue_timeout_s": self.default_wait_s,
        }
        self.max_ahead, self.max_ahead_bytes = rng.choice([1, 2, 3]), rng.choice([200, 1 << 20])
        self.gateway = Harness(
            policy=config, tokenizer_window=self.max_ahead, tokenizer_window_bytes=self.max_ahead_bytes
        )
        self.core = self.gateway.core
        self.waiting: dict[int, tuple[ClientRequest, float]] = {}  # by key, in order of arrival
        self.sent: dict[str, tuple[bytes, ClientRequest, float]] = {}  # everything, by request id
        self.keys: dict[int, str] = {}
        self.to_tokenizer: dict[bytes, deque[GatewayToTokenizer]] = {name: deque() for name in TOKENIZERS}
        self.to_scheduler: dict[str, deque[Any]] = {name.decode(): deque() for name in TOKENIZERS} | {
            "gateway": deque()
        }
        self.to_gateway: deque[tuple[str, list[int]]] = deque()
        self.running: dict[int, Tokenize] = {}  # in the scheduler
        self.declined: set[int] = set()  # there, when they arrive
        self.withdrawn: set[int] = set()  # the gateway has asked for that
        self.gone: set[bytes] = set()
        self.counted: set[str] = set()  # queries with an answer

    # Clients

    def send(self) -> None:
        rng = self.rng
        client = rng.choice([name for name in (b"a", b"b", b"c") if name not in self.gone])
        request_id, prompt = f"r{len(self.sent)}", "x" * rng.choice([1, 30, 1_000])
        scheduling = SchedulingParams(
            priority=rng.randint(-2, 2) if self.policy == "priority" else 0, tenant=rng.choice("pqr"),
            deadline_s=rng.choice([None, None, 0.5, 3.0]), queue_timeout_s=rng.choice([None, None, 1.0]),
        )  # fmt: skip
        message: ClientRequest
        if rng.random() < 0.3:
            message = TokenizeQuery(request_id=request_id, prompt=prompt, scheduling=scheduling)
        else:
            params = SamplingParams(n=rng.choice([1, 3]))
            message = generate(request_id, prompt=prompt, params=params, scheduling=scheduling)
        key = self.core.table._last_key + 1
        self.sent[message.request_id] = client, message, self.gateway.now
        self.keys[key] = message.request_id
        self.waiting[key] = message, self.gateway.now
        self.gateway.client(message, client)

    def cancel(self) -> None:
        client, message, _ = self.rng.choice(list(self.sent.values()))
        self.gateway.client(Cancel(request_id=message.request_id), client)

    def leave(self) -> None:
        """A client vanishes. Its waiting requests are removed at once."""
        client = self.rng.choice([b"a", b"b"])
        self.gone.add(client)
        self.core.client_gone(client)
        self.gateway.flush()
        held = [self.sent[self.keys[key]][0] for key in self.core.requests.prompts._waiting]
        assert client not in held, "a vanished client's prompts are kept"

    # Time

    def ends_at(self, request_id: str) -> dict[str, float]:
        _, message, at = self.sent[request_id]
        wait_s = message.scheduling.queue_timeout_s or self.default_wait_s
        times = {"deadline": message.scheduling.deadline_s, "queue_timeout": wait_s}
        return {reason: at + seconds for reason, seconds in times.items() if seconds is not None}

    def pass_time(self) -> None:
        sleep_s = self.core.timeout_s(self.gateway.now)
        first = min((at for key in self.waiting for at in self.ends_at(self.keys[key]).values()), default=None)
        if first is not None:
            assert sleep_s is not None
            assert self.gateway.now + sleep_s <= first + 1e-6, "the gateway oversleeps"
        self.gateway.tick(self.rng.choice([0.1, 1.0, sleep_s or 0.0]))
        for key in self.waiting:
            at = min(self.ends_at(self.keys[key]).values(), default=self.gateway.now + 1)
            assert at > self.gateway.now - 1e-6 or self.is_over(self.keys[key]), "a request waits beyond its time"

    def is_over(self, request_id: str) -> bool:
        client = self.sent[request_id][0]
        is_answered = (client, request_id) in self.gateway.finals or request_id in self.counted
        return client in self.gone or is_answered

    # The other processes

    def tokenize(self) -> None:
        """A tokenizer hands on its oldest prompt, or answers its oldest query."""
        name = self.rng.choice(TOKENIZERS)
        if self.to_tokenizer[name]:
            message = self.to_tokenizer[name].popleft()
            if isinstance(message, TokenizerQuery):
                self.gateway.answer(name, answer_to(message))
                return
            self.to_scheduler[name.decode()].append(message)
            self.core.tokenizer_done(name, message.key, self.gateway.now)
            self.gateway.flush()

    def schedule(self) -> None:
        """The scheduler receives a message of any sender."""
        queue = self.to_scheduler[self.rng.choice(list(self.to_scheduler))]
        if not queue:
            return
        message = queue.popleft()
        if isinstance(message, Tokenize):
            if message.key in self.declined:
                self.declined.discard(message.key)
            else:
                self.to_gateway.append(("accepted", [message.key]))
                request_id = self.keys[message.key]
                assert not self.is_over(request_id) or self.sent[request_id][0] in self.gone, "it runs after its end"
                self.running[message.key] = message
        elif isinstance(message, Withdraw):
            absent = [key for key in message.keys if key not in self.running]
            self.declined.update(absent)
            if absent:
                self.to_gateway.append(("withdrawn", absent))
        elif isinstance(message, CancelRequests):
            self.declined.difference_update(message.keys)
            for key in message.keys:
                self.finish(key, "cancelled")

    def finish(self, key: int, reason: str) -> None:
        if key in self.running:
            message = self.running.pop(key)
            if self.sent[self.keys[key]][0] not in self.gone:
                self.gateway.deliver(message, reason=reason)

    def tell_gateway(self) -> None:
        if self.to_gateway:
            what, keys = self.to_gateway.popleft()
            if what == "accepted":
                self.core.accepted(keys)
            else:
                self.core.withdrawn(keys, self.gateway.now)
            self.gateway.flush()

    # After each event

    def look(self) -> None:
        table, prompts = self.core.table, self.core.requests.prompts
        sent = self.gateway.sent
        for name, message in sent[Peer.TOKENIZER]:
            self.check_turn(message)
            self.to_tokenizer[name].append(message)
            sizes = [prompt.num_bytes for prompt in prompts._loads[name].prompts.values()]
            assert len(sizes) <= self.max_ahead
            assert sum(sizes[:-1]) < self.max_ahead_bytes, (
                "more prompts are under way to a tokenizer than the policy allows for"
            )
        sent[Peer.TOKENIZER].clear()
        for _, message in sent[Peer.SCHEDULER]:
            self.to_scheduler["gateway"].append(message)
            if isinstance(message, Withdraw):
                self.withdrawn.update(message.keys)
        sent[Peer.SCHEDULER].clear()
        for message in (message for queue in self.to_tokenizer.values() for message in queue):
            ends = self.ends_at(self.keys[message.key]).values()
            late = any(at < self.gateway.now - 1e-6 for at in ends)
            ended = message.key in self.withdrawn or (
                isinstance(message, TokenizerQuery) and not table.request(message.key)
            )
            assert ended or not late, "a tokenizer has it, and no timer ends it"
        for (_, request_id), finals in self.gateway.finals.items():
            assert len(finals) == 1, f"{request_id} has {len(finals)} answers"
        for client, answer in sent[Peer.CLIENT]:
            if isinstance(answer, PromptTokens):
                assert answer.request_id not in self.counted, "a query has two answers"
                assert (client, answer.request_id) not in self.gateway.finals, "a query has an answer after its end"
                self.counted.add(answer.request_id)
        sent[Peer.CLIENT].clear()
        self.waiting = {
            key: waits for key, waits in self.waiting.items()
            if (request := table.request(key)) is not None and request.state is RequestState.QUEUED
        }  # fmt: skip
        assert len(prompts._policy) == len(self.waiting) == prompts.num_waiting, (
            "a request is lost, or waits at its end"
        )
        held = sum(prompts._waiting[key].held_bytes for key in self.waiting)
        assert prompts.num_bytes == held, "memory is counted that is not held"
        may_be_lost = {each.key for each in table.requests() if each.state is RequestState.TOKENIZING}
        assert prompts._sent.keys() == may_be_lost, "a message is kept that is not needed, or not kept that is"

    def check_turn(self, message: GatewayToTokenizer) -> None:
        """The request that goes to a tokenizer is the policy's next, and has time left."""
        mine, at = self.waiting.pop(message.key)
        assert all(end > self.gateway.now for end in self.ends_at(mine.request_id).values()), "out of time"
        assert message.arrived_ns == round(at * 1e9)
        if isinstance(message, Tokenize):
            assert message.deadline_ns == round((at + (mine.scheduling.deadline_s or -at)) * 1e9)
        table = self.core.table
        others = {
            key: waits for key, waits in self.waiting.items()
            if (request := table.request(key)) and request.state is RequestState.QUEUED
        }  # fmt: skip
        if self.policy == "fifo":
            assert all(message.key < key for key in others)
        elif self.policy == "priority":
            rank = at - AGING_S * mine.scheduling.priority, message.key
            for key, (other, other_at) in others.items():
                assert rank < (other_at - AGING_S * other.scheduling.priority + 1e-6, key), "it was not its turn"
        else:
            tenant = mine.scheduling.tenant
            assert all(message.key < key for key, (other, _) in others.items() if other.scheduling.tenant == tenant)

    def run(self) -> None:
        events = [self.send, self.tokenize, self.schedule, self.tell_gateway, self.pass_time, self.cancel]
        weights = [self.rng.choice([1, 3]), 2, 4, 4, 1, 0.3]
        self.send()
        self.look()
        for _ in range(self.rng.choice([60, 200])):
            [event] = self.rng.choices(events, weights)
            event()
            self.look()
            if self.rng.random() < 0.004:
                self.leave()
                self.look()
            if self.running and self.rng.random() < 0.2:
                self.finish(self.rng.choice(list(self.running)), "length")
                self.look()
        self.come_to_rest()

    def come_to_rest(self) -> None:
        for _ in range(10_000):
            self.rng.choice([self.tokenize, self.schedule, self.tell_gateway])()
            for key in list(self.running):
                self.finish(key, "length")
            self.look()
            queues = [*self.to_tokenizer.values(), *self.to_scheduler.values(), self.to_gateway]
            if not self.waiting and not any(queues):
                break
        else:
            raise AssertionError("requests are lost on their way")
        assert len(self.core.table) == 0
        assert not self.declined, "the scheduler waits for what will not come"
        prompts = self.core.requests.prompts
        assert (prompts.num_waiting, prompts.num_bytes) == (0, 0)
        if isinstance(prompts._policy, FairShare):
            assert not prompts._policy._tenants, "a tenant is remembered"
        assert not any(load.prompts or load.num_bytes for load in prompts._loads.values())
        answered = {request_id for _, request_id in self.gateway.finals} | self.counted
        assert {name for name, (client, _, _) in self.sent.items() if client not in self.gone} <= answered
        for (_, request_id), [final] in self.gateway.finals.items():
            if final.finish_reason in OUT_OF_TIME:
                assert final == FinalOutput(final.finish_reason, 0, 0)
                assert final.finish_reason in self.ends_at(request_id), "it had no such time"


@pytest.mark.parametrize("policy", ["fifo", "priority", "fair"])
def test_the_policy_decides_every_request_has_one_answer_in_time_and_nothing_is_kept(policy: str) -> None:
    for seed in range(NUM_TRACES):
        try:
            Trace(seed, policy).run()
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise


# Faults that must be found


def answer_at_once(requests: RequestLifecycle, ends: Any, stop: Any = RequestLifecycle._stop) -> Any:
    """The gateway answers a request that a tokenizer has, although the request may be running by now."""
    stop(requests, ends)
    return ends


def forget_timers(timers: RequestTimers, now_ns: int) -> Any:
    """The gateway never checks the clock."""
    return []


def forget_withdrawals(outbox: Outbox, key: int) -> None:
    """The scheduler never hears that a request has ended."""


def keep_messages(prompts: PromptDispatcher, key: int) -> None:
    """A request that ends while it waits stays in memory."""
    prompts._policy.end(prompts._waiting[key])


def forget_bytes(prompts: PromptDispatcher, key: int, remove: Any = PromptDispatcher.remove) -> None:
    """Its memory is counted for ever."""
    num_bytes = prompts.num_bytes
    remove(prompts, key)
    prompts.num_bytes = num_bytes


def keep_queries(requests: RequestLifecycle, done: Any, now: float) -> None:
    """A query stays open after its answer."""


def withdraw_queries(requests: RequestLifecycle, ends: Any, stop: Any = RequestLifecycle._stop) -> Any:
    """The gateway asks the scheduler about queries too, which has never heard of them."""
    for request, _ in ends:
        request.is_query = False
    return stop(requests, ends)


def count_twice(prompts: PromptDispatcher, load: Any, prompt: Any, send: Any = PromptDispatcher._send) -> Any:
    """A tokenizer's window never empties again."""
    before = load.num_bytes
    message = send(prompts, load, prompt)
    load.num_bytes += load.num_bytes - before
    return message


def newest_first(ranked: RankedRequests[Any]) -> Any:
    """The order is the wrong way round."""
    return max(ranked._requests.values(), key=lambda request: (request.rank, request.key), default=None)


@pytest.mark.parametrize(
    ("owner", "method", "mutant"),
    [
        (RequestLifecycle, "_stop", answer_at_once),
        (RequestTimers, "take_due", forget_timers),
        (RequestLifecycle, "answered", keep_queries),
        (RequestLifecycle, "_stop", withdraw_queries),
        (Outbox, "withdraw", forget_withdrawals),
        (PromptDispatcher, "remove", keep_messages),
        (PromptDispatcher, "remove", forget_bytes),
        (PromptDispatcher, "_send", count_twice),
        (RankedRequests, "first", newest_first),
    ],
)
def test_a_planted_fault_is_found(owner: type, method: str, mutant: Any) -> None:
    with patch.object(owner, method, mutant):
        for seed in range(NUM_TRACES):
            try:
                Trace(seed, ("fifo", "priority", "fair")[seed % 3]).run()
            except (AssertionError, KeyError, ValueError):
                return
    pytest.fail("all traces ran as if nothing were wrong")


# Order


def tokenize_all(gateway: Harness) -> list[str]:
    """Request ids in the order in which they went to the tokenizers."""
    return [message.route.request_id for message in gateway.pass_on()]


def test_a_high_priority_waits_for_no_more_than_the_tokenizers_have_already() -> None:
    gateway = Harness(policy={"policy": "priority"})
    for number in range(50):
        gateway.client(generate(f"r{number}"))
    gateway.client(generate("now", scheduling=SchedulingParams(priority=100)), b"other")
    assert tokenize_all(gateway)[:6] == ["r0", "r1", "r2", "r3", "now", "r4"]


@pytest.mark.parametrize("policy", ["fifo", "fair"])
def test_a_priority_that_no_policy_would_heed_is_refused_at_once(policy: str) -> None:
    gateway = Harness(policy={"policy": policy})
    gateway.client(generate("r", scheduling=SchedulingParams(priority=2)))
    assert gateway.refusal().error_code == InvalidRequest.code
    assert "priority (2)" in gateway.refusal().error_message
    assert 'scheduler.policy = "priority"' in gateway.refusal().error_message
    assert len(gateway.core.table) == 0


def test_what_is_under_way_to_a_tokenizer_is_bounded_in_bytes_too_and_a_long_prompt_goes_alone() -> None:
    gateway = Harness(tokenizer_window=100, tokenizer_window_bytes=2_500)
    for number in range(8):
        gateway.client(generate(f"r{number}", prompt="x" * 900))
    assert [request.route.request_id for _, request in gateway.tokenized()] == [f"r{number}" for number in range(6)]
    gateway.client(generate("long", prompt="x" * 100_000))
    gateway.client(generate("short"))
    tokenizer = TOKENIZERS[0]
    for number in (0, 2, 4):
        gateway.core.tokenizer_done(tokenizer, gateway.tokenized()[number][1].key, gateway.now)
    gateway.flush()
    assert [request.route.request_id for to, request in gateway.tokenized()[6:]] == ["r6", "r7", "long"]
    for number in (1, 3, 5):
        gateway.core.tokenizer_done(TOKENIZERS[1], gateway.tokenized()[number][1].key, gateway.now)
    gateway.flush()
    [(to_long, _), (to_short, short)] = gateway.tokenized()[8:]
    assert short.route.request_id == "short"
    assert to_short != to_long, "a short prompt was sent behind a long one"


def send_for(gateway: Harness, tenant: str, number: int, num_bytes: int) -> None:
    scheduling = SchedulingParams(tenant=tenant)
    gateway.client(generate(f"{tenant}{number}", prompt="x" * num_bytes, scheduling=scheduling), tenant.encode())


def test_tenants_share_the_tokenizers_by_bytes() -> None:
    gateway = Harness(policy={"policy": "fair", "fair_quantum": 500}, tokenizer_window=1)
    for number in range(40):
        send_for(gateway, "long", number, 4_000)
    for number in range(40):
        send_for(gateway, "short", number, 1_000)
    num_bytes: Counter[str] = Counter()
    for request_id in tokenize_all(gateway)[2:42]:
        tenant = request_id.rstrip("0123456789")
        num_bytes[tenant] += 4_000 if tenant == "long" else 1_000
    assert abs(num_bytes["long"] - num_bytes["short"]) <= 8_000


def unfairness(policy: str, seed: int) -> int:
    """The largest difference, at any time, between what two tenants got that always have prompts waiting; in tokens."""
    rng, most = random.Random(seed), 0
    gateway = Harness(policy={"policy": policy, "fair_quantum": QUANTUM}, max_open_requests=10_000)
    served: Counter[str] = Counter()
    number = 0
    for _ in range(150):
        for tenant in ("greedy", "greedy", "greedy", "modest"):
            number += 1
            send_for(gateway, tenant, number, rng.randint(1, 4 * MAX_COST - 200))
        if gateway.tokenized():
            name, message = gateway.tokenized().pop(0)
            served[message.scheduling.tenant] += len(message.prompt or "") // 4
            gateway.core.tokenizer_done(name, message.key, gateway.now)
            gateway.flush()
            most = max(most, served["greedy"] - served["modest"])
    return most


def test_no_tenant_is_far_ahead_of_another_that_waits_and_in_order_of_arrival_one_would_be() -> None:
    bound = 2 * (QUANTUM + MAX_COST) + 4 * MAX_COST  # and what the tokenizers had before the other tenant arrived
    for seed in range(5):
        assert unfairness("fair", seed) <= bound
        assert unfairness("fifo", seed) > bound


def test_a_tenant_is_charged_for_what_the_tokenizers_have() -> None:
    gateway = Harness(policy={"policy": "fair", "fair_quantum": 100}, tokenizer_window=1)
    send_for(gateway, "a", 0, 4_000)
    send_for(gateway, "b", 0, 40)
    for number in (1, 2):  # nothing of theirs waits, and a is in debt
        send_for(gateway, "a", number, 40)
        send_for(gateway, "b", number, 40)
    assert tokenize_all(gateway) == ["a0", "b0", "b1", "b2", "a1", "a2"]


def test_thousands_of_tenants_in_debt_cost_each_turn_no_look_at_all_of_them() -> None:
    num_tenants = 1_000
    policy: FairShare[Any] = FairShare(0, quantum=10)
    for key in range(3 * num_tenants):
        message = tokenize_message(key, tenant=f"tenant {key % num_tenants}")
        policy.add(Prompt(message, frame_bytes=4_000, held_bytes=1))
    order = []
    with patch.object(Tenant, "index", CountedIndex(Tenant.index)) as counted:
        while (prompt := policy.next()) is not None:
            policy.dequeue(prompt)
            order.append(prompt.key)
    assert order == list(range(3 * num_tenants)), "of equals each has its turn"
    assert counted.num_reads < 50 * len(order)


class CountedIndex:
    """Counts how often a tenant's credit is looked up."""

    def __init__(self, slot: Any) -> None:
        self.slot = slot
        self.num_reads = 0

    def __get__(self, tenant: Any, owner: Any = None) -> Any:
        self.num_reads += 1
        return self.slot.__get__(tenant, owner)

    def __set__(self, tenant: Any, value: int) -> None:
        self.slot.__set__(tenant, value)


def tokenize_message(key: int, tenant: str) -> Tokenize:
    scheduling = SchedulingParams(tenant=tenant)
    return Tokenize(key, Route(b"c", str(key), False), SamplingParams(), arrived_ns=0, scheduling=scheduling)


# Time


def test_a_request_whose_deadline_passes_in_the_queue_ends_then_with_all_its_samples_and_is_never_tokenized() -> None:
    gateway = Harness()
    for number in range(4):
        gateway.client(generate(f"r{number}"))
    ids = bytes(4 * 7)
    slow = SchedulingParams(deadline_s=1.5, queue_timeout_s=9.0)
    gateway.client(generate("late", token_ids=ids, params=SamplingParams(n=3), scheduling=slow))
    assert gateway.core.timeout_s(gateway.now) == 1.0  # a look at the client comes first
    gateway.tick(1.0)
    assert gateway.core.timeout_s(gateway.now) == 0.5
    gateway.tick(0.5)
    assert gateway.finals == {(b"c", "late"): [FinalOutput("deadline", 7, 0)]}  # it came as seven ids
    assert tokenize_all(gateway) == ["r0", "r1", "r2", "r3"]
    assert gateway.core.requests.num_out_of_time == {"deadline": 1}


def test_a_queue_time_out_of_the_configuration_counts_from_the_arrival_here_unless_the_request_has_its_own() -> None:
    gateway = Harness(policy={"queue_timeout_s": 2.0})
    for number in range(5):
        gateway.client(generate(f"r{number}"))
    gateway.client(generate("patient", scheduling=SchedulingParams(queue_timeout_s=5.0)))
    gateway.tick(2.0)
    assert gateway.finals == {(b"c", "r4"): [FinalOutput("queue_timeout", 0, 0)]}
    [*first, patient] = gateway.pass_on()
    assert {message.arrived_ns for message in first} == {100 * SECOND}
    assert patient.route.request_id == "patient"
    assert gateway.messages(Peer.SCHEDULER, Withdraw) == [Withdraw(keys=[message.key for message in first])]


def test_a_request_whose_time_runs_out_in_a_tokenizer_ends_once_the_scheduler_says_that_it_is_not_there() -> None:
    gateway = Harness()
    gateway.client(generate("r", params=SamplingParams(n=2), scheduling=SchedulingParams(deadline_s=1.0)))
    [(_, request)] = gateway.tokenized()
    gateway.tick(1.0)
    assert gateway.messages(Peer.SCHEDULER, Withdraw) == [Withdraw(keys=[request.key])]
    gateway.withdrawn(request.key)
    assert gateway.finals == {(b"c", "r"): [FinalOutput("deadline", 0, 0)]}
    gateway.client(generate("r"))  # the name is free again
    gateway.pass_on()
    assert len(gateway.core.table) == 1


def test_once_the_scheduler_has_a_request_its_time_is_the_schedulers() -> None:
    gateway = Harness()
    gateway.client(generate("r", scheduling=SchedulingParams(deadline_s=1.0, queue_timeout_s=0.5)))
    [request] = gateway.pass_on()
    gateway.tick(3.0)
    assert gateway.messages(Peer.SCHEDULER, Withdraw) == []
    assert gateway.finals == {}
    gateway.deliver(request, reason="deadline")
    assert len(gateway.finals[b"c", "r"]) == 1


def test_requests_that_run_out_of_time_together_are_answered_in_one_message_to_each_client() -> None:
    gateway = Harness(max_open_requests=1_000)
    for number in range(4):
        gateway.client(generate(f"first{number}"), b"z")
    for number in range(300):
        gateway.client(generate(f"r{number}", scheduling=SchedulingParams(deadline_s=1.0)), b"ab"[number % 2 :][:1])
    gateway.tick(1.0)
    assert len(gateway.finals) == 300
    assert [len(gateway.answers(Outputs, client)) for client in (b"a", b"b")] == [1, 1]


def test_a_draining_engine_tokenizes_what_waits_and_looks_at_its_time() -> None:
    gateway = Harness()
    for number in range(6):
        scheduling = SchedulingParams(deadline_s=1.0) if number == 5 else SchedulingParams()
        gateway.client(generate(f"r{number}", scheduling=scheduling))
    gateway.core.serving.drain(gateway.now)
    gateway.tick(1.0)
    assert [final.finish_reason for final in gateway.finals[b"c", "r5"]] == ["deadline"]
    requests = gateway.pass_on()
    assert len(requests) == 5
    assert gateway.messages(Peer.LAUNCHER, Drained) == []
    gateway.deliver(*requests)
    assert gateway.messages(Peer.LAUNCHER, Drained) == [Drained()]


# When to try again


def refused(gateway: Harness, message: Generate) -> Refused:
    gateway.client(message)
    refusal = gateway.refusal()
    assert refusal.error_code == QueueFull.code
    error = error_from_code(refusal.error_code, refusal.error_message, refusal.retry_after_s)
    assert error.retry_after_s == refusal.retry_after_s > 0
    return refusal


def test_a_full_queue_says_how_long_what_waits_takes_to_be_tokenized() -> None:
    gateway = Harness(max_queued_bytes=50_000, max_open_requests=1_000)
    gateway.tick(10_000.0)  # how long nothing came says nothing
    for number in range(10):
        gateway.client(generate(f"r{number}", prompt="x" * 6_000))
    for _ in range(20):  # each prompt takes a tenth of a second
        gateway.tick(0.1)
        name, message = gateway.tokenized().pop(0)
        gateway.core.tokenizer_done(name, message.key, gateway.now)
        gateway.flush()
        number += 1
        gateway.client(generate(f"r{number}", prompt="x" * 6_000))
    assert gateway.core.requests.prompts.num_waiting == 6
    refusal = refused(gateway, generate("full", prompt="x" * 6_000))
    assert 0.4 <= refusal.retry_after_s <= 0.8
    assert f"try again in {refusal.retry_after_s:g} s" in refusal.error_message
    gateway.tick(10_000.0)  # the tokenizers have stopped
    assert refused(gateway, generate("full", prompt="x" * 6_000)).retry_after_s == 60.0


def test_a_client_with_too_many_open_requests_is_told_how_long_its_own_take() -> None:
    gateway = Harness(max_open_requests=4)
    for number in range(4):
        gateway.client(generate(f"r{number}"))
    assert refused(gateway, generate("more")).retry_after_s == 1.0, "nothing is known yet"
    open_requests = gateway.pass_on()
    for number in range(4, 8):  # one ends in every three seconds
        gateway.tick(3.0)
        gateway.deliver(open_requests.pop(0))
        gateway.client(Delivered(count=1))
        gateway.client(generate(f"r{number}"))
        open_requests += gateway.pass_on()
    gateway.tick(1.0)
    one = refused(gateway, generate("more")).retry_after_s
    assert 2.0 <= one <= 4.0
    two = refused(gateway, generate("more", params=SamplingParams(n=2))).retry_after_s
    assert two == pytest.approx(2 * one, abs=0.1)


@pytest.mark.parametrize(("elapsed_s", "expected"), [(0.0, 0.1), (8.0, 10.0), (1e9, 60.0)])
def test_a_hint_is_neither_nothing_nor_for_ever(elapsed_s: float, expected: float) -> None:
    rate = DrainRate()
    assert rate.retry_after_s(5, 0) == 1.0
    for _ in range(4):
        rate.leave(7 * SECOND)
    assert rate.retry_after_s(5, 7 * SECOND + round(elapsed_s * SECOND)) == expected


def test_time_in_which_nothing_waited_does_not_count_in_the_rate() -> None:
    rate = DrainRate()
    for second in range(10):
        rate.leave(second * SECOND)
    rate.begin(5_000 * SECOND)
    rate.leave(5_001 * SECOND)
    assert 9.0 <= rate.retry_after_s(10, 5_001 * SECOND) <= 11.0
