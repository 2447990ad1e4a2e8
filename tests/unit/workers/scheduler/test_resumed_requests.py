"""Requests that bring output: they get exactly the rest of their answer, and nothing of what they brought."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ipc.messages import Compile
from ipc.sampling_params import SamplingParams
from ipc.structured_outputs import StructuredOutputs
from tests.simulation.fake_gpu import expected_tokens
from tests.simulation.scheduled_engine import RECORD_TOKENS, ScheduledEngine
from workers.scheduler import output_buffer
from workers.scheduler.admission.admission import Arrival

PROMPT = list(range(2, 13))  # 11 tokens: two records, two full blocks and a part of a third
SPEC = StructuredOutputs(json_object=True)


def params(max_tokens: int = 12, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=fields.pop("seed", 3), **fields)


def answer(sample: int = 0, n: int = 1, max_tokens: int = 12) -> list[int]:
    seed = params(n=n).of_sample(sample).seed
    assert seed is not None
    return expected_tokens(PROMPT, seed, len(PROMPT) + max_tokens, [])


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("num_known", [0, 1, 2, 5, 6, 11])
def test_the_rest_of_an_answer_follows_what_the_client_has(num_known: int, depth: int) -> None:
    engine, whole = ScheduledEngine(depth=depth, max_num_batched_tokens=8), answer()
    engine.send(1, PROMPT, params(), known=[whole[:num_known]])
    engine.drain()
    assert engine.tokens[1] == whole[num_known:]
    assert engine.ends[1] == "length"
    assert engine.scheduler.counts["num_sampled_tokens"] == len(whole) - num_known
    assert engine.scheduler.counts["num_prompt_tokens"] == len(PROMPT)
    engine.check_empty()


def test_the_known_ids_are_sent_from_the_upload_ring_and_the_prompts_records_are_free_at_once() -> None:
    engine, whole = ScheduledEngine(max_num_batched_tokens=64), answer()
    engine.send(1, PROMPT, params(), known=[whole[:7]])
    assert engine.tokenizer_rings[1].num_free() == engine.tokenizer_rings[1].num_slots
    step = engine.plan()
    assert (step.admit.ring[0], step.admit.length[0], step.admit.prompt_len[0]) == (0, 18, len(PROMPT))
    uploaded = [engine.prompt_rings[0].record(int(step.admit.ticket[0]) + i).token_ids for i in range(3)]
    assert np.concatenate(uploaded)[:18].tolist() == PROMPT + whole[:7]
    assert step.admit.max_len[0] == len(PROMPT) + 12
    assert engine.scheduler.prompts.num_upload_records == -(-18 // RECORD_TOKENS)
    engine.drain()
    engine.check_empty()


def test_samples_that_have_ended_do_not_run_and_the_first_open_one_shares_the_prompt() -> None:
    engine = ScheduledEngine(max_num_batched_tokens=64)
    known = [None, answer(1, 4)[:6], None, answer(3, 4)[:2]]
    engine.send(1, PROMPT, params(n=4), known=known)
    assert engine.scheduler.num_open == engine.scheduler.gauges()["num_waiting"] == 2
    assert engine.scheduler.gauges()["num_waiting_tokens"] == 2 * len(PROMPT) + 6 + 2
    step = engine.plan()
    assert int(step.num_seqs[0]) == 2, "both join one step: the second finds the first one's blocks"
    engine.drain()
    assert (engine.tokens[2], engine.tokens[4]) == (answer(1, 4)[6:], answer(3, 4)[2:])
    assert engine.cached == {4: 8}
    assert set(engine.ends) == {2, 4}
    engine.check_empty()


def test_an_only_open_sample_has_no_leader() -> None:
    engine = ScheduledEngine()
    engine.send(1, PROMPT, params(n=3), known=[None, None, answer(2, 3)[:3]])
    engine.drain()
    assert engine.tokens == {3: answer(2, 3)[3:]}
    engine.check_empty()


def test_output_in_the_cache_is_found_and_does_not_count_as_the_prompts() -> None:
    engine, whole = ScheduledEngine(max_num_batched_tokens=64), answer()
    engine.send(1, PROMPT, params())
    engine.drain()
    engine.send(2, PROMPT, params(), known=[whole[:10]])  # 21 tokens: five full blocks
    step = engine.plan()
    assert (step.admit.num_computed_tokens[0], int(step.num_tokens[0])) == (20, 1)
    engine.drain()
    assert engine.tokens[2] == whole[10:]
    assert engine.cached[2] == len(PROMPT)
    engine.check_empty()


def test_requests_that_bring_much_open_in_several_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_buffer, "MAX_RESUMED_BYTES", 4 * 7)
    engine = ScheduledEngine()
    for key in range(1, 6):
        engine.send(key, PROMPT, params(), salt=str(key), known=[answer()[:3]])
    sizes = []
    while (outputs := engine.scheduler.take_outputs()) is not None:
        sizes.append(len(outputs.opened))
    assert sizes == [3, 2]


def test_preemption_of_resumed_sequences_changes_no_token() -> None:
    engine = ScheduledEngine(num_blocks=9, max_num_batched_tokens=64)
    whole = answer(max_tokens=16)
    for key, num_known in ((1, 4), (2, 9), (3, 1)):
        engine.send(key, PROMPT, params(16), salt=str(key), known=[whole[:num_known]])
    engine.drain()
    assert engine.scheduler.counts["num_preemptions"]
    assert engine.tokens == {1: whole[4:], 2: whole[9:], 3: whole[1:]}
    engine.check_empty()


def test_a_resumed_request_has_no_queue_timeout_and_keeps_its_deadline() -> None:
    engine = ScheduledEngine(max_num_seqs=1, queue_timeout_s=1.0)
    engine.send(1, PROMPT, params())
    engine.step()
    engine.send(2, PROMPT, params(), known=[answer()[:2]], queue_timeout_s=0.5)
    engine.send(3, PROMPT, params(), known=[[]], deadline_ns=engine.clock.now_ns + 10**9)
    engine.send(4, PROMPT, params())
    engine.clock.now_ns += 2 * 10**9
    engine.scheduler.expire()
    engine.drain()
    assert [engine.ends[key] for key in (1, 2, 3, 4)] == ["length", "length", "deadline", "queue_timeout"]


@pytest.mark.parametrize(("num_known", "max_tokens", "max_model_len"), [(4, 4, 64), (5, 4, 64), (5, None, 16)])
def test_as_many_tokens_as_the_request_may_have_are_refused(
    num_known: int, max_tokens: int | None, max_model_len: int
) -> None:
    engine = ScheduledEngine(max_model_len=max_model_len)
    known = [None, answer()[:1], answer()[:num_known]]
    asked = SamplingParams(max_tokens=max_tokens, seed=1, n=3)
    assert engine.send(1, PROMPT, asked, known=known) is Arrival.REFUSED
    engine.hear()
    code, text = engine.errors[1]
    assert code == "invalid_request"
    assert f"the {num_known} tokens of a sample" in text
    assert engine.last_outputs.opened[0].resume is None
    known[2] = answer()[: num_known - 1 - (num_known - 1 >= (max_tokens or 9))]
    assert engine.send(4, PROMPT, asked, known=known) is Arrival.QUEUED


def test_only_open_samples_and_their_tokens_need_room_in_the_queue() -> None:
    engine = ScheduledEngine(max_num_seqs=1, max_num_waiting=1, max_num_waiting_tokens=30)
    assert engine.send(1, PROMPT, params(n=8), known=[[1]] + [None] * 7) is Arrival.QUEUED
    assert engine.send(11, PROMPT, params(), known=[[1] * 8]) is Arrival.REFUSED  # 12 and 19 tokens
    assert engine.send(12, PROMPT, params(), known=[[1] * 7]) is Arrival.QUEUED
    assert engine.send(21, PROMPT, params(n=2), known=[[1], None]) is Arrival.REFUSED


def test_a_grammar_is_compiled_with_what_its_sequences_have_and_its_masks_begin_behind_that() -> None:
    engine = ScheduledEngine(num_grammar_workers=1)
    known = [answer(0, 3)[:4], None, answer(2, 3)[:1]]
    asked = params(n=3, structured_outputs=SPEC)
    assert engine.send(1, PROMPT, asked, known=known) is Arrival.PARKED
    engine.grammar.hear(engine.scheduler)
    packed = [np.array(tokens or [], np.int32).tobytes() for tokens in known]
    assert engine.grammar.compiles == [(0, Compile(key=1, num_samples=3, spec=SPEC, end_ids=[], known=packed))]
    assert engine.grammar.matchers == {1: 0, 3: 0}, "the matcher of an ended sample is released at once"
    engine.grammar.compile(engine.scheduler)
    engine.drain()
    assert engine.tokens == {1: answer(0, 3)[4:], 3: answer(2, 3)[1:]}
    assert engine.grammar.told == {1: answer(0, 3)[4:-1], 3: answer(2, 3)[1:-1]}
    engine.check_empty()


def test_the_end_of_a_parked_request_whose_first_sample_has_ended_is_its_sequences_end() -> None:
    engine = ScheduledEngine(num_grammar_workers=1)
    engine.send(1, PROMPT, params(n=2, structured_outputs=SPEC), known=[None, []])
    engine.grammar.hear(engine.scheduler)
    assert engine.scheduler.withdraw([1]) == [1], "the gateway cancels it by the keys of all samples"
    engine.scheduler.cancel([1, 2])
    engine.grammar.hear(engine.scheduler)
    assert [(message.key, message.num_samples) for _, message in engine.grammar.compiles] == [(1, 2)]
    engine.grammar.compile(engine.scheduler)
    engine.drain()
    assert engine.ends == {2: "cancelled"}
    engine.check_empty()


@pytest.mark.parametrize("max_num_batched_tokens", [4, 64])
def test_log_probabilities_of_the_prompt_are_computed_again_for_an_open_first_sample_only(
    max_num_batched_tokens: int,
) -> None:
    engine = ScheduledEngine(max_num_batched_tokens=max_num_batched_tokens)
    asked = params(n=2, prompt_logprobs=1)
    engine.send(1, PROMPT, asked, known=[answer(0, 2)[:6], answer(1, 2)[:2]])
    engine.send(3, PROMPT, asked, known=[None, answer(1, 2)[:5]])
    engine.drain()
    tokens = b"".join(part.token_ids for part in engine.prompt_parts.pop(1))
    assert np.frombuffer(tokens, np.int32).tolist() == PROMPT[1:]
    assert not engine.prompt_parts
    assert engine.tokens == {1: answer(0, 2)[6:], 2: answer(1, 2)[2:], 4: answer(1, 2)[5:]}
    engine.check_empty()
