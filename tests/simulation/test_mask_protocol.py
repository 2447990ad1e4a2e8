"""Masks on the simulated device: late, early, wrong and missing ones, for rows that end, are preempted or recycled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ipc.errors import RingError
from ipc.records import FinishCode, StepShape
from tests.simulation.harness import Simulation, ToyModel
from tests.simulation.scripted import ScriptedRequest, ScriptedScheduler
from tests.simulation.scripted_grammar import GrammarWorker, ScriptedGrammar, allowed_tokens
from tests.simulation.test_step_protocol import Blinkered, forget_wait
from workers.gpu.execution.executor import Executor
from workers.gpu.execution.step_masks import StepMasks
from workers.gpu.execution.steps import OwedMasks, Submitted

SHAPE = StepShape(
    max_num_seqs=4, max_num_batched_tokens=12, max_model_len=24, block_size=4, vocab_size=40, num_grammar_workers=2
)
NUM_BLOCKS = 12

torch.set_num_threads(1)


class WideToyModel(ToyModel):
    """Its masks have two words."""

    vocab_size = SHAPE.vocab_size


def simulate(
    seed: int, depth: int, *, requests: list[ScriptedRequest] | None = None, reliable: bool = False, **options: Any
) -> list[ScriptedRequest]:
    """Run a few requests, drawn from the seed, to their end and return them. Every mask record has been released."""
    simulation = Simulation(
        seed, SHAPE, depth, NUM_BLOCKS, WideToyModel(SHAPE, NUM_BLOCKS), mask_records=1 + seed % 3, **options
    )
    random, executor = simulation.random, simulation.executor
    workers = [GrammarWorker(random, SHAPE, ring, lambda: simulation.num_submitted) for ring in simulation.mask_rings]
    grammar = ScriptedGrammar(random, SHAPE, workers, reliable=reliable)
    scheduler = ScriptedScheduler(random, SHAPE, NUM_BLOCKS, simulation.prompt_rings, masks=grammar)
    requests = draw_requests(Random(seed)) if requests is None else requests
    arriving = list(requests)

    def arrive() -> bool:
        if not arriving:
            return False
        scheduler.waiting.append(arriving.pop(0))
        return True

    def pass_time() -> bool:
        """Only masks that are not to come in time are waited for."""
        held, deadline_ns = executor.held_back, executor.mask_deadline_ns
        if held is None or deadline_ns is None or not grammar.is_waited_for_in_vain(held.ticket):
            return False
        simulation.now_ns = deadline_ns
        return True

    simulation.add_actor("tokenizer", arrive)
    simulation.add_actor("clock", pass_time)
    for i, worker in enumerate(workers):
        simulation.add_actor(f"grammar.{i}", worker.act)
    try:
        simulation.run(scheduler, lambda: not arriving and scheduler.is_idle and all(w.is_idle for w in workers))
    finally:
        simulation.close()
    return requests


def draw_requests(random: Random) -> list[ScriptedRequest]:
    return [
        ScriptedRequest(
            prompt=[random.randrange(40) for _ in range(random.randint(1, 10))],
            max_tokens=random.randint(1, 8),
            end_ids=(random.randrange(40),),
            grammar=random.choice((0, key, key)),
            worker=random.randrange(SHAPE.num_grammar_workers),
        )
        for key in range(1, 7)
    ]


def expected(request: ScriptedRequest) -> tuple[list[int], FinishCode]:
    """The tokens of a request and how it ends, by the definition."""
    grammar = request.grammar
    tokens = WideToyModel.greedy(
        request.prompt,
        request.max_tokens,
        (lambda tokens: allowed_tokens(grammar, tokens, SHAPE.vocab_size)) if grammar else None,
    )
    for i, token in enumerate(tokens):
        if i == request.closed_at:
            return tokens[:i], FinishCode.EXCLUDED
        if token in request.end_ids:
            return tokens[: i + 1], FinishCode.STOP
    return tokens, FinishCode.LENGTH if len(tokens) == request.max_tokens else FinishCode.EXCLUDED


def check(seeds: range, depth: int, **options: Any) -> list[FinishCode]:
    """Every sequence gets its own tokens, or ends where its mask is closed. Returns how they ended."""
    ends = []
    for seed in seeds:
        for request in simulate(seed, depth, pad_batches=seed % 3 == 0, **options):
            assert (request.tokens, request.finish) == expected(request), f"seed {seed}, depth {depth}"
            ends.append(request.finish)
    return ends


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_token_obeys_its_grammar_and_a_mask_that_is_not_there_ends_its_sequence_alone(depth: int) -> None:
    ends = check(range(25), depth)
    assert {FinishCode.STOP, FinishCode.LENGTH, FinishCode.EXCLUDED} == set(ends)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_two_thousand_seeds_obey_their_grammars(depth: int) -> None:
    check(range(25, 25 + 667), depth)


def test_launches_with_masks_touch_what_they_declare_and_nothing_else() -> None:
    check(range(3), 2, device=Blinkered)


def test_sequences_without_a_grammar_get_the_same_tokens_beside_sequences_with_one() -> None:
    def sampled(num_grammars: int) -> list[ScriptedRequest]:
        requests = draw_requests(Random(5))
        for i, request in enumerate(requests):
            request.grammar = i + 1 if i < num_grammars else 0
            request.temperature, request.seed, request.top_k = 0.8, 70 + i, (0, 5)[i % 2]
        return requests

    alone = [request.tokens for request in simulate(0, 1, requests=sampled(0))]
    for seed in range(6):
        beside = [request.tokens for request in simulate(seed, 1 + seed % 3, requests=sampled(3))]
        assert beside[3:] == alone[3:], f"seed {seed}"
        assert beside[:3] != alone[:3], "the grammars did nothing"


def caught(seeds: int = 60, **options: Any) -> str:
    """What the first seed says that finds a planted fault."""
    for seed in range(seeds):
        for depth in (2, 3, 1):
            try:
                check(range(seed, seed + 1), depth, **options)
            except (AssertionError, RingError) as error:
                return str(error)
    raise AssertionError("no seed found the fault")


def of_the_step_before(masks: StepMasks, part: OwedMasks) -> torch.Tensor:
    ring = masks._sources[part.worker]
    return ring[(part.ticket - 1) % len(ring)][: part.num_masks]


def of_the_next_row(masks: StepMasks, part: OwedMasks) -> torch.Tensor:
    whole = masks._sources[part.worker][part.ticket % len(masks._sources[part.worker])]
    return whole[1 : 1 + part.num_masks] if part.num_masks < len(whole) else whole


def of_the_oldest_record(masks: StepMasks, record: Any) -> tuple[OwedMasks, ...]:
    return tuple(replace(part, ticket=masks._rings[part.worker].next_ticket) for part in owed_by(masks, record))


def from_the_first_row(masks: StepMasks, record: Any) -> tuple[OwedMasks, ...]:
    return tuple(replace(part, start=0) for part in owed_by(masks, record))


def copied_later(masks: StepMasks, step: Submitted) -> None:
    """The masks stay where they are: the adjustment uses those of an earlier step."""
    masks._device.record(masks.ready, masks._copy_in)


def left_open(masks: StepMasks, target: torch.Tensor) -> None:
    pass


def released_at_once(masks: StepMasks, step: Submitted) -> None:
    copy(masks, step)
    masks.finish(step.owed)


owed_by, copy = StepMasks.owed_by, StepMasks.copy


@pytest.mark.parametrize(
    ("owner", "method", "mutant"),
    [
        pytest.param(StepMasks, "_source", of_the_step_before, id="masks of the step before"),
        pytest.param(StepMasks, "_source", of_the_next_row, id="masks of other rows"),
        pytest.param(StepMasks, "owed_by", from_the_first_row, id="masks of all workers in the same rows"),
        pytest.param(StepMasks, "_is_for", lambda *_: True, id="no check of the step"),
        pytest.param(StepMasks, "copy", copied_later, id="no copy"),
        pytest.param(StepMasks, "_close", left_open, id="closed masks left open"),
        pytest.param(StepMasks, "release_late", lambda _: None, id="late records kept"),
        pytest.param(StepMasks, "copy", released_at_once, id="records released before their copies"),
        pytest.param(StepMasks, "owed_by", of_the_oldest_record, id="a late record taken for the next"),
        pytest.param(Executor, "_earlier_are_published", lambda *_: True, id="no wait for the result before"),
        pytest.param(Executor, "_masks_are_decided", lambda *_: True, id="no wait for the masks"),
    ],
)
def test_a_planted_fault_is_found(owner: type, method: str, mutant: Callable[..., Any]) -> None:
    with patch.object(owner, method, mutant):
        assert caught()


def test_an_adjustment_that_does_not_wait_for_the_copies_is_found() -> None:
    assert "compute reads masks" in caught(device=forget_wait("compute", "masks_ready"))
