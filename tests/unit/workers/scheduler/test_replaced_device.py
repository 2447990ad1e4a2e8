"""What the first steps for a new GPU process bring to it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ipc.sampling_params import SamplingParams
from tests.simulation.fake_gpu import expected_tokens
from tests.simulation.scheduled_engine import RECORD_TOKENS, ScheduledEngine


def uploaded(engine: ScheduledEngine, ticket: int, length: int) -> list[int]:
    """Words of consecutive records of the upload ring."""
    ring = engine.prompt_rings[0]
    records = [ring.record(ticket + i).token_ids for i in range(-(-length // RECORD_TOKENS))]
    return [int(word) for word in np.concatenate(records)[:length]]


def admissions(engine: ScheduledEngine, record: Any) -> dict[int, tuple[int, list[int]]]:
    """By key: the length of the prompt, and the ids that are sent."""
    admit, keys = record.admit, engine.scheduler._table.key
    return {
        int(keys[admit.row[i]]): (
            int(admit.prompt_len[i]),
            uploaded(engine, int(admit.ticket[i]), int(admit.length[i])) if admit.length[i] else [],
        )
        for i in range(int(record.num_admissions[0]))
    }


def test_the_ids_and_the_long_values_of_a_lost_row_are_sent_again_and_only_once() -> None:
    engine = ScheduledEngine()
    engine.send(1, [4, 5, 6], SamplingParams(max_tokens=20))
    engine.scheduler._open.find([1])[0].long_values = np.array([0, 71, 72], np.int32)
    for _ in range(3):
        engine.step()
    engine.replace_device()
    tokens = engine.tokens[1]
    assert len(tokens) == 3
    record = engine.plan()
    assert admissions(engine, record) == {1: (3, [4, 5, 6, *tokens])}
    assert uploaded(engine, int(record.admit.long_ticket[0]), 3) == [0, 71, 72]
    assert int(record.seq_num_tokens[0]) == 6, "everything is computed again"
    engine.apply()
    assert engine.prompt_rings[0].num_unreleased == 0
    sequence = engine.scheduler._table.sequences[0]
    assert sequence is not None
    engine.scheduler._planner._preempt()
    record = engine.plan()
    assert admissions(engine, record) == {1: (3, [])}, "the new process has the row now"
    assert int(record.admit.long_ticket[0]) == 0
    engine.drain()
    assert engine.tokens[1] == expected_tokens([4, 5, 6], 0, 23, [])
    engine.check_empty()


def test_rows_are_resumed_in_order_before_waiting_sequences_as_the_upload_ring_has_room() -> None:
    engine = ScheduledEngine(
        max_num_seqs=3, max_model_len=40, prompt_records=5, max_num_batched_tokens=64, num_tokenizers=2
    )
    for key in (1, 2, 3, 4):
        engine.send(key, [key] * 16, SamplingParams(max_tokens=20), ring=1 + key % 2)
    for _ in range(2):
        engine.step()
    engine.replace_device()
    gauges = engine.scheduler.gauges()
    assert (gauges["num_preempted"], gauges["num_waiting"], gauges["num_preemptions"]) == (3, 1, 0)
    resumed = []
    for _ in range(3):
        resumed += list(admissions(engine, engine.plan()))
        engine.apply()
    assert resumed == [1, 2, 3], "one for each step: the ring has room for one of them"
    engine.drain()
    assert list(engine.tokens) == [1, 2, 3, 4]
    engine.check_empty()


def test_waiting_prompts_stay_in_the_rings_of_their_tokenizers() -> None:
    engine = ScheduledEngine(max_num_seqs=1)
    for key in (1, 2):
        engine.send(key, [key] * 3, SamplingParams(max_tokens=2))
    engine.plan()
    assert engine.tokenizer_rings[1].num_unreleased == 2
    engine.replace_device()
    assert engine.tokenizer_rings[1].num_unreleased == 1
    engine.drain()
    engine.check_empty()
