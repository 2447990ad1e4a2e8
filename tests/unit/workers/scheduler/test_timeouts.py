"""Deadlines, the queue's time-out and bounds, and the answer to a refused client."""

from __future__ import annotations

import pytest

from ipc.sampling_params import SamplingParams
from tests.simulation.scheduled_engine import ScheduledEngine
from workers.queueing.timers import Timers
from workers.scheduler import worker

SECOND = 1_000_000_000


def tokens(n: int) -> SamplingParams:
    return SamplingParams(max_tokens=n)


def hear_all(engine: ScheduledEngine) -> None:
    while engine.hear() is not None:
        pass


def pass_time(engine: ScheduledEngine, seconds: float) -> None:
    engine.clock.now_ns += round(seconds * SECOND)
    engine.scheduler.expire()


def test_a_deadline_ends_a_running_request_with_what_it_has_got() -> None:
    engine = ScheduledEngine()
    engine.send(1, [1, 2], tokens(40), deadline_ns=engine.clock.now_ns + SECOND)
    for _ in range(5):
        engine.step()
    pass_time(engine, 0.9)
    assert engine.scheduler.num_open == 1
    pass_time(engine, 0.1)
    got = len(engine.tokens[1])
    engine.drain()
    assert engine.ends == {1: "deadline"}
    assert len(engine.tokens[1]) == got >= 4, "tokens of steps in flight came after the end"
    assert engine.scheduler.counts["num_deadline"] == 1
    engine.check_empty()


def test_a_deadline_ends_every_sample() -> None:
    engine = ScheduledEngine()
    params = SamplingParams(max_tokens=40, seed=7, n=3)
    engine.send(1, [1, 2], params, deadline_ns=engine.clock.now_ns + SECOND)
    for _ in range(3):
        engine.step()
    pass_time(engine, 1.0)
    engine.drain()
    assert engine.ends == {1: "deadline", 2: "deadline", 3: "deadline"}
    engine.check_empty()


def test_a_request_whose_deadline_passed_on_its_way_is_never_admitted() -> None:
    engine = ScheduledEngine()
    engine.send(1, [1], deadline_ns=1)
    engine.scheduler.expire()
    assert engine.plan() is None
    hear_all(engine)
    assert engine.ends == {1: "deadline"}
    engine.check_empty()


def test_a_preempted_request_meets_its_deadline_too() -> None:
    engine = ScheduledEngine(num_blocks=8, block_size=2, max_model_len=16, depth=1)
    engine.send(1, [1, 2, 3, 4], tokens(11))
    engine.send(2, [5, 6, 7], tokens(9), deadline_ns=engine.clock.now_ns + SECOND)
    while not engine.scheduler.gauges()["num_preempted"]:
        engine.step()
    pass_time(engine, 1)
    engine.drain()
    assert engine.ends == {1: "length", 2: "deadline"}
    engine.check_empty()


def test_a_request_that_waits_too_long_ends_unserved_and_an_admitted_one_does_not() -> None:
    engine = ScheduledEngine(max_num_seqs=1, queue_timeout_s=2)
    engine.send(1, [1], tokens(50))
    engine.send(2, [2])
    engine.send(3, [3], queue_timeout_s=5)
    engine.step()
    pass_time(engine, 2)
    hear_all(engine)
    assert engine.ends == {2: "queue_timeout"}
    assert engine.tokens[2] == []
    pass_time(engine, 3)
    hear_all(engine)
    assert engine.ends == {2: "queue_timeout", 3: "queue_timeout"}
    assert engine.scheduler.counts["num_queue_timeout"] == 2
    engine.drain()
    assert engine.ends[1] == "length"
    engine.check_empty()


def test_time_that_passed_before_the_scheduler_counts() -> None:
    engine = ScheduledEngine(max_num_seqs=1, queue_timeout_s=2)
    engine.send(1, [1], tokens(50))
    engine.step()
    now_ns = engine.clock.now_ns
    engine.send(2, [2], arrived_ns=now_ns - 3 * SECOND)
    engine.send(3, [3], arrived_ns=now_ns - SECOND)
    pass_time(engine, 0)
    hear_all(engine)
    assert engine.ends == {2: "queue_timeout"}
    assert engine.scheduler.next_timer_ns == now_ns + SECOND
    engine.scheduler.cancel([1, 3])
    engine.drain()
    engine.check_empty()


def test_a_withdrawn_request_is_declined_when_it_arrives_and_nobody_hears_of_it() -> None:
    engine = ScheduledEngine()
    assert engine.scheduler.withdraw([1, 2]) == [1, 2]
    engine.send(1, [1, 2, 3], SamplingParams(max_tokens=4, seed=7, n=2), deadline_ns=1)
    engine.scheduler.expire()
    assert engine.hear() is None
    assert engine.plan() is None
    engine.send_error(2, "invalid_request", "too long")
    assert engine.hear() is None
    engine.send(5, [1])  # and later ones are not
    engine.drain()
    assert engine.ends == {5: "length"}
    engine.check_empty()


def test_a_request_that_is_open_cannot_be_withdrawn_and_one_that_has_ended_is_not_waited_for() -> None:
    engine = ScheduledEngine()
    engine.send(1, [1], tokens(4))
    assert engine.scheduler.withdraw([1]) == []
    engine.drain()
    assert engine.ends == {1: "length"}
    assert engine.scheduler.withdraw([1]) == [1]
    assert engine.scheduler.num_withdrawn == 1
    engine.scheduler.cancel([1])  # the gateway knows that it has been there
    assert engine.scheduler.num_withdrawn == 0


