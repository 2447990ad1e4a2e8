"""The GPU process dies at any moment under random traffic, and every request gets the tokens that it must get alone.

Deaths come at random, and in some runs at every single event: with results that are published and not applied, with
requests for masks that no grammar process has read, with prompts that are half computed, and with no step in flight.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from msgspec import structs

from ipc.errors import Interrupted, RingError
from tests.simulation.scheduled_engine import ScheduledEngine
from tests.simulation.test_scheduler_random import MAX_N, Traffic, check_cache, check_end, check_masks, check_samples
from workers.scheduler.kv_cache.kv_cache import KVCache
from workers.scheduler.planning.mask_requests import MaskRequests
from workers.scheduler.scheduler import GUILTY, Scheduler
from workers.scheduler.sequence import Sequence
from workers.scheduler.sequence_table import SequenceTable

DEATH_RATES = (0.005, 0.02, 0.1)  # at each event
NUM_SEEDS = 2_000
NUM_FAST_SEEDS = 60
MAX_REQUESTS = 6
MAX_DEATHS = 10
MAX_GRAMMAR_DEATHS = 2
NUM_PARTS = 10  # of the slow seeds


class DyingTraffic(Traffic):
    """Traffic with log-probabilities of prompts, in which the GPU process dies.

    Grammar processes die too, in other moments. In one seed of four, deaths of the GPU process are close enough
    together for the scheduler to look for a request that causes them.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.requests = dict(list(self.requests.items())[:MAX_REQUESTS])
        first_other = MAX_N * (1 + len(self.requests))
        self.sequences = {key: each for key, each in self.sequences.items() if key < first_other}
        self.cancel_after = {key: after for key, after in self.cancel_after.items() if key < first_other}
        scoring = random.Random(f"scoring {seed}")
        for key, (prompt, params) in self.requests.items():
            top = scoring.choice([None, None, 0, 3])
            self.requests[key] = prompt, structs.replace(params, prompt_logprobs=top)
        self.has_probation = seed % 4 == 1
        self.shape["restart_window_s"] = 1_000.0 if self.has_probation else 0.5
        self.depth = 1 + seed % 3
        self.num_deaths = self.num_grammar_deaths = 0

    def die(self, engine: ScheduledEngine) -> None:
        self.num_deaths += 1
        engine.replace_device()

    def run_with_deaths(self) -> ScheduledEngine:
        rng = random.Random(f"deaths {self.seed}")
        rate = rng.choice(DEATH_RATES)

        def die_at_times(_: int, engine: ScheduledEngine) -> None:
            if self.num_deaths < MAX_DEATHS and rng.random() < rate:
                self.die(engine)
            for worker in range(self.shape["num_grammar_workers"]):
                if self.num_grammar_deaths < MAX_GRAMMAR_DEATHS and rng.random() < rate / 4:
                    self.num_grammar_deaths += 1
                    engine.scheduler.lose_grammar_worker(worker)
                    engine.grammar.restart(worker)

        return self.run(self.depth, die_at_times)

    def run_with_death_at(self, moment: int) -> tuple[ScheduledEngine, bool]:
        """Let the process die before one event. Says whether the run was that long."""

        def die_once(event: int, engine: ScheduledEngine) -> None:
            if event == moment:
                self.die(engine)

        engine = self.run(self.depth, die_once)
        return engine, self.num_deaths > 0


def check(traffic: DyingTraffic, engine: ScheduledEngine) -> None:
    engine.check_empty()
    check_cache(traffic, engine)
    check_samples(traffic, engine)
    guilty = {key for key, (_, text) in engine.errors.items() if text == GUILTY}
    assert not guilty or traffic.has_probation
    interrupted = {key for key, (code, _) in engine.errors.items() if code == Interrupted.code}
    assert not interrupted or traffic.num_grammar_deaths
    assert all(traffic.sequences[key][1].structured_outputs for key in interrupted)
    for key in guilty | interrupted:
        assert engine.tokens[key] == traffic.rest(key)[: len(engine.tokens[key])]
    check_masks(traffic, engine)
    for key, end in engine.ends.items():
        if key not in guilty | interrupted:
            check_end(traffic, engine, key, end)
        check_prompt(traffic, engine, key)


