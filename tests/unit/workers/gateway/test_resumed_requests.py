"""Requests that go on where an earlier attempt was interrupted, as the gateway sees them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ipc.messages import FinalOutput, Outputs, RequestTimes, Resume, ResumedSample
from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import SchedulingParams
from tests.simulation.scheduled_engine import resume_with
from tests.unit.workers.gateway.gateway_tools import Harness, generate

THREE = SamplingParams(max_tokens=4, n=3, seed=7)
SECOND = 1_000_000_000


def test_what_the_client_has_and_its_clock_travel_to_the_tokenizer() -> None:
    gateway = Harness()
    resume = resume_with([[1, 2], None, []])
    gateway.client(generate("r", params=THREE, resume=resume, clock_s=1.5e9))
    gateway.client(generate("q"))
    resumed, new = gateway.pass_on()
    assert (resumed.resume, resumed.clock_s, resumed.params) == (resume, 1.5e9, THREE)
    assert (new.resume, new.clock_s) == (None, None)
    assert new.key == resumed.key + 3, "the keys of ended samples are not used again"


def sample(num_tokens: int = 1, **fields: Any) -> ResumedSample:
    return ResumedSample(token_ids=bytes(4 * num_tokens), **fields)


@pytest.mark.parametrize(
    ("resume", "error"),
    [
        (Resume(samples=[]), r"resume.samples has 0 entries: it must have one for each of n (3)"),
        (resume_with([[1], [2]]), r"resume.samples has 2 entries: it must have one for each of n (3)"),
        (resume_with([[1], [2], [3], [4]]), r"resume.samples has 4 entries: it must have one for each of n (3)"),
        (resume_with([None] * 3), "resume: every sample has ended"),
        (Resume(samples=[sample()] * 3, num_suspected=-1), "resume.num_suspected (-1) must be at least 0"),
        (Resume(samples=[sample(), sample(num_chars=-1), sample()]), "resume.samples[1].num_chars (-1) must be"),
        (
            Resume(samples=[sample(), sample(), ResumedSample(token_ids=bytes(7))]),
            "resume.samples[2].token_ids must be int32 values: 7 bytes",
        ),
        (Resume(samples=[sample(3), sample(4), sample(3)]), "resume.samples[1] has 4 tokens and has not ended"),
    ],
)
def test_a_resume_that_contradicts_itself_or_its_request_is_refused(resume: Resume, error: str) -> None:
    gateway = Harness()
    gateway.client(generate("r", params=THREE, resume=resume))
    assert (gateway.refusal().request_id, gateway.refusal().error_code) == ("r", "invalid_request")
    assert error in gateway.refusal().error_message
    assert len(gateway.core.table) == 0


def test_an_ended_sample_may_have_as_many_tokens_as_max_tokens_and_an_open_one_one_less() -> None:
    gateway = Harness()
    samples = [sample(4, has_ended=True), sample(3), sample(0)]
    gateway.client(generate("r", params=THREE, resume=Resume(samples=samples)))
    gateway.client(generate("q", params=SamplingParams(), resume=Resume(samples=[sample(1_000)])))
    assert len(gateway.pass_on()) == 2


@pytest.mark.parametrize("clock_s", [-1.0, float("nan"), float("inf"), 1e18])
def test_a_clock_without_a_date_is_refused(clock_s: float) -> None:
    gateway = Harness()
    gateway.client(generate("r", clock_s=clock_s))
    assert "clock_s" in gateway.refusal().error_message


def test_a_resumed_request_does_not_run_out_of_queue_time_and_keeps_its_deadline() -> None:
    gateway = Harness(policy={"queue_timeout_s": 2.0})
    for number in range(4):
        gateway.client(generate(f"r{number}"))
    slow = SchedulingParams(queue_timeout_s=1.0, deadline_s=5.0)
    gateway.client(generate("resumed", params=THREE, resume=resume_with([None, [1, 2], [3]]), scheduling=slow))
    gateway.tick(2.5)
    assert gateway.finals == {}, "the four are at the tokenizers, and the scheduler is asked first"
    gateway.tick(2.5)
    [outputs] = gateway.answers(Outputs)
    assert outputs.request_ids == ["resumed"] * 2
    assert np.frombuffer(outputs.samples, np.int32).tolist() == [1, 2]
    times = RequestTimes(100 * SECOND)
    assert outputs.finals == [
        (0, FinalOutput("deadline", 0, 2, num_open=1, times=times)),
        (1, FinalOutput("deadline", 0, 1, num_open=0, times=times)),
    ]
    assert len(gateway.core.table) == 4