def test_a_request_ends_once_whatever_times_out_after_that() -> None:
    engine = ScheduledEngine(queue_timeout_s=1)
    engine.send(1, [1], tokens(1), deadline_ns=engine.clock.now_ns + SECOND)
    engine.send(2, [2], tokens(1), deadline_ns=engine.clock.now_ns + SECOND)
    engine.scheduler.cancel([1])
    engine.drain()
    pass_time(engine, 2)
    assert engine.hear() is None
    assert engine.ends == {1: "cancelled", 2: "length"}
    assert engine.scheduler.next_timer_ns is None


def test_the_process_sleeps_until_the_next_timer_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScheduledEngine()
    monkeypatch.setattr(worker, "monotonic_ns", engine.clock)
    assert worker.timeout_ms(engine.scheduler, None) is None
    assert worker.timeout_ms(engine.scheduler, 50) == 50
    engine.send(1, [1], deadline_ns=engine.clock.now_ns + 30_000_001)
    assert worker.timeout_ms(engine.scheduler, None) == 31  # not 30: it would wake too early, and again and again
    assert worker.timeout_ms(engine.scheduler, 5) == 5
    engine.clock.now_ns += SECOND
    assert worker.timeout_ms(engine.scheduler, None) == 0


def test_timers_of_ended_requests_do_not_pile_up() -> None:
    is_open = {0}
    timers = Timers(is_open.__contains__)
    timers.add(10**18, 0, "deadline")
    for key in range(1, 1_000):
        timers.add(10**18 + key, key, "deadline")
    assert len(timers) <= 65
    assert timers.take_due(10**18) == [(0, "deadline")]


# Bounds of the queue


def test_the_queue_is_bounded_by_prompt_tokens() -> None:
    engine = ScheduledEngine(max_num_seqs=1, max_num_waiting_tokens=25)
    engine.send(0, [1], tokens(50))
    engine.step()
    for key, length in ((1, 20), (2, 6), (3, 5), (4, 1)):
        engine.send(key, [key] * length)
    hear_all(engine)
    assert set(engine.ends) == {2, 4}
    code, text = engine.errors[2]
    assert code == "queue_full"
    assert "20 prompt tokens wait" in text
    assert "max_num_waiting_tokens (25)" in text
    gauges = engine.scheduler.gauges()
    assert gauges["num_waiting_tokens"] == 25
    assert gauges["num_queue_full"] == gauges["num_refused"] == 2
    engine.scheduler.cancel([1])
    assert engine.scheduler.gauges()["num_waiting_tokens"] == 5
    engine.drain()
    assert engine.scheduler.gauges()["num_waiting_tokens"] == 0
    engine.check_empty()


def test_each_sample_of_a_prompt_counts_in_the_bound_and_all_are_taken_or_none() -> None:
    engine = ScheduledEngine(max_num_seqs=1, max_num_waiting_tokens=25)
    for key, length in ((0, 1), (1, 10)):
        engine.send(key, [key] * length)
    engine.send(10, [2] * 6, SamplingParams(max_tokens=1, seed=7, n=3))
    engine.send(20, [2] * 4, SamplingParams(max_tokens=1, seed=7, n=3))
    hear_all(engine)
    assert set(engine.ends) == {10}
    assert "with the 18 of this one" in engine.errors[10][1]
    assert engine.scheduler.gauges()["num_waiting_tokens"] == 1 + 10 + 12
    engine.drain()
    assert set(engine.ends) == {0, 1, 10, 20, 21, 22}
    engine.check_empty()


def test_a_prompt_longer_than_the_bound_is_taken_where_nobody_waits() -> None:
    engine = ScheduledEngine(max_num_waiting_tokens=4)
    engine.send(1, [1] * 10)
    engine.drain()
    assert engine.ends == {1: "length"}


def test_a_refusal_says_when_the_queue_will_have_moved() -> None:
    engine = ScheduledEngine(max_num_seqs=1, max_num_waiting=6)

    def refused(key: int) -> float:
        engine.send(key, [1], tokens(1))
        hear_all(engine)
        assert engine.errors[key][0] == "queue_full"
        return engine.retry_after_s[key]

    for key in range(7):
        engine.send(key, [1], tokens(1))
    assert refused(100) == 1.0, "nothing is known yet"
    for key in range(7, 10):  # one is admitted every two seconds
        engine.step()
        engine.clock.now_ns += 2 * SECOND
        engine.send(key, [1], tokens(1))
    assert 10 <= refused(101) <= 16
    engine.clock.now_ns += 1_000 * SECOND
    assert refused(102) == 60.0
    engine.drain()
    engine.check_empty()


def test_how_long_nothing_waited_does_not_make_the_hint_longer() -> None:
    engine = ScheduledEngine(max_num_seqs=1, max_num_waiting=3)
    for key in range(4):
        engine.send(key, [1], tokens(1))
        engine.step()
    engine.drain()
    engine.clock.now_ns += 10_000 * SECOND
    for key in range(10, 14):
        engine.send(key, [1], tokens(1))
    engine.clock.now_ns += SECOND
    engine.send(20, [1], tokens(1))
    hear_all(engine)
    assert engine.errors[20][0] == "queue_full"
    assert 0 < engine.retry_after_s[20] < 10
    engine.drain()
    engine.check_empty()
