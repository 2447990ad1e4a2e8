"""Log-probabilities of prompts from the real scheduler and executor on the simulated device, with a real model.

Prompts take several chunks, beside requests that want none. Blocks are scarce, so that sequences are preempted. Other
requests have cached the same prefixes before.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from ipc import records
from ipc.block_hash import SEED_BYTES, chain_hashes, root_hash
from ipc.messages import PromptLogprobs, Route, Tokenized
from ipc.records import ResultRecord, StepRecord, StepShape
from ipc.sampling_params import SamplingParams
from tests.reference.tiny_models import VOCAB_SIZE, make_tiny_model, reference_logits, reference_model
from tests.simulation.harness import Simulation
from workers.gpu.config import CacheConfig, ModelConfig
from workers.gpu.execution import prompt_logprobs
from workers.gpu.model.loader import load_model
from workers.gpu.model.paged_runner import PagedModelRunner
from workers.scheduler.admission.prompt_rings import PromptRings
from workers.scheduler.config import SchedulerConfig
from workers.scheduler.scheduler import Scheduler

BLOCK_SIZE = 4
NUM_BLOCKS = 12
MAX_POSITIONS = 6  # of prompts with log-probabilities in one step
NOBODY = Route(client=b"", request_id="", stream=True)


@pytest.fixture(autouse=True)
def _few_positions_and_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(records, "MAX_PROMPT_LOGPROBS", MAX_POSITIONS)
    monkeypatch.setattr(prompt_logprobs, "_MIN_ROWS", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("gemma2", tmp_path_factory.mktemp("models") / "model", seed=1)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return reference_model(folder)


def shape() -> StepShape:
    return StepShape(max_num_seqs=4, max_num_batched_tokens=12, max_model_len=48, block_size=BLOCK_SIZE)


@pytest.fixture
def runner(folder: Path) -> PagedModelRunner:
    config = ModelConfig(path=str(folder), dtype="float32", device="cpu", num_threads=1)
    cache = CacheConfig(num_blocks=NUM_BLOCKS)
    return load_model(config, cache, shape(), torch.device("cpu"), lambda *_: None).runner


def requests(*, asking: bool) -> list[tuple[list[int], SamplingParams]]:
    """Prompts with their parameters. Those that ask for log-probabilities share prefixes with some that do not."""
    random = Random(11)

    def prompt(length: int) -> list[int]:
        return [random.randrange(VOCAB_SIZE) for _ in range(length)]

    def top(n: int) -> int | None:
        return n if asking else None

    shared = prompt(17)
    return [
        (shared, SamplingParams(max_tokens=6)),
        (prompt(9), SamplingParams(max_tokens=12, logprobs=2)),
        ([*shared, *prompt(8)], SamplingParams(max_tokens=14, prompt_logprobs=top(5))),
        (prompt(14), SamplingParams(max_tokens=5, n=3, temperature=0.8, seed=5, prompt_logprobs=top(0))),
        (shared, SamplingParams(max_tokens=1, prompt_logprobs=top(20))),
        (prompt(5), SamplingParams(max_tokens=20)),
        (prompt(1), SamplingParams(max_tokens=2, prompt_logprobs=top(3))),
        (shared[:13], SamplingParams(max_tokens=3)),
    ]


class Served:
    """One run of all requests. The scheduler receives them one by one, as prompt records and blocks allow."""

    def __init__(self, runner: PagedModelRunner, seed: int, depth: int, *, asking: bool = True) -> None:
        self.simulation = Simulation(seed, shape(), depth, NUM_BLOCKS, runner, pad_batches=bool(seed % 2))
        config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=12, max_model_len=48)
        prompts = PromptRings(self.simulation.prompt_rings)
        self.scheduler = Scheduler(config, shape(), depth, NUM_BLOCKS, [], prompts, clock=lambda: 0)
        self.requests = requests(asking=asking)
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.parts: dict[int, list[PromptLogprobs]] = defaultdict(list)
        self.cached: dict[int, int] = {}
        self.num_ended = 0
        self.preempted: set[int] = set()
        self.num_steps_with_positions = 0
        self._arrived: list[Tokenized] = []
        self._num_arrived = 0
        self.simulation.add_actor("tokenizer", self._tokenize)
        try:
            self.simulation.run(self, lambda: self.num_ended == sum(params.n for _, params in self.requests))
        finally:
            self.simulation.close()

    def _tokenize(self) -> bool:
        ring = self.simulation.tokenizer_rings[0]
        if self._num_arrived == len(self.requests) or ring.num_free() < 1:
            return False
        prompt, params = self.requests[self._num_arrived]
        ring.claim().token_ids[: len(prompt)] = prompt
        hashes = chain_hashes(root_hash(bytes(SEED_BYTES), ""), np.array(prompt, np.int32).tobytes(), BLOCK_SIZE)
        message = Tokenized(
            key=100 * self._num_arrived, route=NOBODY, params=params.with_seed(params.seed or 0), ring=1,
            ticket=ring.publish(), num_prompt_tokens=len(prompt), arrived_ns=0, block_hashes=hashes,
        )  # fmt: skip
        self._arrived.append(message)
        self._num_arrived += 1
        return True

    # The planner of the simulation

    def plan(self, record: StepRecord) -> bool:
        if self._arrived:
            self.scheduler.add(self._arrived.pop(0))
        self._hear()
        if not self.scheduler.plan(record):
            return False
        queue, sequences = self.scheduler._admission.queue, self.scheduler._table.sequences
        self.preempted |= {sequence.key for sequence in sequences if sequence and queue.is_preempted(sequence)}
        assert 0 <= record.num_prompt_logprobs[0] <= MAX_POSITIONS
        self.num_steps_with_positions += int(record.num_prompt_logprobs[0] > 0)
        return True

    def apply(self, result: ResultRecord) -> None:
        self.scheduler.apply(result)
        self._hear()

    def _hear(self) -> None:
        while (outputs := self.scheduler.take_outputs()) is not None:
            self.cached |= {key: num_cached for key, _, num_cached in outputs.admitted if num_cached}
            for key, part in outputs.prompt_logprobs:
                assert not self.tokens[key], f"log-probabilities of a prompt after the first token of {key}"
                self.parts[key].append(part)
            keys, ids = np.frombuffer(outputs.keys, np.int64), np.frombuffer(outputs.token_ids, np.int32)
            for key, token, finish in zip(keys.tolist(), ids.tolist(), outputs.finish, strict=True):
                self.tokens[key].append(token)
                self.num_ended += finish > 0


def check_prompt(prompt: list[int], num_top: int, parts: list[PromptLogprobs], reference: Any) -> None:
    """The parts together are the log-softmax of plain transformers at each position but the first."""
    expected = reference_logits(reference, prompt).log_softmax(-1)[:-1]  # [num_prompt - 1, vocab_size]
    ids = np.concatenate([np.frombuffer(part.token_ids, np.int32) for part in parts])
    assert ids.tolist() == prompt[1:]
    n = len(ids)
    logprobs = torch.tensor(np.concatenate([np.frombuffer(part.columns.logprobs, np.float32) for part in parts]))
    torch.testing.assert_close(logprobs, expected.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0], rtol=0, atol=1e-4)
    assert {part.columns.num_top for part in parts} == {num_top}
    top_ids = np.concatenate([np.frombuffer(part.columns.top_ids, np.int32) for part in parts]).reshape(n, num_top)
    values = np.concatenate([np.frombuffer(part.columns.top_logprobs, np.float32) for part in parts])
    top = torch.tensor(values.reshape(n, num_top))
    torch.testing.assert_close(top, expected.topk(num_top).values, rtol=0, atol=1e-4)
    torch.testing.assert_close(top, expected.gather(1, torch.tensor(top_ids.astype(np.int64))), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("seed", "depth"), [(0, 1), (1, 3)])
def test_prompts_have_transformers_log_softmax_and_no_request_gets_other_tokens(
    seed: int, depth: int, runner: PagedModelRunner, reference: Any
) -> None:
    served, plain = Served(runner, seed, depth), Served(runner, seed, depth, asking=False)
    assert served.tokens == plain.tokens
    assert plain.num_steps_with_positions == 0
    assert not any(plain.parts.values())
    for i, (prompt, params) in enumerate(served.requests):
        key, num_top = 100 * i, params.prompt_logprobs
        assert [len(served.tokens[key + sample]) for sample in range(params.n)] == [params.max_tokens] * params.n
        if num_top is None or len(prompt) == 1:
            assert not served.parts[key]
        else:
            assert max(len(part.token_ids) // 4 for part in served.parts[key]) <= MAX_POSITIONS
            check_prompt(prompt, num_top, served.parts[key], reference)
            assert key not in served.cached, "blocks that were cached have no logits"
        assert not any(served.parts[key + sample] for sample in range(1, params.n))
    assert served.cached, "no request found a cached block"
    gauges = served.scheduler.gauges()
    assert any(served.parts[key] for key in served.preempted), "no sequence was preempted that had asked for some"
    assert gauges["num_free_blocks"] == NUM_BLOCKS
    assert gauges["num_free_rows"] == 4
    assert served.scheduler._table.num_wanting_prompt_logprobs == 0