def check_prompt(traffic: DyingTraffic, engine: ScheduledEngine, key: int) -> None:
    """Sample 0 has the log-probability of each token of its prompt once, as the fake GPU makes it."""
    prompt, _ = traffic.sequences[key]
    parts = engine.prompt_parts.get(key, [])
    ids = [token for part in parts for token in np.frombuffer(part.token_ids, np.int32).tolist()]
    top = traffic.requests[key - key % MAX_N][1].prompt_logprobs
    if key % MAX_N or top is None:
        assert not parts
        return
    assert ids == prompt[1 : 1 + len(ids)]
    assert len(ids) == len(prompt) - 1 or not engine.tokens[key], "a token came before the prompt's log-probabilities"
    found = [value for part in parts for value in np.frombuffer(part.columns.logprobs, np.float32).tolist()]
    assert found == [-i - token / 64 for i, token in enumerate(ids, start=1)]
    top_ids = [i for part in parts for i in np.frombuffer(part.columns.top_ids, np.int32).tolist()]
    assert top_ids == [position + i for position in range(1, 1 + len(ids)) for i in range(top)]


def check_seeds(seeds: range) -> tuple[int, int]:
    """Returns how many deaths and preemptions there were."""
    num_deaths = num_preemptions = 0
    for seed in seeds:
        traffic = DyingTraffic(seed)
        try:
            engine = traffic.run_with_deaths()
            check(traffic, engine)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        num_deaths += traffic.num_deaths
        num_preemptions += engine.scheduler.counts["num_preemptions"]
    return num_deaths, num_preemptions


def test_requests_get_their_own_tokens_however_often_the_gpu_process_dies() -> None:
    num_deaths, num_preemptions = check_seeds(range(NUM_FAST_SEEDS))
    assert num_deaths > NUM_FAST_SEEDS
    assert num_preemptions > 0


@pytest.mark.slow
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_two_thousand_seeds_survive_the_deaths_of_the_gpu_process(part: int) -> None:
    check_seeds(range(NUM_FAST_SEEDS + part, NUM_SEEDS, NUM_PARTS))


def longest_run(seed: int) -> int:
    """At how many events the process can die in a run without deaths."""
    traffic, num_events = DyingTraffic(seed), 0

    def count(event: int, _: ScheduledEngine) -> None:
        nonlocal num_events
        num_events = event + 1

    traffic.run(traffic.depth, count)
    return num_events


def check_each_event(seed: int, step: int) -> None:
    """The process dies once, at every `step`-th event of a run."""
    for moment in range(0, longest_run(seed), step):
        traffic = DyingTraffic(seed)
        try:
            engine, has_died = traffic.run_with_death_at(moment)
            assert has_died or moment > 0
            check(traffic, engine)
        except Exception as error:
            error.add_note(f"seed {seed}, death before event {moment}")
            raise


@pytest.mark.parametrize(("seed", "step"), [(51, 12), (40, 2), (26, 3)])  # short runs of depth 1, 2 and 3
def test_the_gpu_process_may_die_at_any_event_of_a_run(seed: int, step: int) -> None:
    check_each_event(seed, step)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 14, 17, 22, 37, 46, 51])
def test_the_gpu_process_may_die_at_every_single_event_of_a_run(seed: int) -> None:
    check_each_event(seed, 1)


# Faults that must be found

Replace = Callable[..., Any]


def apply_old_results(
    scheduler: Scheduler, epoch: int, *, was_ready: bool, replace: Replace = Scheduler.replace_device
) -> None:
    """Steps in flight stay in flight, so results of the new process are taken for theirs."""
    in_flight = list(scheduler._in_flight)
    replace(scheduler, epoch, was_ready=was_ready)
    scheduler._in_flight.extend(in_flight)


def read_old_ring(engine: ScheduledEngine, replace: Replace = ScheduledEngine.replace_device) -> None:
    """Results that the dead process has published are still read after it is replaced."""
    size = 2 * engine.depth
    left = [engine._result_records[i % size].storage.copy() for i in range(engine.num_applied, engine.num_run)]
    replace(engine)
    if left:
        run_next = engine.gpu.run_next

        def run_and_mix_up(result: Any) -> None:
            run_next(result)
            if left:
                result.storage[:] = left.pop(0)

        engine.gpu.run_next = run_and_mix_up  # type: ignore[method-assign]


