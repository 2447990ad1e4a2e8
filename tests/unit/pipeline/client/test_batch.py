"""A batch before an engine whose queue is full, on a clock of the test's own: no test here waits."""

from __future__ import annotations

import asyncio
import itertools
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ipc.errors import EngineUnavailable, InvalidRequest, QueueFull, RingfeedError
from pipeline.client.batch import Batch
from pipeline.client.outputs import Output


class _NoSleep(selectors.DefaultSelector):
    """Instead of waiting for a time, passes it."""

    passed_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "every task waits for ever"
        self.passed_s += timeout
        return super().select(0)


class MadeUpTime(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.passing = _NoSleep()
        super().__init__(self.passing)

    def time(self) -> float:
        return self.passing.passed_s


class Engine:
    """Takes `room()` requests at a time, each for a second, and refuses others."""

    def __init__(self, room: Callable[[], int], retry_after_s: float) -> None:
        self.room = room
        self.retry_after_s = retry_after_s
        self.num_open = self.most_asking = self.num_asking = 0
        self.refused_at: list[float] = []

    async def ask(self, index: int) -> Output:
        self.num_asking += 1
        self.most_asking = max(self.most_asking, self.num_asking)
        try:
            if self.num_open >= self.room():
                self.refused_at.append(asyncio.get_running_loop().time())
                await asyncio.sleep(0.001)
                error = QueueFull("full")
                error.retry_after_s = self.retry_after_s
                raise error
            self.num_open += 1
            await asyncio.sleep(1.0)
            self.num_open -= 1
            return Output(request_id=str(index), text=f"{index}", token_ids=[])
        finally:
            self.num_asking -= 1


def run(
    ask: Callable[[int], Awaitable[Output]],
    count: int,
    window: int,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> tuple[list[Output | RingfeedError], float, int]:
    """Results, the time that it took, and how many were reported."""
    results: dict[int, Output | RingfeedError] = {}

    def settle(index: int, result: Output | RingfeedError) -> None:
        assert index not in results
        results[index] = result

    with asyncio.Runner(loop_factory=MadeUpTime) as runner:
        runner.run(Batch(ask, range(count), window, pause=pause, settle=settle).run())
        return [results[i] for i in range(count)], runner.get_loop().time(), len(results)


def texts(results: list[Output | RingfeedError]) -> list[str]:
    return [result.text if isinstance(result, Output) else repr(result) for result in results]


@pytest.mark.parametrize("retry_after_s", [0.0, 0.5, 5.0])
def test_a_batch_larger_than_the_queue_keeps_it_full_and_asks_little(retry_after_s: float) -> None:
    engine = Engine(lambda: 50, retry_after_s)
    results, took_s, num_reported = run(engine.ask, 1_000, 400)
    assert texts(results) == [str(i) for i in range(1_000)]
    assert num_reported == 1_000
    assert engine.most_asking <= 400
    assert took_s <= 1.1 * 1_000 / 50, "a full queue is used as one that is not"
    assert len(engine.refused_at) <= 350 + 8 * took_s / (retry_after_s or 0.1), "refusals cost the engine"


def test_a_queue_that_others_fill_is_asked_no_sooner_than_it_says_and_used_when_it_is_free() -> None:
    loop_time = lambda: asyncio.get_running_loop().time()  # noqa: E731
    engine = Engine(lambda: 0 if loop_time() < 60.0 else 100, 10.0)
    results, took_s, _ = run(engine.ask, 500, 300)
    assert texts(results) == [str(i) for i in range(500)]
    later = [at for at in engine.refused_at if 0.1 < at < 60.0]
    assert later
    assert all(at >= 10.0 for at in later)
    assert all(after - before >= 10.0 for before, after in itertools.pairwise(later)), "one at a time"
    assert took_s <= 60.0 + 12.5 + 20.0, "it grows with every answer"


def test_batches_that_were_refused_together_do_not_come_back_together() -> None:
    times = []
    for _ in range(20):
        engine = Engine(lambda: 0 if asyncio.get_running_loop().time() < 8.0 else 1, 10.0)
        _, took_s, _ = run(engine.ask, 1, 1)
        times.append(took_s)
    assert all(11.0 <= took_s <= 13.6 for took_s in times)
    assert len({round(took_s, 2) for took_s in times}) > 5


def test_a_batch_does_not_outlast_its_last_answer() -> None:
    engine = Engine(lambda: 3, 1_000.0)
    _, took_s, _ = run(engine.ask, 9, 9)
    assert took_s <= 3.1


def test_an_engine_that_is_gone_ends_a_waiting_batch() -> None:
    async def pause(_: float) -> None:
        raise EngineUnavailable("gone")

    results, _, num_reported = run(Engine(lambda: 0, 1.0).ask, 9, 5, pause)
    assert {str(result) for result in results} == {"gone"}
    assert num_reported == 9


def test_any_other_error_is_the_result_of_its_request_alone() -> None:
    async def ask(index: int) -> Output:
        if index == 1:
            raise InvalidRequest("bad")
        return Output(request_id="", text="", token_ids=[])

    results, _, _ = run(ask, 3, 2)
    assert [isinstance(result, Output) for result in results] == [True, False, True]
