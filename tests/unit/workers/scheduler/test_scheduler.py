"""The scheduler's rules, one by one, seen from the records that it writes and the messages that it sends."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from ipc.codec import MAX_ITEMS, encode
from ipc.errors import ConfigError
from ipc.messages import PLAIN_TEXT, PROMPT_TAIL_TOKENS, TextOptions
from ipc.records import MAX_ADMISSIONS, MAX_END_IDS, SamplerVariant
from ipc.sampling_params import SamplingParams
from tests.simulation.fake_gpu import expected_tokens
from tests.simulation.scheduled_engine import RECORD_TOKENS, ScheduledEngine
from workers.scheduler.admission.admission import Arrival
from workers.scheduler.config import SchedulerConfig
from workers.scheduler.planning.token_budget import share_tokens
from workers.scheduler.scheduler import Scheduler


def tokens(n: int) -> SamplingParams:
    return SamplingParams(max_tokens=n)


def sequences(record: Any) -> list[tuple[int, int, int]]:
    """(row, tokens, sample) of each sequence of a step."""
    n = int(record.num_seqs[0])
    return list(
        zip(
            record.seq_row[:n].tolist(), record.seq_num_tokens[:n].tolist(), record.seq_sample[:n].tolist(), strict=True
        )
    )


def admitted(record: Any) -> list[tuple[int, int]]:
    """(row, length of the ids to copy) of each admission of a step."""
    n = int(record.num_admissions[0])
    return list(zip(record.admit.row[:n].tolist(), record.admit.length[:n].tolist(), strict=True))


# Batching


def test_an_idle_scheduler_plans_nothing_and_says_nothing() -> None:
    engine = ScheduledEngine()
    assert not engine.scheduler.has_work
    assert engine.plan() is None
    assert engine.hear() is None


def test_a_prompt_is_computed_in_chunks_and_sampled_only_at_its_end() -> None:
    engine = ScheduledEngine(max_num_batched_tokens=10, depth=4)
    engine.send(1, list(range(25)), tokens(2))
    assert [sequences(engine.plan()) for _ in range(4)] == [[(0, 10, 0)], [(0, 10, 0)], [(0, 5, 1)], [(0, 1, 1)]]
    engine.drain()
    assert engine.tokens[1] == expected_tokens(range(25), 0, 27, [])


def test_decodes_come_first_then_running_prompts_then_admissions_in_order_of_arrival() -> None:
    engine = ScheduledEngine(max_num_batched_tokens=10, depth=4)
    engine.send(1, [1, 2], tokens(9))
    engine.send(2, list(range(20)), tokens(9))
    engine.send(3, [3], tokens(9))
    assert sequences(engine.plan()) == [(0, 2, 1), (1, 8, 0)]
    assert sequences(engine.plan()) == [(0, 1, 1), (1, 9, 0)]
    assert sequences(engine.plan()) == [(0, 1, 1), (1, 3, 1), (2, 1, 1)]
    assert sequences(engine.plan()) == [(0, 1, 1), (1, 1, 1), (2, 1, 1)]


def test_a_budget_smaller_than_the_batch_serves_the_oldest() -> None:
    rows, counts, left = share_tokens(np.array([4, 2, 7]), np.array([1, 1, 1]), 2, 99)
    assert rows.tolist() == [4, 2]
    assert counts.tolist() == [1, 1]
    assert left == 0
    rows, counts, left = share_tokens(np.array([4, 2, 7, 5]), np.array([9, 1, 9, 1]), 8, 99)
    assert rows.tolist() == [2, 5, 4]
    assert counts.tolist() == [1, 1, 6]
    assert left == 0


def test_prompts_get_no_more_than_a_chunk_beside_decodes_and_all_the_budget_without() -> None:
    rows, counts, left = share_tokens(np.array([4, 2, 7]), np.array([9, 1, 9]), 100, 12)
    assert (rows.tolist(), counts.tolist(), left) == ([2, 4, 7], [1, 9, 3], 0)
    assert share_tokens(np.array([2]), np.array([1]), 100, 12)[2] == 12
    assert share_tokens(np.array([4, 7]), np.array([9, 9]), 100, 12)[2] == 82


def test_no_token_is_planned_past_max_tokens_however_deep() -> None:
    engine = ScheduledEngine(depth=4)
    engine.send(1, [1, 2, 3], tokens(2))
    assert [engine.plan() is not None for _ in range(3)] == [True, True, False]
    assert not engine.scheduler.has_work
    assert engine.scheduler.num_open == 1
    engine.drain()
    assert engine.ends[1] == "length"
    assert len(engine.tokens[1]) == 2


def test_the_length_of_a_model_ends_a_request_without_max_tokens() -> None:
    engine = ScheduledEngine(max_model_len=16)
    engine.send(1, [1] * 5, SamplingParams())
    engine.drain()
    assert len(engine.tokens[1]) == 11


def test_planning_without_credit_is_a_fault() -> None:
    engine = ScheduledEngine(depth=2)
    engine.send(1, [1], tokens(9))
    engine.plan()
    engine.plan()
    with pytest.raises(AssertionError, match="2 steps are in flight already"):
        engine.plan()


def test_a_step_admits_no_more_than_its_record_holds() -> None:
    count = MAX_ADMISSIONS + 3
    engine = ScheduledEngine(
        max_num_seqs=count, max_num_batched_tokens=4 * count, num_blocks=9 * count, prompt_records=256
    )
    for key in range(count):
        engine.send(key, [key], tokens(3))
    assert int(engine.plan().num_admissions[0]) == MAX_ADMISSIONS
    assert int(engine.plan().num_admissions[0]) == 3
    engine.drain()
    engine.check_empty()


# Rows


def test_a_row_has_no_new_owner_while_a_published_step_names_it() -> None:
    engine = ScheduledEngine(max_num_seqs=1, depth=3)
    engine.send(1, [1], tokens(1))
    engine.send(2, [2], tokens(1))
    engine.plan()
    assert engine.plan() is None, "the only row is named by a step in flight"
    engine.apply()
    assert admitted(engine.plan()) == [(0, 1)]


def test_a_cancelled_row_waits_for_the_last_step_that_names_it() -> None:
    engine = ScheduledEngine(max_num_seqs=1, depth=3)
    engine.send(1, [1], tokens(9))
    engine.send(2, [2], tokens(1))
    engine.plan()
    engine.plan()
    engine.scheduler.cancel([1])
    assert engine.plan() is None
    engine.apply()
    assert engine.plan() is None
    engine.apply()
    assert engine.plan() is not None
    engine.drain()
    assert engine.tokens == {1: [], 2: expected_tokens([2], 0, 2, [])}
    engine.check_empty()


def test_what_steps_in_flight_sampled_after_a_stop_is_dropped() -> None:
    first = expected_tokens([1, 2], 0, 3, [])[0]
    engine = ScheduledEngine(depth=4, eos_token_ids=(first,))
    engine.send(1, [1, 2], tokens(9))
    for _ in range(4):
        engine.plan()
    for _ in range(4):
        engine.apply()
    engine.drain()
    assert engine.tokens[1] == [first]
    assert engine.ends[1] == "stop"
    engine.check_empty()


# Blocks and preemption


def test_blocks_are_appended_as_tokens_need_them() -> None:
    engine = ScheduledEngine(block_size=4, max_num_batched_tokens=6, depth=4)
    engine.send(1, list(range(7)), tokens(9))
    appended = []
    for _ in range(4):
        record = engine.plan()
        appended.append(record.append_index[: int(record.num_appends[0])].tolist())
    assert appended == [[0, 1], [], [], [2]]  # lengths 6, 7, 8, 9


def test_a_planned_out_sequence_gives_its_blocks_back_at_once() -> None:
    engine = ScheduledEngine(num_blocks=16)
    engine.send(1, [1] * 9, tokens(1))
    engine.plan()
    assert engine.scheduler.gauges()["num_free_blocks"] == 16
    engine.drain()


def test_the_newest_sequence_is_preempted_and_comes_back_with_its_row_and_its_tokens() -> None:
    engine = ScheduledEngine(
        num_blocks=8, block_size=2, max_model_len=16, depth=2, max_num_batched_tokens=8, prefix_caching=False
    )
    old, new = [1, 2, 3, 4], [5, 6, 7]
    seeded = SamplingParams(max_tokens=9, seed=3, temperature=0.5, top_k=7, top_p=0.5, min_p=0.25, stop_token_ids=[99])
    engine.send(1, old, tokens(11))
    engine.send(2, new, seeded)
    returns = []
    for _ in range(60):
        record = engine.step()
        if record is not None and engine.num_applied > 1:
            returns += [(row, length) for row, length in admitted(record)]
            for i in range(int(record.num_admissions[0])):
                assert record.admit.num_computed_tokens[i] == 0
                assert record.admit.max_len[i] == 12
                assert record.admit.seed[i] == 3
                assert record.admit.top_k[i] == 7
                assert (record.admit.temperature[i], record.admit.top_p[i], record.admit.min_p[i]) == (0.5, 0.5, 0.25)
                assert record.admit.end_ids[i].tolist() == [99] + [-1] * (MAX_END_IDS - 1)
    engine.drain()
    assert engine.scheduler.counts["num_preemptions"] >= 1
    assert (1, 0) in returns, "row 1 came back without ids"
    assert all(row == 1 for row, _ in returns), "the oldest is never preempted"
    assert engine.tokens[1] == expected_tokens(old, 0, 15, [])
    assert engine.tokens[2] == expected_tokens(new, 3, 12, [99])
    engine.check_empty()


def preempting_engine() -> ScheduledEngine:
    """Two requests. The second is preempted, and a third waits behind it."""
    engine = ScheduledEngine(num_blocks=8, block_size=2, max_model_len=16, depth=1, max_num_batched_tokens=8)
    engine.send(1, [1, 2, 3, 4], tokens(11))
    engine.send(2, [5, 6, 7], tokens(9))
    engine.send(3, [8] * 9, tokens(2))
    for _ in range(30):
        if engine.scheduler.gauges()["num_preempted"]:
            return engine
        engine.step()
    raise AssertionError("no request was preempted")


def test_a_preempted_request_comes_back_before_new_ones() -> None:
    engine = preempting_engine()
    lengths = []
    while engine.scheduler.has_work:
        record = engine.step()
        if record is not None:
            lengths += [length for _, length in admitted(record)]
    assert lengths == [0, 9], "first the row that keeps its ids, then the prompt of 9 tokens"


def test_of_several_preempted_requests_the_oldest_comes_back_first() -> None:
    engine = ScheduledEngine(num_blocks=12, block_size=2, max_model_len=24, depth=1, max_num_batched_tokens=24)
    for key in range(3):
        engine.send(key, [key] * 3, tokens(20))
    returned, most = [], 0
    while engine.scheduler.has_work:
        most = max(most, engine.scheduler.gauges()["num_preempted"])
        record = engine.step()
        if record is not None and engine.num_applied > 1:
            returned += [row for row, _ in admitted(record)]
    assert most == 2
    assert returned == sorted(returned)
    assert set(returned) == {1, 2}


def test_a_preempted_request_can_be_cancelled() -> None:
    engine = preempting_engine()
    engine.scheduler.cancel([2])
    engine.drain()
    assert engine.ends == {1: "length", 2: "cancelled", 3: "length"}
    engine.check_empty()


def test_late_results_of_a_preempted_sequence_are_kept() -> None:
    engine = ScheduledEngine(num_blocks=6, block_size=2, max_model_len=12, depth=4, max_num_batched_tokens=8)
    engine.send(1, [1, 2], tokens(9))
    engine.send(2, [5, 6], tokens(9))
    while not engine.scheduler.counts["num_preemptions"]:
        if engine.scheduler.num_in_flight == 4:
            engine.apply()
        engine.plan()
    engine.hear()
    before = len(engine.tokens[2])
    for _ in range(engine.scheduler.num_in_flight):
        engine.apply()
    engine.hear()
    assert len(engine.tokens[2]) > before
    assert engine.scheduler.gauges()["num_preempted"] == 1
    engine.drain()
    assert engine.tokens[2] == expected_tokens([5, 6], 0, 11, [])


def test_a_newcomer_is_not_let_in_only_to_be_preempted_by_the_next_block_of_another() -> None:
    engine = ScheduledEngine(num_blocks=6, block_size=2, max_model_len=12, depth=1)
    engine.send(1, [1] * 3, tokens(5))
    engine.step()
    engine.send(2, [2] * 7, tokens(3))  # 4 blocks, and 4 are free
    engine.drain()
    assert engine.scheduler.counts["num_preemptions"] == 0
    assert engine.ends == {1: "length", 2: "length"}


def test_a_request_that_could_never_fit_is_refused_with_the_numbers() -> None:
    engine = ScheduledEngine(num_blocks=4, block_size=4)
    engine.send(1, [1] * 10, tokens(7))
    engine.send(2, [1] * 10, tokens(6))
    engine.drain()
    code, text = engine.errors[1]
    assert code == "invalid_request"
    assert "10 tokens" in text
    assert "max_tokens (7)" in text
    assert "KV cache of 16 tokens" in text
    assert engine.ends[2] == "length"
    engine.check_empty()


def test_without_max_tokens_the_cache_bounds_the_length() -> None:
    engine = ScheduledEngine(num_blocks=4, block_size=4)
    engine.send(1, [1] * 10, SamplingParams())
    engine.send(2, [1] * 16, SamplingParams())
    engine.drain()
    assert len(engine.tokens[1]) == 6
    assert engine.ends[1] == "length"
    assert engine.ends[2] == "error"
    assert "with one more it does not fit into the KV cache of 16 tokens: shorten the prompt" in engine.errors[2][1]


# Ends


def test_a_prompt_that_leaves_no_room_for_a_token_is_refused() -> None:
    engine = ScheduledEngine(max_model_len=16)
    engine.send(1, [1] * 16)
    engine.send(2, [])
    engine.drain()
    assert engine.errors[1][0] == engine.errors[2][0] == "invalid_request"
    assert "scheduler.max_model_len (16)" in engine.errors[1][1]
    engine.check_empty()


def test_a_tokenizers_error_opens_and_ends_the_request() -> None:
    engine = ScheduledEngine()
    engine.send_error(7, "invalid_request", "token id 99 is out of range")
    outputs = engine.hear()
    assert [opened.key for opened in outputs.opened] == [7]
    assert engine.errors == {7: ("invalid_request", "token id 99 is out of range")}
    assert engine.scheduler.num_open == 0


def test_an_arriving_request_is_queued_refused_or_dropped_as_withdrawn() -> None:
    engine = ScheduledEngine(max_model_len=16)
    engine.scheduler.withdraw([3])
    assert engine.send(1, [1]) is Arrival.QUEUED
    assert engine.send(2, [1] * 16) is Arrival.REFUSED
    assert engine.send(3, [1]) is Arrival.WITHDRAWN
    engine.drain()
    assert engine.ends == {1: "length", 2: "error"}, "a refused request is answered, and a withdrawn one is not"
    engine.check_empty()


def test_the_detokenizer_hears_how_the_prompt_ends() -> None:
    engine = ScheduledEngine()
    engine.send(7, list(range(1, 31)))
    engine.send(8, [5, 6])
    tails = [np.frombuffer(opened.prompt_tail, "<i4").tolist() for opened in engine.hear().opened]
    assert tails == [list(range(31 - PROMPT_TAIL_TOKENS, 31)), [5, 6]]


def test_a_full_queue_answers_at_once_and_says_so() -> None:
    engine = ScheduledEngine(max_num_seqs=1, max_num_waiting=2)
    for key in range(5):
        engine.send(key, [key])
    engine.hear()
    assert engine.errors.keys() == {3, 4}  # one for the row, two that wait
    code, text = engine.errors[3]
    assert code == "queue_full"
    assert "3 requests wait" in text
    assert "max_num_waiting (2)" in text
    engine.drain()
    engine.check_empty()


def test_a_waiting_request_can_be_cancelled() -> None:
    engine = ScheduledEngine(max_num_seqs=1)
    engine.send(1, [1])
    engine.send(2, [2])
    engine.plan()
    engine.scheduler.cancel([2])
    engine.hear()
    assert engine.ends == {2: "cancelled"}
    engine.drain()
    engine.check_empty()


def test_cancelling_twice_late_or_for_nobody_changes_nothing() -> None:
    engine = ScheduledEngine()
    engine.send(1, [1], tokens(2))
    engine.send(2, [2], tokens(2))
    engine.scheduler.cancel([1, 1, 99])
    engine.scheduler.cancel([1])
    engine.drain()
    engine.scheduler.cancel([1, 2])
    assert engine.hear() is None
    assert engine.ends == {1: "cancelled", 2: "length"}


def test_a_cancellation_in_the_last_step_wins_over_its_token() -> None:
    engine = ScheduledEngine(depth=1)
    engine.send(1, [1], tokens(1))
    engine.plan()
    engine.run_device()
    engine.scheduler.cancel([1])
    engine.apply()
    engine.hear()
    assert engine.ends == {1: "cancelled"}
    assert engine.tokens[1] == []
    engine.check_empty()


def test_a_cancellation_after_the_last_token_was_applied_is_too_late() -> None:
    engine = ScheduledEngine(depth=1)
    engine.send(1, [1], tokens(1))
    engine.plan()
    engine.apply()
    engine.scheduler.cancel([1])
    engine.hear()
    assert engine.ends == {1: "length"}


# Prompt rings


def test_records_are_released_when_the_admitting_step_is_applied_and_not_before() -> None:
    engine = ScheduledEngine()
    engine.send(1, [1] * (RECORD_TOKENS + 1))
    engine.plan()
    assert engine.prompt_rings[1].read_cursor == 1
    assert engine.prompts.take_freed_rings() == []
    engine.apply()
    assert engine.prompt_rings[1].read_cursor == 3
    assert engine.prompts.take_freed_rings() == [1]


def test_requests_that_wait_while_their_ring_fills_are_sent_from_the_upload_ring() -> None:
    engine = ScheduledEngine(max_num_seqs=1, prompt_records=8, max_model_len=64)
    engine.send(99, [1], tokens(30))
    engine.step()
    prompts = {key: [key] * 5 for key in range(20)}
    rings = []
    for key, prompt in prompts.items():
        assert engine.can_publish(len(prompt)), "the ring has room although only one request does not wait"
        engine.send(key, prompt, tokens(2))
        if engine.scheduler.num_in_flight < 2:
            engine.plan()
    while engine.scheduler.has_work:
        record = engine.step()
        if record is not None and record.num_admissions[0]:
            rings.append(int(record.admit.ring[0]))
    engine.drain()
    assert set(rings) == {0, 1}
    assert all(engine.tokens[key] == expected_tokens(prompt, 0, 7, []) for key, prompt in prompts.items())
    engine.check_empty()


def test_waiting_prompts_are_released_also_when_nothing_can_be_planned() -> None:
    engine = ScheduledEngine(max_num_seqs=1, prompt_records=8, depth=3)
    engine.send(99, [1], tokens(1))
    engine.plan()
    for key in range(6):
        engine.send(key, [key])
    assert engine.plan() is None
    engine.apply()
    assert engine.prompt_rings[1].num_slots - (8 - engine.prompt_rings[1].read_cursor) >= 4, "half the ring is free"
    engine.drain()
    engine.check_empty()


def test_an_upload_ring_too_small_for_the_longest_prompt_is_refused() -> None:
    engine = ScheduledEngine(max_model_len=64, prompt_records=8)
    shape = msgspec.structs.replace(engine.shape, max_model_len=65)
    with pytest.raises(ConfigError, match=r"the upload ring has no room .* scheduler.max_model_len \(65\) tokens"):
        Scheduler(SchedulerConfig(), shape, 1, 64, [], engine.prompts)


# The sampler variant of a step


def test_a_greedy_step_needs_the_greedy_sampler_and_the_most_demanding_sequence_decides() -> None:
    engine = ScheduledEngine(depth=4)
    engine.send(1, [1], SamplingParams(max_tokens=9, top_k=5))  # filters do not change the likeliest token
    assert engine.plan().variant[0] == SamplerVariant.GREEDY
    engine.send(2, [2], SamplingParams(max_tokens=1, temperature=0.5))
    assert engine.plan().variant[0] == SamplerVariant.PLAIN
    engine.send(3, [3], SamplingParams(max_tokens=1, temperature=0.5, min_p=0.1))
    assert engine.plan().variant[0] == SamplerVariant.FILTERED
    assert engine.plan().variant[0] == SamplerVariant.GREEDY


def test_end_ids_are_the_models_and_the_requests_own() -> None:
    engine = ScheduledEngine(depth=4, eos_token_ids=(60, 59))
    engine.send(1, [1], SamplingParams(max_tokens=3, stop_token_ids=[58]))
    engine.send(2, [2], SamplingParams(max_tokens=3, stop_token_ids=[58], ignore_eos=True))
    record = engine.plan()
    assert record.admit.end_ids[0, :4].tolist() == [60, 59, 58, -1]
    assert record.admit.end_ids[1, :2].tolist() == [58, -1]


def test_logprobs_are_asked_for_when_wanted_and_copied_as_wide_as_wanted() -> None:
    engine = ScheduledEngine(depth=1)
    engine.send(1, [1], SamplingParams(max_tokens=1))
    engine.send(2, [2], SamplingParams(max_tokens=2, logprobs=3))
    record = engine.step()
    assert record.want_logprobs[0] == 4
    logprobs = engine.last_outputs.logprobs
    assert logprobs.num_top == 3
    assert np.frombuffer(logprobs.logprobs, np.float32).tolist() == [0.0, -1.0]  # the fake GPU's are by row
    assert np.frombuffer(logprobs.top_ids, np.int32).reshape(2, 3).tolist() == [[0, 1, 2], [1, 2, 3]]
    assert np.frombuffer(logprobs.top_logprobs, np.float32).reshape(2, 3)[1].tolist() == [-1.0, -2.0, -3.0]


def test_logprobs_of_several_steps_in_one_message_keep_their_tokens() -> None:
    engine = ScheduledEngine(depth=2)
    engine.send(1, [1], SamplingParams(max_tokens=3))
    engine.plan()
    engine.send(2, [2], SamplingParams(max_tokens=1, logprobs=0))
    engine.plan()
    engine.apply()
    engine.apply()
    outputs = engine.hear()
    assert np.frombuffer(outputs.keys, np.int64).tolist() == [1, 1, 2]
    assert outputs.logprobs.num_top == 0
    assert np.frombuffer(outputs.logprobs.logprobs, np.float32).tolist() == [0.0, 0.0, -1.0]


def test_logprobs_of_requested_tokens_are_copied_as_wide_as_the_widest_request() -> None:
    engine = ScheduledEngine(depth=2)
    engine.send(1, [1], SamplingParams(max_tokens=2, logprob_token_ids=[5, 6, 7]))
    engine.plan()
    engine.send(2, [2], SamplingParams(max_tokens=1, logprobs=1, logprob_token_ids=[9]))
    engine.plan()
    engine.apply()
    engine.apply()
    outputs = engine.hear()
    assert (outputs.logprobs.num_top, outputs.logprobs.num_extra) == (1, 3)
    assert np.frombuffer(outputs.keys, np.int64).tolist() == [1, 1, 2]
    extra = np.frombuffer(outputs.logprobs.extra_logprobs, np.float32).reshape(3, 3)
    assert extra[:2].tolist() == [[-100.0, -101.0, -102.0]] * 2  # the fake GPU's are by row
    assert extra[2, :1].tolist() == [-200.0]
    engine.send(3, [3], SamplingParams(max_tokens=1, logprobs=2))
    engine.plan()
    engine.apply()
    assert engine.hear().logprobs.num_extra == 0


def test_the_detokenizer_hears_only_of_what_differs_from_a_plain_text() -> None:
    engine = ScheduledEngine(depth=1)
    plain, shown = SamplingParams(max_tokens=1), SamplingParams(
        max_tokens=3, min_tokens=2, stop=["x"], skip_special_tokens=False, logprob_token_ids=[4]
    )  # fmt: skip
    engine.send(1, [1], plain)
    engine.send(2, [2], shown)
    first, second = engine.hear().opened
    assert first.text is PLAIN_TEXT
    sent = set(msgspec.msgpack.decode(encode(first)))
    assert sent == {"key", "route", "num_prompt_tokens", "prompt_tail", "arrived_ns"}
    assert second.text == TextOptions(stop=["x"], min_tokens=2, skip_special_tokens=False)
    assert (second.num_logprobs, second.logprob_token_ids) == (0, [4])


@pytest.mark.parametrize("max_tokens", [None, 1_000])
def test_a_request_ends_by_length_although_more_min_tokens_are_wanted(max_tokens: int | None) -> None:
    engine = ScheduledEngine(depth=1)
    engine.send(1, [1], SamplingParams(min_tokens=1_000, max_tokens=max_tokens))
    record = engine.plan()
    assert record.admit.min_tokens[0] == 1_000
    assert record.admit.max_len[0] == engine.shape.max_model_len


def test_no_message_carries_a_longer_list_than_the_codec_takes() -> None:
    engine = ScheduledEngine(max_num_waiting=MAX_ITEMS + 100)
    for key in range(MAX_ITEMS + 10):
        engine.send_error(key, "invalid_request", "no")
    sizes = []
    while (outputs := engine.hear()) is not None:
        sizes.append((len(outputs.opened), len(outputs.ended)))
    assert sizes == [(MAX_ITEMS, 0), (10, MAX_ITEMS), (0, 10)]
    engine.scheduler._outputs.admitted += [(key, 1, 0) for key in range(MAX_ITEMS + 1)]
    engine.send_error(MAX_ITEMS + 11, "invalid_request", "no")
    counts = []
    while (outputs := engine.scheduler.take_outputs()) is not None:
        counts.append(len(outputs.admitted))
    assert counts == [MAX_ITEMS, 1]


# Where the device's time went


def test_a_gap_counts_as_no_work_until_work_arrives_and_as_waiting_after_that() -> None:
    engine = ScheduledEngine(depth=1)

    def run_one_step(key: int, arrives_ns: int, starts_ns: int) -> None:
        engine.clock.now_ns = arrives_ns
        engine.send(key, [key], tokens(1))
        engine.gpu.clock_ns = starts_ns
        engine.step()

    run_one_step(1, 900, 1_000)  # ends at 1_100
    run_one_step(2, 1_150, 1_400)
    gauges = engine.scheduler.gauges()
    assert gauges["device_busy_ns"] == 200
    assert gauges["device_no_work_ns"] == 50
    assert gauges["device_scheduler_ns"] == 0  # the record was received at once
    assert gauges["device_copies_ns"] == 250
    assert gauges["device_last_end_ns"] == 1_500


def test_a_device_that_goes_from_step_to_step_waits_for_nobody() -> None:
    engine = ScheduledEngine(depth=2)
    engine.send(1, [1], tokens(8))
    engine.drain()
    gauges = engine.scheduler.gauges()
    assert gauges["device_busy_ns"] == 800
    assert gauges["device_scheduler_ns"] == gauges["device_copies_ns"] == gauges["device_no_work_ns"] == 0
