"""The real scheduler and the real executor on the simulated device, over thousands of seeds.

A seed draws the depth, requests, cancellations, the order of the threads' turns, and the time when queued device work
runs. Blocks are scarce. For every seed, events must order all accesses, and the tokens must depend only on the
requests.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from random import Random
from unittest.mock import patch

import numpy as np
import pytest
import torch

from ipc.messages import PromptLogprobs, Route, Tokenized
from ipc.records import FinishCode, PromptRecord, ResultRecord, StepRecord, StepShape
from ipc.ring import Ring
from ipc.sampling_params import SamplingParams
from tests.simulation.harness import Simulation, ToyModel
from tests.simulation.simulated_device import SimulatedDevice, UnorderedAccess
from tests.simulation.test_step_protocol import forget_wait
from workers.scheduler.admission.prompt_rings import PromptRings
from workers.scheduler.config import SchedulerConfig
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.sequence_table import SequenceTable

SHAPE = StepShape(max_num_seqs=3, max_num_batched_tokens=10, max_model_len=24, block_size=4)
NUM_BLOCKS = 9  # three sequences want up to eighteen: some are preempted
NUM_REQUESTS = 6
NUM_CHUNKS = 20
NUM_FAST = 12  # of the chunks
SEEDS_PER_CHUNK = 100
DEATH_RATE = 0.03  # at each turn of death
NOBODY = Route(client=b"", request_id="", stream=True)

torch.set_num_threads(1)


class Run:
    """One seed: requests that arrive, are cancelled, and what became of each."""

    def __init__(
        self,
        seed: int,
        *,
        depth: int | None = None,
        credits: int = 0,
        device: type[SimulatedDevice] = SimulatedDevice,
        max_deaths: int = 0,
    ) -> None:
        self.num_deaths, self._max_deaths = 0, max_deaths
        self.random = Random(seed)
        depth = depth or self.random.randint(1, 4)
        self.simulation = Simulation(
            seed, SHAPE, depth, NUM_BLOCKS, ToyModel(SHAPE, NUM_BLOCKS), credits=depth + credits,
            num_tokenizers=2, prompt_records=4, pad_batches=bool(seed % 2), device=device,
        )  # fmt: skip
        config = SchedulerConfig(max_num_seqs=SHAPE.max_num_seqs)
        prompts = PromptRings(self.simulation.prompt_rings)
        self.scheduler = Scheduler(
            config, SHAPE, depth + credits, NUM_BLOCKS, [3], prompts, clock=lambda: 0, restart_window_s=-1.0
        )
        self.prompts = [
            [self.random.randrange(16) for _ in range(self.random.randint(1, 12))] for _ in range(NUM_REQUESTS)
        ]
        self.limits = [self.random.randint(1, 8) for _ in range(NUM_REQUESTS)]
        scoring = Random(f"scoring {seed}")
        tops = [None, 0, 3] if seed % 5 == 0 else [None]
        self.num_top = [scoring.choice(tops) for _ in range(NUM_REQUESTS)]  # of their prompts' log-probabilities
        self.prompt_parts: list[list[PromptLogprobs]] = [[] for _ in range(NUM_REQUESTS)]
        self.tokens: list[list[int]] = [[] for _ in range(NUM_REQUESTS)]
        self.ends: dict[int, str] = {}
        self.num_records_lost = 0
        self._to_announce: list[Tokenized] = []
        self._num_arrived = 0
        self._cancels = [k for k in range(NUM_REQUESTS) if self.random.random() < 0.2]

    def go(self) -> Run:
        self.simulation.add_actor("tokenizer", self._tokenize)
        if self._max_deaths:
            self.simulation.add_actor("death", self._die)
        try:
            self.simulation.run(self, lambda: len(self.ends) == NUM_REQUESTS)
            self.num_records_lost = sum(r.num_slots - r.num_free() for r in self.simulation.tokenizer_rings)
        finally:
            self.simulation.close()
        return self

    def _tokenize(self) -> bool:
        """Write the next prompt into one of the rings. The scheduler receives it on one of its later turns."""
        ring_index = 1 + self._num_arrived % 2
        ring: Ring[PromptRecord] = self.simulation.tokenizer_rings[ring_index - 1]
        if self._num_arrived == NUM_REQUESTS or ring.num_free() < 1:
            return False
        prompt = self.prompts[self._num_arrived]
        ring.claim().token_ids[: len(prompt)] = prompt
        params = SamplingParams(
            max_tokens=self.limits[self._num_arrived], seed=0, prompt_logprobs=self.num_top[self._num_arrived]
        )
        self._to_announce.append(
            Tokenized(key=self._num_arrived, route=NOBODY, params=params, ring=ring_index, ticket=ring.publish(),
                      num_prompt_tokens=len(prompt), arrived_ns=0)
        )  # fmt: skip
        self._num_arrived += 1
        return True

    def _die(self) -> bool:
        """At times the GPU process dies: its records are read or not, and its results published or not."""
        if self.num_deaths == self._max_deaths or self.random.random() > DEATH_RATE:
            return False
        self.num_deaths += 1
        self.simulation.replace_device(ToyModel(SHAPE, NUM_BLOCKS))
        self.scheduler.replace_device(self.simulation.epoch)
        return True

    # The planner of the simulation: the scheduler and what reaches it by messages

    def plan(self, record: StepRecord) -> bool:
        while self._to_announce:
            self.scheduler.add(self._to_announce.pop(0))
        if self._cancels and self.random.random() < 0.1:
            self.scheduler.cancel([self._cancels.pop()])  # of a request that waits, runs, has ended, or never came
        self._hear()
        return self.scheduler.plan(record)

    def apply(self, result: ResultRecord) -> None:
        self.scheduler.apply(result)
        self._hear()

    def _hear(self) -> None:
        while (outputs := self.scheduler.take_outputs()) is not None:
            for key, part in outputs.prompt_logprobs:
                assert not self.tokens[key], f"log-probabilities of a prompt after the first token of {key}"
                self.prompt_parts[key].append(part)
            keys, ids = np.frombuffer(outputs.keys, np.int64), np.frombuffer(outputs.token_ids, np.int32)
            for key, token, finish in zip(keys.tolist(), ids.tolist(), outputs.finish, strict=True):
                assert key not in self.ends, f"a token after the end of {key}"
                self.tokens[key].append(token)
                if finish != FinishCode.RUNNING:
                    self.ends[key] = FinishCode(finish).name.lower()
            for ended in outputs.ended:
                assert ended.key not in self.ends, f"{ended.key} ended twice"
                self.ends[ended.key] = ended.finish_reason

    def check_prompt(self, key: int) -> None:
        """The log-probabilities of the prompt are complete if there is a token, and each is the model's."""
        prompt, num_top = self.prompts[key], self.num_top[key]
        ids = [token for part in self.prompt_parts[key] for token in np.frombuffer(part.token_ids, np.int32).tolist()]
        assert ids == (prompt[1:] if self.tokens[key] and num_top is not None else prompt[1 : 1 + len(ids)])
        if not ids:
            return
        logits = torch.tensor([ToyModel.expected_logits(prompt[:i]) for i in range(1, 1 + len(ids))])
        expected = logits.log_softmax(-1)
        columns = [part.columns for part in self.prompt_parts[key]]
        logprobs = torch.tensor(np.concatenate([np.frombuffer(each.logprobs, np.float32) for each in columns]))
        top = torch.tensor(np.concatenate([np.frombuffer(each.top_logprobs, np.float32) for each in columns]))
        assert (logprobs - expected.gather(1, torch.tensor(ids)[:, None])[:, 0]).abs().max() < 1e-4
        assert (top - expected.topk(num_top or 0).values.flatten()).abs().sum() < 1e-3

    def expected(self, key: int) -> tuple[list[int], str]:
        tokens = ToyModel.greedy(self.prompts[key], self.limits[key])
        return (tokens[: tokens.index(3) + 1], "stop") if 3 in tokens else (tokens, "length")


