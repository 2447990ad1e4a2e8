"""When a sample passed each stage, and what the histograms count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ipc.codec import decode
from ipc.histogram import read_histogram
from ipc.messages import ClientCredit, ClientGone, Ended, Opened, Outputs, RequestTimes, Route, StepOutputs, TextOptions
from ipc.records import FinishCode
from tests.unit.workers.text.tools import byte_level_tokenizer
from workers.detokenizer.config import END_REASONS, ENDS, HISTOGRAMS
from workers.detokenizer.core import Detokenizer
from workers.detokenizer.text_decoding import Decoding

TOKENIZER = byte_level_tokenizer()
DECODING = Decoding.of(TOKENIZER)
TOKEN_ID = 60
TEXT = TOKENIZER.decode([TOKEN_ID])
MS = 1_000_000  # ns
RUNNING, LENGTH = FinishCode.RUNNING, FinishCode.LENGTH
ARRIVED_NS = 5_000 * MS


class Engine:
    """A detokenizer whose clock the test sets, in ms after the arrival of every request."""

    def __init__(self, window: int = 1_000) -> None:
        self.now_ms = 0.0
        self.core = Detokenizer(DECODING, window, clock=lambda: ns(self.now_ms))
        self.times: dict[tuple[str, int], RequestTimes | None] = {}

    def open(self, key: int, num_samples: int = 1, **text: Any) -> None:
        opened = Opened(
            key, Route(b"c", f"r{key}", True), 7, TextOptions(**text), num_samples=num_samples,
            arrived_ns=ARRIVED_NS, tokenized_ns=ns(1),
        )  # fmt: skip
        self.core.handle(StepOutputs(opened=[opened]))

    def admit(self, *keys: int, at_ms: float) -> None:
        self.core.handle(StepOutputs(admitted=[(key, ns(at_ms), 0) for key in keys]))

    def step(self, at_ms: float, *tokens: tuple[int, FinishCode], ended: list[Ended] | None = None) -> None:
        self.now_ms = at_ms
        self.core.handle(StepOutputs(
            keys=np.array([key for key, _ in tokens], "<i8").tobytes(),
            token_ids=np.full(len(tokens), TOKEN_ID, "<i4").tobytes(),
            finish=bytes(code for _, code in tokens), ended=ended or [],
        ))  # fmt: skip
        self.deliver()

    def deliver(self) -> None:
        for _, frames in self.core.deliveries():
            for outputs in (decode(frame, Outputs) for frame in frames):
                samples = np.frombuffer(outputs.samples or bytes(len(outputs.num_token_ids)), "<i4").tolist()
                for index, final in outputs.finals:
                    self.times[outputs.request_ids[index], samples[index]] = final.times

    def seen(self) -> dict[str, tuple[int, int]]:
        """The number of values and their sum, of each histogram that has any."""
        read = {name: read_histogram(self.core.metrics.arrays[name].tolist()) for name in HISTOGRAMS}
        return {name: (sum(buckets), total) for name, (buckets, total) in read.items() if any(buckets)}

    def ends(self) -> dict[str, int]:
        """How many samples ended, by reason."""
        counts = self.core.metrics.arrays[ENDS].tolist()
        return {reason: count for reason, count in zip(END_REASONS, counts, strict=True) if count}


def ns(ms: float) -> int:
    return ARRIVED_NS + round(ms * MS)


def test_a_request_is_measured_from_stage_to_stage() -> None:
    engine = Engine()
    engine.open(1)
    engine.admit(1, at_ms=3)
    engine.step(10, (1, RUNNING))
    engine.step(14, (1, RUNNING))
    engine.step(20, (1, LENGTH))
    assert engine.times == {("r1", 0): RequestTimes(ARRIVED_NS, ns(1), ns(3), ns(10), ns(20))}
    assert engine.seen() == {
        "queue_us": (1, 3_000), "prefill_us": (1, 7_000), "time_to_first_token_us": (1, 10_000),
        "inter_token_us": (2, 10_000), "decode_us": (1, 10_000), "end_to_end_us": (1, 20_000), "prompt_tokens": (1, 7),
        "generated_tokens": (1, 3),
    }  # fmt: skip
    bounds = HISTOGRAMS["inter_token_us"]
    buckets, _ = read_histogram(engine.core.metrics.arrays["inter_token_us"].tolist())
    assert (buckets[bounds.index(5_000)], buckets[bounds.index(10_000)]) == (1, 1)


def test_samples_have_times_of_their_own_and_their_request_counts_once() -> None:
    engine = Engine()
    engine.open(1, num_samples=2)
    engine.admit(1, at_ms=3)
    engine.step(10, (1, LENGTH))
    engine.admit(2, at_ms=11)
    engine.step(15, (2, RUNNING))
    engine.step(18, (2, LENGTH))
    assert engine.times["r1", 0] == RequestTimes(ARRIVED_NS, ns(1), ns(3), ns(10), ns(10))
    assert engine.times["r1", 1] == RequestTimes(ARRIVED_NS, ns(1), ns(11), ns(15), ns(18))
    seen = engine.seen()
    assert seen["time_to_first_token_us"] == (2, 25_000)
    assert seen["queue_us"] == (2, 14_000)
    assert seen["decode_us"] == (2, 3_000)
    assert seen["end_to_end_us"] == (1, 18_000)
    assert seen["generated_tokens"] == (1, 3)
    assert engine.ends() == {"length": 2}


def test_every_sequence_has_its_own_time_between_tokens() -> None:
    engine = Engine()
    for key in (1, 2, 3):
        engine.open(key)
    engine.step(10, (1, RUNNING), (2, RUNNING))
    engine.step(14, (1, RUNNING), (3, RUNNING))
    engine.step(20, (1, RUNNING), (2, RUNNING), (3, RUNNING), (3, RUNNING))  # of two steps at once
    assert engine.seen()["inter_token_us"] == (5, 4_000 + 6_000 + 10_000 + 6_000 + 0)


def test_a_client_that_does_not_read_changes_no_time() -> None:
    engine = Engine(window=1)
    engine.open(1)
    engine.admit(1, at_ms=3)
    for at_ms in (10, 12):
        engine.step(at_ms, (1, RUNNING))
    engine.step(14, (1, LENGTH))
    assert not engine.times, "the client has given no credit"
    assert engine.seen()["end_to_end_us"] == (1, 14_000)
    engine.now_ms = 90_000
    engine.core.handle(ClientCredit(client=b"c", count=1))
    engine.deliver()
    assert engine.times["r1", 0] == RequestTimes(ARRIVED_NS, ns(1), ns(3), ns(10), ns(14))


def test_a_stop_string_ends_a_request_at_the_token_that_completes_it() -> None:
    engine = Engine()
    engine.open(1, stop=[TEXT * 2])
    engine.admit(1, at_ms=3)
    for at_ms in (10, 12, 14):
        engine.step(at_ms, (1, RUNNING))
    assert engine.times["r1", 0] == RequestTimes(ARRIVED_NS, ns(1), ns(3), ns(10), ns(12))
    assert engine.seen()["generated_tokens"] == (1, 2)


@pytest.mark.parametrize("reason", ["queue_timeout", "deadline", "cancelled"])
def test_a_request_that_ends_in_the_queue_has_its_arrival_and_is_in_no_histogram(reason: Any) -> None:
    engine = Engine()
    engine.open(1)
    engine.step(50, ended=[Ended(1, reason)])
    assert engine.times == {("r1", 0): RequestTimes(ARRIVED_NS, ns(1))}
    assert engine.seen() == {}
    assert engine.ends() == {reason: 1}


def test_a_cancelled_request_that_was_admitted_counts_and_a_failed_one_does_not() -> None:
    for reason, counts in (("cancelled", True), ("error", False)):
        engine = Engine()
        engine.open(1, num_samples=2)
        engine.admit(1, 2, at_ms=3)
        engine.step(10, (1, RUNNING))
        engine.step(12, (1, LENGTH), ended=[Ended(2, reason, "request_failed" if reason == "error" else "")])
        assert engine.times["r1", 1] == RequestTimes(ARRIVED_NS, ns(1), ns(3))
        assert ("end_to_end_us" in engine.seen()) is ("generated_tokens" in engine.seen()) is counts
        assert engine.seen()["decode_us"] == (1, 2_000), "the sample that did not fail"


def test_a_client_that_has_gone_leaves_its_requests_unmeasured() -> None:
    engine = Engine()
    engine.open(1)
    engine.admit(1, at_ms=3)
    engine.step(10, (1, RUNNING))
    engine.core.handle(ClientGone(client=b"c"))
    engine.admit(1, at_ms=11)
    engine.step(12, (1, LENGTH))
    assert set(engine.seen()) == {"queue_us", "prefill_us", "time_to_first_token_us"}
    assert engine.ends() == {"cancelled": 1}
