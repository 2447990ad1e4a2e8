"""Requests with structured outputs: parked until their grammar is compiled, and their ends in every order of events."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest

from ipc.errors import Interrupted, InvalidRequest, RequestFailed, RingfeedError, TokensExcluded
from ipc.long_values import BAD_WORDS
from ipc.messages import Compile, Compiled, MatcherFailed, ReleaseMatchers
from ipc.records import NO_TOKEN, FinishCode
from ipc.sampling_params import SamplingParams
from ipc.structured_outputs import StructuredOutputs
from tests.simulation.fake_gpu import expected_tokens
from tests.simulation.scheduled_engine import ScheduledEngine
from workers.scheduler.admission.admission import Arrival
from workers.scheduler.grammar_workers import ANSWER_SLACK_S

SECOND = 1_000_000_000
SPEC = StructuredOutputs(json_object=True)


def params(max_tokens: int = 4, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=1, structured_outputs=SPEC, **fields)


def engine_of(**sizes: Any) -> ScheduledEngine:
    return ScheduledEngine(**{"num_grammar_workers": 1} | sizes)


def hear_all(engine: ScheduledEngine) -> None:
    engine.grammar.hear(engine.scheduler)
    while engine.hear() is not None:
        pass


def compile_all(engine: ScheduledEngine, error: str = "") -> None:
    hear_all(engine)
    while engine.grammar.compiles:
        engine.grammar.compile(engine.scheduler, error=error)


# Parking


def test_a_request_is_parked_until_its_grammar_is_compiled() -> None:
    engine = engine_of(eos_token_ids=(60,))
    assert engine.send(1, [1, 2], params(stop_token_ids=[59])) is Arrival.PARKED
    assert engine.plan() is None
    assert not engine.scheduler.has_work
    assert engine.scheduler.num_open == engine.scheduler.gauges()["num_waiting"] == 1
    [(worker, [message])] = engine.scheduler.take_grammar_messages()
    assert (worker, message) == (0, Compile(key=1, num_samples=1, spec=SPEC, end_ids=[60, 59]))
    engine.grammar.compiles, engine.grammar.matchers = [(0, message)], {1: 0}
    compile_all(engine)
    assert engine.scheduler.has_work
    engine.drain()
    assert engine.tokens[1] == expected_tokens([1, 2], 1, 6, [59, 60])
    engine.check_empty()


def test_a_compiled_request_takes_the_place_of_its_arrival() -> None:
    engine = engine_of(max_num_seqs=1)
    engine.send(1, [1], params(2))
    engine.send(2, [2], SamplingParams(max_tokens=2))
    engine.send(3, [3], SamplingParams(max_tokens=2))
    assert engine.plan() is not None
    compile_all(engine)
    order: list[int] = []
    while engine.scheduler.num_open:
        engine.step()
        order += [key for key in engine.ends if key not in order]
    assert order == [2, 1, 3], "free requests run while the first one is compiled, and it is next after that"


def test_all_samples_share_one_grammar() -> None:
    engine = engine_of()
    engine.send(1, [1, 2, 3, 4, 5], params(3, n=3))
    engine.scheduler.cancel([2])
    hear_all(engine)
    assert [message.num_samples for _, message in engine.grammar.compiles] == [3]
    compile_all(engine)
    engine.drain()
    assert engine.ends[2] == "cancelled"
    assert [len(engine.tokens[key]) for key in (1, 2, 3)] == [3, 0, 3]
    assert {key: num for key, num in engine.grammar.num_masks.items() if key} == {1: 3, 3: 3}
    engine.check_empty()


def test_requests_go_to_the_process_that_has_the_least_to_do() -> None:
    engine = engine_of(num_grammar_workers=2)
    engine.send(1, [1], params(n=3))
    for key in (5, 6, 7):
        engine.send(key, [key], params())
    hear_all(engine)
    assert {message.key: worker for worker, message in engine.grammar.compiles} == {1: 0, 5: 1, 6: 1, 7: 0}


def test_a_grammar_that_is_refused_ends_every_sample_with_its_error() -> None:
    engine = engine_of()
    engine.send(1, [1], params(n=2))
    engine.send(3, [3], SamplingParams(max_tokens=2))
    compile_all(engine, error="the schema is bad")
    engine.drain()
    assert engine.errors == {1: ("invalid_request", "the schema is bad"), 2: ("invalid_request", "the schema is bad")}
    assert engine.ends[3] == "length"
    engine.check_empty()


def test_parked_requests_count_in_the_queue() -> None:
    engine = engine_of(max_num_seqs=1, max_num_waiting=2, max_num_waiting_tokens=9)
    assert [engine.send(key, [1, 2, 3], params()) for key in (1, 2, 3)] == [Arrival.PARKED] * 3
    assert engine.send(4, [1], params()) is Arrival.REFUSED
    engine.scheduler.cancel([3])
    assert engine.send(5, [1, 2, 3, 4], params()) is Arrival.REFUSED, "too many prompt tokens"
    assert engine.send(6, [1, 2, 3], params()) is Arrival.PARKED
    compile_all(engine)
    engine.drain()
    assert [engine.errors[key][0] for key in (4, 5)] == ["queue_full"] * 2
    engine.check_empty()


def test_without_grammar_processes_a_structured_request_is_refused_with_the_cure() -> None:
    engine = ScheduledEngine()
    assert engine.send(1, [1], params()) is Arrival.REFUSED
    hear_all(engine)
    code, text = engine.errors[1]
    assert code == InvalidRequest.code
    assert "grammar.num_workers (0)" in text
    engine.check_empty()


def test_parked_prompts_do_not_keep_their_ring_from_the_tokenizer() -> None:
    engine = engine_of(prompt_records=4)
    for key in range(1, 4):
        engine.send(key, [key] * 8, params(2))
    assert engine.can_publish(8), "all records are taken by prompts that wait for their grammars"
    compile_all(engine)
    engine.drain()
    assert all(engine.tokens[key] == expected_tokens([key] * 8, 1, 10, []) for key in range(1, 4))
    engine.check_empty()


# Every order of a parked request's events

COMPILED, REFUSED, CANCEL, WITHDRAW, DEADLINE = "compiled", "refused", "cancel", "withdraw", "deadline"


@pytest.mark.parametrize("events", [
    events for answer in (COMPILED, REFUSED) for events in permutations((answer, CANCEL, WITHDRAW, DEADLINE))
], ids="-".join)  # fmt: skip
def test_the_first_event_that_can_end_a_request_does_and_nothing_is_left(events: tuple[str, ...]) -> None:
    engine = engine_of()
    engine.send(1, [1, 2], params(3, n=2), deadline_ns=engine.clock.now_ns + SECOND)
    expected = ""
    for event in events:
        hear_all(engine)
        match event:
            case "compiled" | "refused":
                engine.grammar.compile(engine.scheduler, error="no" if event == REFUSED else "")
                expected = expected or ("error" if event == REFUSED else "")
            case "cancel":
                engine.scheduler.cancel([1, 2])
                expected = expected or "cancelled"
            case "withdraw":
                assert engine.scheduler.withdraw([1]) == ([1] if expected else [])
            case "deadline":
                engine.clock.now_ns += 2 * SECOND
                engine.scheduler.expire()
                expected = expected or "deadline"
    engine.drain()
    assert engine.ends == {1: expected, 2: expected}
    assert engine.plan() is None
    engine.check_empty()


def test_a_withdrawn_request_is_dropped_without_a_word_to_the_grammar_process() -> None:
    engine = engine_of()
    assert engine.scheduler.withdraw([1]) == [1]
    assert engine.send(1, [1], params()) is Arrival.WITHDRAWN
    assert engine.scheduler.take_grammar_messages() == []
    assert engine.hear() is None


def test_the_requests_of_a_process_that_answers_nothing_end_and_it_gets_no_more_of_them() -> None:
    engine = engine_of(num_grammar_workers=2)
    engine.send(1, [1], params())
    engine.send(2, [2], params())
    hear_all(engine)
    [(_, unanswered), (other, _)] = engine.grammar.compiles
    limit_ns = round((1 + ANSWER_SLACK_S) * SECOND)
    assert engine.scheduler.next_timer_ns == engine.clock.now_ns + limit_ns
    engine.clock.now_ns += limit_ns - 1
    engine.grammar.compile(engine.scheduler, index=1)
    engine.scheduler.expire()
    assert engine.scheduler.num_open == 2
    engine.clock.now_ns += 1
    engine.scheduler.expire()
    engine.drain()
    code, text = engine.errors[1]
    assert code == Interrupted.code
    assert f"answered nothing for {1 + ANSWER_SLACK_S:g} s" in text
    assert engine.ends[2] == "length"
    assert engine.scheduler.next_timer_ns is None, "a timer that is past would keep the scheduler awake"
    for key in (5, 6):
        engine.send(key, [key], params())
    hear_all(engine)
    asked = [(worker, message.key) for worker, message in engine.grammar.compiles if message is not unanswered]
    assert asked == [(other, 5), (other, 6)]


def test_a_process_with_many_grammars_to_compile_has_time_for_each() -> None:
    engine = engine_of()
    for key in (1, 2, 3):
        engine.send(key, [key], params(1))
    hear_all(engine)
    for _ in range(3):
        engine.clock.now_ns += 10 * SECOND
        engine.scheduler.expire()
        engine.grammar.compile(engine.scheduler)
    engine.drain()
    assert engine.ends == dict.fromkeys((1, 2, 3), "length")


def test_the_sequences_of_a_dead_process_are_interrupted_and_the_others_go_on() -> None:
    engine = engine_of(num_grammar_workers=2)
    for key in (1, 2, 3):
        engine.send(key, [key], params(9))  # to processes 0, 1, 0
    engine.send(4, [4], SamplingParams(max_tokens=9))
    hear_all(engine)
    for _ in range(2):  # of 1 and 3; 2 stays parked
        engine.grammar.compile(engine.scheduler)
    engine.plan()
    engine.plan()
    engine.scheduler.lose_grammar_worker(0)
    engine.grammar.restart(0)
    assert engine.send(5, [5], params(2)) is Arrival.PARKED
    hear_all(engine)
    assert [worker for worker, message in engine.grammar.compiles if message.key == 5] == [0]
    assert engine.send(6, [6], params(2)) is Arrival.PARKED
    assert engine.send(7, [7], params(2)) is Arrival.PARKED
    engine.scheduler.cancel([7])
    for worker in (0, 1):  # the successor has died as well; it was not sent request 6
        engine.scheduler.lose_grammar_worker(worker)
        engine.grammar.restart(worker)
    engine.clock.now_ns += 1_000 * SECOND
    engine.scheduler.expire()
    hear_all(engine)
    assert [(worker, message.key) for worker, message in engine.grammar.compiles] == [(0, 6)]
    engine.clock.now_ns += 9 * SECOND
    engine.scheduler.expire()
    compile_all(engine)
    engine.drain()
    assert engine.ends == dict.fromkeys((1, 2, 3, 5), "error") | {4: "length", 6: "length", 7: "cancelled"}
    assert {engine.errors[key][0] for key in (1, 2, 3, 5)} == {Interrupted.code}
    assert "has died" in engine.errors[1][1]
    assert engine.suspected == {1, 2, 3, 5}, "each of them may have ended its process"
    engine.check_empty()


def test_a_request_whose_grammar_seems_to_have_ended_two_processes_is_refused() -> None:
    engine = engine_of()
    assert engine.send(1, [1], params(2), known=[[]], num_suspected=2) is Arrival.PARKED
    assert engine.send(2, [2], params(2), known=[[]], num_suspected=3) is Arrival.REFUSED
    assert engine.send(3, [3], SamplingParams(max_tokens=2), known=[[]], num_suspected=3) is Arrival.QUEUED
    compile_all(engine)
    engine.drain()
    code, text = engine.errors[2]
    assert code == RequestFailed.code
    assert "the grammar of this request has ended a grammar process twice" in text


def compiling(engine: ScheduledEngine) -> list[int]:
    """The requests whose grammars are at a grammar process."""
    hear_all(engine)
    return sorted(message.key for _, message in engine.grammar.compiles)


def test_a_suspect_has_its_grammar_process_alone_until_it_has_got_a_token() -> None:
    engine = engine_of()
    engine.send(1, [1], params(3))
    assert compiling(engine) == [1]
    for key in (2, 3):
        engine.send(key, [key], params(3), known=[[]], num_suspected=1)
    engine.send(4, [4], params(3))
    engine.send(5, [5], params(3), known=[[]], num_suspected=1)
    engine.scheduler.cancel([5])
    assert compiling(engine) == [1], "a suspect waits until the process has nothing to compile"
    engine.grammar.compile(engine.scheduler)
    assert compiling(engine) == [2]
    engine.grammar.compile(engine.scheduler)
    assert compiling(engine) == [], "2 has no token yet"
    while not engine.tokens.get(2):
        engine.step()
    assert compiling(engine) == [3]
    engine.grammar.compile(engine.scheduler)
    while not engine.tokens.get(3):
        engine.step()
    assert compiling(engine) == [4], "5 was cancelled"
    compile_all(engine)
    engine.drain()
    assert engine.ends == dict.fromkeys((1, 2, 3, 4), "length") | {5: "cancelled"}
    engine.check_empty()


def test_only_the_suspect_that_is_alone_is_marked_again() -> None:
    engine = engine_of()
    engine.send(1, [1], params(9))
    hear_all(engine)
    engine.grammar.compile(engine.scheduler)
    engine.step()
    for key in (2, 3):
        engine.send(key, [key], params(3), known=[[]], num_suspected=1)
    assert compiling(engine) == [2]
    engine.scheduler.lose_grammar_worker(0)
    engine.grammar.restart(0)
    engine.hear()
    assert (engine.suspected, set(engine.errors)) == ({2}, {1, 2}), "1 is not marked, and 3 waits"
    assert compiling(engine) == [3]
    engine.scheduler.lose_grammar_worker(0, was_ready=False)
    engine.grammar.restart(0)
    engine.drain()
    assert (engine.suspected, set(engine.errors)) == ({2}, {1, 2, 3}), "it died as it started"
    engine.check_empty()


def test_a_suspect_that_waits_for_a_row_is_not_marked() -> None:
    engine = engine_of(max_num_seqs=1)
    engine.send(9, [9], SamplingParams(max_tokens=9))
    engine.step()
    engine.send(1, [1], params(9), known=[[]], num_suspected=1)
    hear_all(engine)
    engine.grammar.compile(engine.scheduler)
    engine.step()
    engine.scheduler.lose_grammar_worker(0)
    engine.grammar.restart(0)
    engine.drain()
    assert (engine.suspected, engine.errors[1][0]) == (set(), Interrupted.code)


def test_a_request_that_has_a_mark_is_not_marked_with_others() -> None:
    engine = engine_of()
    engine.send(1, [1], params(9), known=[[]], num_suspected=1)
    hear_all(engine)
    engine.grammar.compile(engine.scheduler)
    while not engine.tokens.get(1):
        engine.step()
    engine.send(2, [2], params(9))
    assert compiling(engine) == [2]
    engine.scheduler.lose_grammar_worker(0)
    engine.grammar.restart(0)
    engine.drain()
    assert (engine.suspected, set(engine.errors)) == ({2}, {1, 2})


def test_answers_for_ended_requests_are_ignored() -> None:
    engine = engine_of()
    engine.scheduler.compiled(0, Compiled(key=9))
    engine.scheduler.matcher_failed(MatcherFailed(key=9, reason="r"))
    assert engine.hear() is None
    assert not engine.scheduler.has_work


# Masks


def masks_of(record: Any) -> tuple[list[int], int, int]:
    """(mask of each sequence, ticket and number of the first process's masks) of a step."""
    return record.seq_mask[: int(record.num_seqs[0])].tolist(), int(record.mask_ticket[0]), int(record.num_masks[0])


def request_of(engine: ScheduledEngine, ticket: int) -> list[tuple[int, int]]:
    """(key, token) of each mask that was asked for."""
    record = engine.grammar.writers[0].record(ticket)
    n = int(record.num_masks[0])
    return list(zip(record.key[:n].tolist(), record.token[:n].tolist(), strict=True))


def test_masks_are_asked_for_as_soon_as_all_earlier_results_are_applied() -> None:
    engine = engine_of(depth=3)
    ring = engine.grammar.writers[0]
    engine.send(1, [1], SamplingParams(max_tokens=9))
    engine.send(2, [2], params(9))
    compile_all(engine)
    first = engine.plan()
    assert masks_of(first) == ([-1, 0], 1, 1)
    assert request_of(engine, 1) == [(2, NO_TOKEN)], "nothing is in flight, so it is asked for with the step"
    assert masks_of(engine.plan()) == ([-1, 0], 2, 1)
    assert masks_of(engine.plan()) == ([-1, 0], 3, 1)
    assert engine.scheduler.mask_requests.take_published() == [0]
    assert not ring.is_published(2)
    engine.apply()
    assert engine.scheduler.mask_requests.take_published() == [0]
    hear_all(engine)
    assert request_of(engine, 2) == [(2, engine.tokens[2][0])]
    assert not ring.is_published(3)
    engine.drain()
    engine.check_empty()


def test_a_chunk_that_samples_nothing_needs_no_mask() -> None:
    engine = engine_of(max_num_batched_tokens=4)
    engine.send(1, [1] * 6, params(2))
    compile_all(engine)
    assert masks_of(engine.plan())[1] == 0
    assert masks_of(engine.plan()) == ([0], 1, 1)
    engine.drain()


def test_a_sequence_that_ends_before_its_mask_is_asked_for_has_key_0() -> None:
    engine = engine_of()
    for key in (1, 2):
        engine.send(key, [key], params(9))
    compile_all(engine)
    engine.plan()
    engine.plan()
    engine.scheduler.cancel([1])
    engine.apply()
    hear_all(engine)
    assert request_of(engine, 2) == [(0, NO_TOKEN), (2, engine.tokens[2][0])]
    engine.drain()
    engine.check_empty()


def test_a_step_names_the_masks_of_the_first_process_before_those_of_the_second() -> None:
    engine = engine_of(num_grammar_workers=2)
    for key in (1, 2, 3):
        engine.send(key, [key], params(2))  # to processes 0, 1, 0
    compile_all(engine)
    record = engine.plan()
    assert record.seq_mask[:3].tolist() == [0, 2, 1]
    assert record.num_masks.tolist() == [2, 1]
    assert record.mask_ticket.tolist() == [1, 1]
    engine.drain()
    engine.check_empty()


def test_requests_that_a_hanging_process_leaves_in_its_ring_are_kept_in_order() -> None:
    engine = engine_of(depth=1)
    ring = engine.grammar.writers[0]
    engine.send(1, [1], params(9))
    compile_all(engine)
    for _ in range(ring.num_slots + 2):  # as if the GPU process waited for no mask
        engine.plan()
        engine.grammar._owed.clear()
        engine.gpu.run_next(engine._result_records[0])
        engine.scheduler.apply(engine._result_records[0])
    assert ring.num_free() == 0
    engine.scheduler.mask_requests.take_published()
    for ticket in range(1, ring.num_slots + 3):
        assert int(ring.record(ticket).step[0]) == ticket
        ring.release_through(ticket)
        engine.scheduler.mask_requests.take_published()


# Ends


def end_with(engine: ScheduledEngine, code: FinishCode, *places: int, closed: bool = False) -> None:
    """Let the device run its oldest step and end the sequences at these places of the batch with `code`.

    `closed`: the masks of that step did not come.
    """
    engine.run_device()
    record = engine._result_records[engine.num_applied % (2 * engine.depth)]
    record.finish[list(places)] = code
    record.token_ids[list(places)] = NO_TOKEN
    record.closed_masks[:] = closed
    engine.apply()
    hear_all(engine)


@pytest.mark.parametrize(
    ("closed", "min_tokens", "kind", "words"),
    [
        (True, 2, Interrupted, "did not come within grammar.mask_timeout_s (0.1)"),
        (False, 2, TokensExcluded, "min_tokens (2) exclude every token that its grammar allows; allow more tokens"),
        (False, 0, RequestFailed, "its grammar allows none; simplify the grammar"),
    ],
)
def test_a_structured_sequence_without_a_token_ends_alone_and_the_error_says_why(
    closed: bool, min_tokens: int, kind: type[RingfeedError], words: str
) -> None:
    engine = engine_of()
    engine.send(1, [1, 2], params(9, min_tokens=min_tokens))
    engine.send(2, [3, 4], SamplingParams(max_tokens=3))
    compile_all(engine)
    engine.plan()
    engine.plan()
    place = [engine.scheduler._table.key[row] for row in (0, 1)].index(1)
    end_with(engine, FinishCode.EXCLUDED, place, closed=closed)
    code, text = engine.errors[1]
    assert code == kind.code
    assert words in text
    engine.drain()
    assert engine.tokens[2] == expected_tokens([3, 4], 0, 5, [])
    assert engine.scheduler.counts["num_excluded"] == engine.scheduler.counts["num_structured_unfinished"] == 1
    engine.check_empty()


@pytest.mark.parametrize(
    ("fields", "bits", "words"),
    [
        ({"min_tokens": 2}, 0, "min_tokens (2) exclude every token"),
        ({}, BAD_WORDS, "bad_words exclude every token"),
        ({}, 0, "its parameters exclude every token"),
    ],
)
def test_the_error_of_an_excluded_free_sequence_names_its_parameters(
    fields: dict[str, Any], bits: int, words: str
) -> None:
    engine = ScheduledEngine()
    engine.send(1, [1, 2, 3, 4], SamplingParams(max_tokens=9, **fields))
    [sequence] = engine.scheduler._open.find([1])
    sequence.long_values = np.array([bits] if bits else [], np.int32)
    engine.plan()
    end_with(engine, FinishCode.EXCLUDED, 0)
    code, text = engine.errors[1]
    assert code == TokensExcluded.code
    assert words in text
    assert engine.scheduler.counts["num_structured_unfinished"] == 0


def test_blocks_of_an_excluded_sequence_stay_cached_unlike_those_of_one_that_is_not_finite() -> None:
    for code, num_cached in ((FinishCode.EXCLUDED, 4), (FinishCode.NOT_FINITE, 0)):
        engine = ScheduledEngine(block_size=4)
        engine.send(1, [1, 2, 3, 4], SamplingParams(max_tokens=9))
        engine.plan()
        end_with(engine, code, 0)
        engine.send(2, [1, 2, 3, 4, 5], SamplingParams(max_tokens=1))
        engine.drain()
        assert engine.cached.get(2, 0) == num_cached


def test_a_matcher_that_fails_ends_its_sequence_with_the_reason() -> None:
    engine = engine_of()
    engine.send(1, [1], params(9))
    compile_all(engine)
    engine.plan()
    engine.scheduler.matcher_failed(MatcherFailed(key=1, reason="token 7 does not fit"))
    engine.drain()
    assert engine.errors[1][0] == RequestFailed.code
    assert "token 7 does not fit" in engine.errors[1][1]
    assert engine.tokens[1] == []
    engine.check_empty()


def test_structured_answers_that_do_not_end_with_stop_are_counted() -> None:
    def unfinished(**fields: Any) -> int:
        engine = engine_of()
        engine.send(1, [1, 2], params(3, **fields))
        compile_all(engine)
        engine.drain()
        return engine.scheduler.counts["num_structured_unfinished"]

    second = expected_tokens([1, 2], 1, 5, [])[1]
    assert unfinished() == 1
    assert unfinished(stop_token_ids=[second]) == 0


def test_an_ended_sequence_is_released_once() -> None:
    engine = engine_of()
    engine.send(1, [1], params(1))
    compile_all(engine)
    engine.step()
    assert engine.scheduler.take_grammar_messages() == [(0, [ReleaseMatchers(keys=[1])])]
