from __future__ import annotations

from collections.abc import Callable

import pytest

from ipc.errors import RequestFailed
from ipc.sampling_params import SamplingParams
from tests.simulation.fake_gpu import expected_tokens
from tests.simulation.scheduled_engine import ScheduledEngine
from workers.scheduler.scheduler import GUILTY

WINDOW_S = 300.0
MAX_DEATHS = 20
MAX_TOKENS = 20


def engine_with(num_requests: int, *, depth: int = 2, max_num_seqs: int = 8, n: int = 1) -> ScheduledEngine:
    engine = ScheduledEngine(depth=depth, max_num_seqs=max_num_seqs, restart_window_s=WINDOW_S)
    for key in range(100, 100 * (num_requests + 1), 100):
        engine.send(key, [key % 61, 2, 3, 4, 5], SamplingParams(max_tokens=MAX_TOKENS, n=n, seed=0))
    return engine


def row_of(engine: ScheduledEngine, key: int) -> int | None:
    return next((each.row for each in engine.scheduler._table.sequences if each and each.key == key), None)


def run(engine: ScheduledEngine, kills: Callable[[int], bool], *, keys: set[int]) -> int:
    """Run to the end. The process dies whenever it begins a step of one of `keys` that computes a position that
    `kills`. Returns the number of deaths."""
    num_deaths = 0
    while engine.scheduler.has_work or engine.scheduler.num_in_flight:
        while engine.scheduler.num_in_flight < engine.depth and engine.plan() is not None:
            pass
        step, gpu = engine.gpu._submitted[0], engine.gpu
        new = slice(int(step.num_admissions[0]))
        admitted = dict(zip(step.admit.row[new], step.admit.num_computed_tokens[new].tolist(), strict=True))
        computed = {}
        for i in range(int(step.num_seqs[0])):
            row = int(step.seq_row[i])
            first = admitted[row] if row in admitted else int(gpu.num_computed[row])
            computed[row] = range(first, first + int(step.seq_num_tokens[i]))
        rows = {row_of(engine, key) for key in keys}
        if any(kills(position) for row in rows & computed.keys() for position in computed[row]):
            num_deaths += 1
            assert num_deaths <= MAX_DEATHS, "the killer is not found"
            engine.replace_device()
        else:
            engine.apply()
        while engine.hear() is not None:
            pass
    return num_deaths


def check_others(engine: ScheduledEngine, guilty: set[int], n: int = 1) -> None:
    """Every other sequence has the tokens that it must get alone."""
    for key in {key // 100 * 100 for key in engine.opened}:
        for sample in range(n):
            if key + sample in guilty:
                assert engine.errors[key + sample] == (RequestFailed.code, GUILTY)
                continue
            seed = SamplingParams(n=n, seed=0).of_sample(sample).seed or 0
            assert engine.tokens[key + sample] == expected_tokens([key % 61, 2, 3, 4, 5], seed, 5 + MAX_TOKENS, [])
    engine.check_empty()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("position", [0, 4, 5, 8])
def test_a_request_that_ends_the_gpu_process_ends_alone(depth: int, position: int) -> None:
    """In its prompt, at its first token, and later, where it passes its trial before it kills again."""
    engine = engine_with(5, depth=depth)
    num_deaths = run(engine, lambda computed: computed == position, keys={300})
    assert num_deaths == 4, "two before it is looked for, and two trials"
    check_others(engine, {300})


def test_a_killer_takes_all_samples_of_its_request_with_it() -> None:
    engine = engine_with(3, n=3)
    assert run(engine, lambda computed: computed == 6, keys={201}) <= 5
    check_others(engine, {200, 201, 202}, n=3)


def test_two_killers_are_found() -> None:
    engine = engine_with(4)
    assert run(engine, lambda computed: computed == 5, keys={100, 400}) <= 8
    check_others(engine, {100, 400})


def test_a_killer_that_waits_for_a_row_is_found_when_it_gets_one() -> None:
    engine = engine_with(5, max_num_seqs=2)
    assert run(engine, lambda computed: computed == 2, keys={500}) <= 4
    check_others(engine, {500})


def start(engine: ScheduledEngine) -> None:
    engine.step()
    engine.step()


def running(engine: ScheduledEngine) -> int:
    return int(engine.scheduler.gauges()["num_running"])


def test_after_one_death_all_sequences_are_resumed_at_once() -> None:
    engine = engine_with(5)
    start(engine)
    engine.replace_device()
    engine.plan()
    assert running(engine) == 3, "as many as the step has tokens for"


def test_after_a_second_death_in_the_window_one_sequence_is_on_trial_at_a_time() -> None:
    engine = engine_with(3)
    start(engine)
    engine.replace_device()
    engine.replace_device()
    for num_passed in range(3):
        engine.plan()
        engine.plan()
        assert running(engine) == num_passed + 1
        engine.send(900 + num_passed, [1], SamplingParams(max_tokens=2))
        while engine.scheduler.num_in_flight:
            engine.apply()
    engine.plan()
    assert running(engine) == 6, "probation is over, and the waiting ones are admitted"
    engine.drain()
    engine.check_empty()


def test_a_second_death_after_the_window_is_a_first_one() -> None:
    engine = engine_with(3)
    start(engine)
    engine.replace_device()
    engine.clock.now_ns += round(WINDOW_S * 1e9)
    engine.replace_device()
    engine.plan()
    assert running(engine) == 3


def test_a_process_that_dies_while_it_starts_marks_nobody() -> None:
    engine = engine_with(3)
    start(engine)
    for _ in range(2):
        engine.replace_device()
    for _ in range(5):
        engine.plan()
        assert running(engine) == 1
        engine.replace_device(was_ready=False)
    engine.drain()
    assert engine.ends == dict.fromkeys((100, 200, 300), "length")
    engine.check_empty()


def test_a_sequence_that_passes_loses_its_mark() -> None:
    engine = engine_with(3)
    start(engine)
    for _ in range(8):
        engine.replace_device()
        engine.plan()
        engine.replace_device()  # the one on trial gets a mark and goes last
        for _ in range(3):  # all pass
            while engine.scheduler.num_in_flight < engine.depth and engine.plan() is not None:
                pass
            while engine.scheduler.num_in_flight:
                engine.apply()
        if not engine.scheduler.num_open:
            break
    engine.drain()
    assert engine.ends == dict.fromkeys((100, 200, 300), "length")
