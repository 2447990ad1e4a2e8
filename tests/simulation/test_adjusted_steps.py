"""Steps with adjusted logits on the simulated device: long values arrive in time, and every token is right.

Requests are chunked, preempted, resumed and mixed with requests without adjustments; rows are recycled.
"""

from __future__ import annotations

from random import Random
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ipc.records import FinishCode, StepRecord
from tests.reference.plain_adjustments import by_definition
from tests.simulation.harness import ToyModel
from tests.simulation.scripted import ScriptedRequest
from tests.simulation.simulated_device import UnorderedAccess
from tests.simulation.test_step_protocol import Blinkered, greedy_requests, simulate
from workers.gpu.execution.uploads import Uploads

VOCAB = ToyModel.vocab_size

torch.set_num_threads(1)


def adjusted_requests(random: Random) -> list[ScriptedRequest]:
    requests = greedy_requests(random)
    for request in requests:
        choices: dict[str, Any] = {
            "repetition_penalty": random.choice((0.5, 2.0)),
            "presence_penalty": random.uniform(-2, 2),
            "frequency_penalty": random.uniform(-2, 2),
            "min_tokens": random.randint(1, 4),
            "thinking": (*random.sample(range(VOCAB), 2), random.randint(0, 2)),
            "allowed": set(random.sample(range(VOCAB), 9)),
            "bias": {token: random.uniform(-3, 3) for token in random.sample(range(VOCAB), 6)},
            "bad_words": [random.choices(range(VOCAB), k=random.randint(1, 2)) for _ in range(30)],
        }
        request.adjustments = {name: value for name, value in choices.items() if random.random() < 0.3}
    return requests


def expected(request: ScriptedRequest) -> tuple[list[int], FinishCode]:
    ids, prompt_len = list(request.prompt), len(request.prompt)
    for _ in range(request.max_tokens):
        logits = by_definition(
            ToyModel.expected_logits(ids), ids, prompt_len, end_ids=list(request.end_ids), **request.adjustments
        )
        if max(logits) == -float("inf"):
            return ids[prompt_len:], FinishCode.EXCLUDED
        ids.append(logits.index(max(logits)))
        if ids[-1] in request.end_ids:
            return ids[prompt_len:], FinishCode.STOP
    return ids[prompt_len:], FinishCode.LENGTH


@pytest.mark.parametrize("depth", [1, 3])
def test_every_access_is_ordered_and_every_token_is_that_of_the_definitions(depth: int) -> None:
    num_changed, finishes = 0, set()
    for seed in range(40):
        for request in simulate(seed, depth, make=adjusted_requests, pad_batches=seed % 2 == 1):
            assert (request.tokens, request.finish) == expected(request), f"seed {seed}: {request}"
            num_changed += request.tokens != ToyModel.greedy(request.prompt, len(request.tokens))
            finishes.add(request.finish)
    assert num_changed > 60
    assert finishes == {FinishCode.STOP, FinishCode.LENGTH, FinishCode.EXCLUDED}


def test_launches_touch_what_they_declare_and_nothing_else() -> None:
    for seed in range(4):
        for request in simulate(seed, 2, make=adjusted_requests, device=Blinkered):
            assert (request.tokens, request.finish) == expected(request), f"seed {seed}"


def upload_long_values_only(self: Uploads, record: StepRecord, admission: int, enqueue: Any = Uploads.enqueue) -> None:
    """Copies of ids, whose missing order would be reported first, are left out."""
    length, record.admit.length[admission] = int(record.admit.length[admission]), 0
    enqueue(self, record, admission)
    record.admit.length[admission] = length


def test_long_values_for_a_row_that_is_recycled_early_are_reported() -> None:
    messages = []
    with patch.object(Uploads, "enqueue", upload_long_values_only):
        for seed in range(40):
            try:
                simulate(seed, 3, make=adjusted_requests, recycle_early=True)
            except UnorderedAccess as error:
                messages.append(str(error))
            except AssertionError:
                pass  # a wrong token, because of the ids, showed first
    assert any("copy_in writes long_values" in message for message in messages), messages