def keep_num_computed(table: SequenceTable, replace: Replace = SequenceTable.replace_device) -> list[Sequence]:
    """The new process hears that a resumed row's tokens are computed up to where they were."""
    computed = table.num_computed_tokens.copy()
    owners = replace(table)
    for sequence in owners:

        def write(admit: Any, i: int, num_computed: int, *leases: Any, each: Sequence = sequence) -> None:
            known = int(table.num_tokens[each.row])
            Sequence.write_admission(each, admit, i, max(num_computed, min(known - 1, computed[each.row])), *leases)

        sequence.write_admission = write  # type: ignore[method-assign, assignment]
    return owners


def keep_planned(table: SequenceTable, replace: Replace = SequenceTable.replace_device) -> list[Sequence]:
    """Tokens that void steps would have sampled still count."""
    planned = table.num_planned_tokens.copy()
    owners = replace(table)
    table.num_planned_tokens[:] = planned
    return owners


def keep_rows(table: SequenceTable, replace: Replace = SequenceTable.replace_device) -> list[Sequence]:
    """Ids are not sent again."""
    owners = replace(table)
    table.is_lost[:] = False
    return owners


def send_prompt_logprobs_again(table: SequenceTable, replace: Replace = SequenceTable.replace_device) -> list[Sequence]:
    table.num_prompt_logprobs[:] = 0
    return replace(table)


def forget_prompt_logprobs(table: SequenceTable, replace: Replace = SequenceTable.replace_device) -> list[Sequence]:
    """Positions that void steps have planned are not planned again."""
    ends = table.prompt_logprobs_end.copy()
    owners = replace(table)
    table.prompt_logprobs_end[:] = ends
    table.num_wanting_prompt_logprobs = int((ends > 0).sum())
    return owners


def relabel_old_requests(requests: MaskRequests, epoch: int, replace: Replace = MaskRequests.replace_rings) -> None:
    """Requests for masks of the dead process name the new process's ring."""
    for ring in requests._rings:
        for ticket in range(ring.read_cursor, ring.next_ticket):
            ring.record(ticket).mask_epoch[0] = epoch
    replace(requests, epoch)


def keep_mask_tickets(requests: MaskRequests, epoch: int, replace: Replace = MaskRequests.replace_rings) -> None:
    tickets = getattr(requests, "_next_tickets", None)
    replace(requests, epoch)
    requests._next_tickets = tickets or requests._next_tickets


def keep_prefixes(cache: KVCache) -> None:
    """Cached blocks are still found."""
    rows = cache.tables.num_blocks.nonzero()[0].tolist()
    if rows:
        cache.tables.free_rows(rows)


@pytest.mark.parametrize(
    ("owner", "method", "mutant"),
    [
        pytest.param(Scheduler, "replace_device", apply_old_results, id="old steps kept"),
        pytest.param(ScheduledEngine, "replace_device", read_old_ring, id="old results applied"),
        pytest.param(SequenceTable, "replace_device", keep_num_computed, id="computed tokens not reset"),
        pytest.param(SequenceTable, "replace_device", keep_planned, id="planned tokens not reset"),
        pytest.param(SequenceTable, "replace_device", keep_rows, id="ids not sent again"),
        pytest.param(SequenceTable, "replace_device", send_prompt_logprobs_again, id="prompt logprobs sent twice"),
        pytest.param(SequenceTable, "replace_device", forget_prompt_logprobs, id="prompt logprobs forgotten"),
        pytest.param(MaskRequests, "replace_rings", relabel_old_requests, id="old masks taken for new ones"),
        pytest.param(MaskRequests, "replace_rings", keep_mask_tickets, id="mask tickets go on"),
        pytest.param(KVCache, "reset", keep_prefixes, id="prefix index not cleared"),
    ],
)
def test_a_planted_fault_is_found(owner: Any, method: str, mutant: Any) -> None:
    with patch.object(owner, method, mutant):
        assert any(is_found(seed) for seed in range(NUM_FAST_SEEDS))


def is_found(seed: int) -> bool:
    """Whether a seed, which passes without the fault, fails with it."""
    try:
        check_seeds(range(seed, seed + 1))
    except (AssertionError, IndexError, ValueError, RingError, pytest.fail.Exception):
        return True
    return False
