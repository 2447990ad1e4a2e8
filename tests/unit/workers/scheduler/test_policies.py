"""Which request is admitted next under each policy, and which is preempted when blocks run out."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ipc.errors import InvalidRequest
from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import SchedulingParams
from tests.simulation.scheduled_engine import ScheduledEngine
from workers.queueing.config import PolicyConfig
from workers.queueing.policies import FIRST_TENANTS, FairShare, RankedRequests, make_policy

SECOND = 1_000_000_000


def waiting(key: int, *, priority: int = 0, tenant: str = "", num_prompt: int = 10, arrived_s: float = 0) -> Any:
    """The fields of a request that a policy reads."""
    return SimpleNamespace(
        key=key, priority=priority, tenant=tenant, num_prompt=num_prompt, arrived_ns=round(arrived_s * SECOND), rank=0,
        row=key,
    )  # fmt: skip


def admit_next(policy: Any) -> int:
    request = policy.next()
    policy.dequeue(request)
    return request.key


def order(policy: Any, *requests: Any) -> list[int]:
    for request in requests:
        policy.add(request)
    return [admit_next(policy) for _ in range(len(policy))]


@pytest.mark.parametrize("name", ["fifo", "priority", "fair"])
def test_equals_come_in_in_order_of_arrival_and_who_ended_does_not(name: Any) -> None:
    policy = make_policy(PolicyConfig(policy=name), 10)
    requests = [waiting(key, arrived_s=key) for key in range(6)]
    for request in requests:
        policy.add(request)
    for gone in (0, 3):
        policy.end(requests[gone])
    assert [admit_next(policy) for _ in range(len(policy))] == [1, 2, 4, 5]
    assert policy.next() is None


@pytest.mark.parametrize("name", ["fifo", "priority", "fair"])
def test_asking_who_is_next_changes_nothing(name: Any) -> None:
    policy = make_policy(PolicyConfig(policy=name), 10)
    policy.add(waiting(1, tenant="a"))
    policy.add(waiting(2, tenant="b"))
    assert policy.next() is policy.next()
    assert len(policy) == 2


def test_requests_that_arrive_late_from_a_slow_tokenizer_keep_their_place_in_the_order_of_arrival() -> None:
    for name in ("fifo", "fair"):
        policy = make_policy(PolicyConfig(policy=name), 10)
        assert order(policy, waiting(2), waiting(4), waiting(1), waiting(3)) == [1, 2, 3, 4]


# Priority


def test_the_highest_priority_comes_first_and_waiting_makes_up_for_what_it_lacks() -> None:
    policy = make_policy(PolicyConfig(policy="priority", priority_aging_s=10), 10)
    assert order(policy, waiting(1), waiting(2, priority=2, arrived_s=19), waiting(3, priority=2, arrived_s=21)) == [
        2, 1, 3,
    ]  # fmt: skip
    assert order(policy, waiting(4, priority=-1), waiting(5)) == [5, 4]


def test_whatever_arrives_later_a_low_priority_has_its_turn() -> None:
    policy = make_policy(PolicyConfig(policy="priority", priority_aging_s=1), 10)
    policy.add(waiting(0, priority=-3))
    served = []
    for second in range(20):  # one important request arrives in each second, and one is admitted
        policy.add(waiting(100 + second, priority=5, arrived_s=second))
        served.append(admit_next(policy))
    assert served.index(0) == 8  # after those of the eight seconds that its priority is behind by


def test_removed_entries_do_not_pile_up() -> None:
    ranked = RankedRequests()
    first = waiting(0)
    ranked.add(first)
    for key in range(1, 1_000):
        other = waiting(key)
        other.rank = key
        ranked.add(other)
        ranked.remove(other)
    assert len(ranked._heap) < 40
    assert ranked.first() is first


def test_nothing_is_kept_of_a_request_that_leaves_from_the_middle() -> None:
    class Held(SimpleNamespace):
        pass

    ranked: RankedRequests[Any] = RankedRequests()
    held = [Held(key=key, rank=key) for key in range(3)]
    for request in held:
        ranked.add(request)
    gone = weakref.ref(held[1])
    ranked.remove(held.pop(1))
    del request
    gc.collect()
    assert gone() is None


# Fair share


def test_tenants_take_turns_however_much_one_of_them_asks_for() -> None:
    policy = FairShare(100, quantum=10)
    greedy = [waiting(key, tenant="greedy") for key in range(50)]
    modest = [waiting(50 + key, tenant="modest") for key in range(3)]
    served = order(policy, *greedy, *modest)
    assert served[:7] == [0, 50, 1, 51, 2, 52, 3]


def test_shares_are_of_tokens_and_not_of_requests() -> None:
    policy = FairShare(400, quantum=10)
    long = [waiting(key, tenant="long", num_prompt=40) for key in range(20)]
    short = [waiting(20 + key, tenant="short", num_prompt=10) for key in range(80)]
    served = order(policy, *long, *short)[:50]
    tokens = {"long": 40 * sum(key < 20 for key in served), "short": 10 * sum(key >= 20 for key in served)}
    assert abs(tokens["long"] - tokens["short"]) <= 50


def test_answers_are_paid_for_as_they_come() -> None:
    policy = FairShare(100, quantum=10)
    for key in range(4):
        policy.add(waiting(key, tenant="talks"))
        policy.add(waiting(10 + key, tenant="listens"))
    assert [admit_next(policy) for _ in range(2)] == [0, 10]
    for _ in range(25):
        policy.sampled(np.array([0]))
    assert [admit_next(policy) for _ in range(4)] == [11, 12, 1, 13]  # three turns for 25 tokens of debt


def test_a_void_step_costs_nothing_and_saves_up_no_credit() -> None:
    policy = FairShare(100, quantum=10)
    for key in range(4):
        policy.add(waiting(key, tenant="talks"))
        policy.add(waiting(10 + key, tenant="listens"))
    policy.add(waiting(20, tenant="is served"))
    assert [admit_next(policy) for _ in range(3)] == [0, 10, 20]
    for _ in range(25):
        policy.sampled(np.array([0, 20]))
    for _ in range(24):
        policy.void(np.array([0, 20]))
    policy.void(np.array([20, 20, 20]))
    for key in (21, 22):
        policy.add(waiting(key, tenant="is served", num_prompt=10))
    assert [admit_next(policy) for _ in range(6)] == [1, 11, 21, 2, 12, 22]


def test_a_debt_of_many_turns_is_worked_off_at_once() -> None:
    policy = FairShare(100, quantum=1)
    for key in range(2):
        policy.add(waiting(key, tenant=str(key), num_prompt=10**12))
        policy.add(waiting(10 + key, tenant=str(key)))
    assert [admit_next(policy) for _ in range(4)] == [0, 1, 10, 11]


def test_credit_is_not_saved_up_while_nothing_waits() -> None:
    policy = FairShare(100, quantum=1_000)
    idle = waiting(0, tenant="idle", num_prompt=1)
    policy.add(idle)
    admit_next(policy)  # leaves 999
    policy.add(waiting(1, tenant="busy", num_prompt=1_000))
    policy.add(waiting(2, tenant="busy", num_prompt=1_000))
    policy.add(waiting(3, tenant="idle", num_prompt=1_000))
    policy.add(waiting(4, tenant="idle", num_prompt=1_000))
    assert [admit_next(policy) for _ in range(4)] == [1, 3, 2, 4]


def test_a_request_that_finds_no_room_stays_next_while_its_tenant_pays_for_others() -> None:
    policy = FairShare(100, quantum=10)
    for key in range(2):
        policy.add(waiting(key, tenant="a"))
    admit_next(policy)
    policy.add(waiting(5, tenant="b"))
    pinned = policy.next()
    for _ in range(100):
        policy.sampled(np.array([0, 5]))
    assert policy.next() is pinned is not None


def test_tenants_come_and_go_without_a_trace() -> None:
    policy = FairShare(10, quantum=10)
    for i in range(3 * FIRST_TENANTS):
        request = waiting(i % 10, tenant=f"tenant {i}")
        policy.add(request)
        admit_next(policy)
        policy.end(request)
    assert len(policy._credit) == FIRST_TENANTS
    assert not policy._tenants
    many = [waiting(i, tenant=f"tenant {i}") for i in range(10 * FIRST_TENANTS)]
    for request in many:
        policy.add(request)
    assert len(policy) == len(many)
    assert len(set(policy._free_indices)) + len(many) == len(policy._credit)


# In the scheduler


def prompts_of(engine: ScheduledEngine) -> list[int]:
    """Keys of requests in order of admission."""
    engine.drain()
    return list(engine.cached)


@pytest.mark.parametrize(
    ("policy", "expected"), [("fifo", [1, 2, 3, 4]), ("priority", [3, 1, 2, 4]), ("fair", [1, 4, 2, 3])]
)
def test_the_policy_of_the_configuration_decides(policy: Any, expected: list[int]) -> None:
    engine = ScheduledEngine(max_num_seqs=1, policy=policy, fair_quantum=6)
    one = SamplingParams(max_tokens=1)
    engine.send(0, [1, 2, 3, 4, 5], one)  # the others find it cached, so that their admission is reported
    engine.plan()
    for key, tenant in ((1, "a"), (2, "a"), (3, "a"), (4, "b")):
        engine.send(key, [1, 2, 3, 4, 6], one, tenant=tenant, priority=5 * (key == 3) if policy == "priority" else 0)
    assert prompts_of(engine) == expected
    engine.check_empty()


def test_the_lowest_priority_gives_way_when_blocks_run_out_although_it_came_first() -> None:
    engine = ScheduledEngine(num_blocks=8, block_size=2, max_model_len=16, depth=1, policy="priority")
    engine.send(1, [1, 2, 3, 4], SamplingParams(max_tokens=11))
    engine.send(2, [5, 6, 7], SamplingParams(max_tokens=9), priority=1)
    while not engine.scheduler.counts["num_preemptions"]:
        engine.step()
    assert engine.scheduler._table.sequences[int(engine.scheduler._planner.running.rows()[0])].key == 2
    engine.drain()
    assert engine.ends == {1: "length", 2: "length"}
    engine.check_empty()


def test_a_preempted_request_lets_a_more_important_one_in_first() -> None:
    engine = ScheduledEngine(num_blocks=8, block_size=2, max_model_len=16, depth=1, policy="priority")
    engine.send(1, [1, 2, 3, 4], SamplingParams(max_tokens=11), priority=1)
    engine.send(2, [5, 6, 7], SamplingParams(max_tokens=9))
    while not engine.scheduler.gauges()["num_preempted"]:
        engine.step()
    engine.send(3, [8], SamplingParams(max_tokens=1), priority=1)
    while 3 not in engine.ends:
        engine.step()
    assert engine.scheduler.gauges()["num_preempted"] == 1
    engine.drain()
    assert engine.ends == {1: "length", 2: "length", 3: "length"}
    engine.check_empty()


@pytest.mark.parametrize("values", [{"priority": 1_001}, {"priority": 1.5}, {"priority": True}, {"tenant": "x" * 257},
                                    {"deadline_s": 0}, {"deadline_s": float("nan")}, {"deadline_s": 10**400},
                                    {"deadline_s": float("inf")}, {"deadline_s": True},
                                    {"queue_timeout_s": -1.0}, {"queue_timeout_s": 1e9}])  # fmt: skip
def test_what_is_out_of_range_is_refused_with_field_and_value(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(values))):
        SchedulingParams(**values)