def check(run: Run) -> None:
    for key in range(NUM_REQUESTS):
        run.check_prompt(key)
        tokens, reason = run.expected(key)
        if run.ends[key] == "cancelled":
            assert run.tokens[key] == tokens[: len(run.tokens[key])]
        else:
            assert (run.tokens[key], run.ends[key]) == (tokens, reason)
    gauges = run.scheduler.gauges()
    assert gauges["num_free_blocks"] == NUM_BLOCKS, "a block was lost"
    assert gauges["num_running"] == gauges["num_waiting"] == gauges["num_preempted"] == 0
    assert run.num_records_lost == 0, "a prompt record was not released"


@pytest.mark.parametrize(
    "chunk", [*range(NUM_FAST), *(pytest.param(chunk, marks=pytest.mark.slow) for chunk in range(NUM_FAST, NUM_CHUNKS))]
)
def test_no_seed_finds_an_unordered_access_or_a_wrong_token(chunk: int) -> None:
    num_preemptions = num_cancelled = 0
    for seed in range(chunk * SEEDS_PER_CHUNK, (chunk + 1) * SEEDS_PER_CHUNK):
        run = Run(seed).go()
        check(run)
        num_preemptions += run.scheduler.gauges()["num_preemptions"]
        num_cancelled += list(run.ends.values()).count("cancelled")
    assert num_preemptions > 0
    assert num_cancelled > 0


def check_deaths(seeds: range) -> int:
    """Returns how often the GPU process died."""
    num_deaths = 0
    for seed in seeds:
        run = Run(seed, max_deaths=5)
        try:
            check(run.go())
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        num_deaths += run.num_deaths
    return num_deaths


def test_requests_get_their_own_tokens_from_a_new_gpu_process() -> None:
    assert check_deaths(range(0, 100, 7)) > 30


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_many_seeds_survive_the_deaths_of_the_gpu_process(part: int) -> None:
    check_deaths(range(100 + part, 300, 4))


def reports(faulty: Callable[[int], Run], seeds: int = 30) -> list[str]:
    """Return the checker's message about a faulty engine, seed by seed."""
    messages = []
    for seed in range(seeds):
        try:
            faulty(seed).go()
        except UnorderedAccess as error:
            messages.append(str(error))
        except AssertionError:
            messages.append("")  # a wrong token showed first
    return messages


def retire_at_once(
    rows: SequenceTable, row: int, retire: Callable[[SequenceTable, int], None] = SequenceTable.retire
) -> None:
    rows.last_ticket[row] = 0  # as if no step in flight named it
    retire(rows, row)


@pytest.mark.parametrize(
    ("fault", "words", "make"),
    [
        ("compute does not wait for the inputs", "compute", lambda s: Run(s, device=forget_wait("compute", "inputs"))),
        ("copies out do not wait for the step", "copy_out", lambda s: Run(s, device=forget_wait("copy_out", "step"))),
        ("one credit too much", "", lambda s: Run(s, depth=2, credits=1)),
        ("a row recycled early", "token_ids", lambda s: Run(s, depth=3)),
    ],
)
def test_a_planted_fault_is_found(fault: str, words: str, make: Callable[[int], Run]) -> None:
    mutant: AbstractContextManager[object] = nullcontext()
    if "recycled" in fault:
        mutant = patch.object(SequenceTable, "retire", retire_at_once)
    with mutant:
        messages = reports(make)
    assert any(words in message for message in messages if message), messages
