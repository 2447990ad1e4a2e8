"""Queries for token ids and texts in the gateway: they wait, end and fail as requests do, without a scheduler."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from ipc.codec import encode
from ipc.errors import EngineUnavailable
from ipc.messages import (
    Alive,
    Cancel,
    CancelRequests,
    ClientGone,
    ClientRequest,
    DetokenizedText,
    DetokenizeQuery,
    Drained,
    FinalOutput,
    PromptTokens,
    Received,
    TokenizeDone,
    TokenizeQuery,
    TokenizerQuery,
    Withdraw,
)
from ipc.scheduling_params import SchedulingParams
from tests.unit.workers.gateway.gateway_tools import TOKENIZERS, Harness, answer_to, generate
from workers.gateway import unread_answers
from workers.gateway.outbox import Peer
from workers.gateway.prompt_memory import held_bytes


def tokenize(request_id: str, prompt: str | None = "hello", **fields: Any) -> TokenizeQuery:
    return TokenizeQuery(request_id=request_id, prompt=prompt, **fields)


def detokenize(request_id: str, num_ids: int = 1, **fields: Any) -> DetokenizeQuery:
    return DetokenizeQuery(request_id=request_id, token_ids=bytes(4 * num_ids), **fields)


def answer_next(gateway: Harness, text: str = "x", **error: str) -> TokenizerQuery:
    """The tokenizer that has the oldest message answers it, or ends it with the error."""
    tokenizer, message = gateway.sent[Peer.TOKENIZER].pop(0)
    assert isinstance(message, TokenizerQuery)
    gateway.answer(tokenizer, TokenizeDone(key=message.key, **error) if error else answer_to(message, text))
    return message


def only_final(gateway: Harness, request_id: str, identity: bytes = b"c") -> FinalOutput:
    [final] = gateway.finals[identity, request_id]
    return final


@pytest.mark.parametrize("query", [tokenize("q", add_special_tokens=False), detokenize("q")])
def test_a_query_travels_to_a_tokenizer_and_its_answer_back_with_a_receipt(query: ClientRequest) -> None:
    gateway = Harness()
    gateway.client(query)
    assert answer_next(gateway).query == query
    [answer] = [*gateway.answers(PromptTokens), *gateway.answers(DetokenizedText)]
    assert answer.request_id == "q"
    assert answer.receipt > 0
    assert len(gateway.core.table) == 0
    assert gateway.sent[Peer.SCHEDULER] == gateway.sent[Peer.DETOKENIZER] == []


def test_queries_and_requests_share_the_tokenizers_credit() -> None:
    gateway = Harness()
    for number in range(3):
        gateway.client(tokenize(f"q{number}"))
        gateway.client(generate(f"r{number}"))
    assert [tokenizer for tokenizer, _ in gateway.tokenized()] == [*TOKENIZERS, *TOKENIZERS]  # two each
    assert gateway.core.requests.prompts.num_waiting == 2
    answer_next(gateway)
    assert len(gateway.tokenized()) == 4
    assert gateway.core.requests.prompts.num_waiting == 1


def test_a_tenants_queries_do_not_keep_other_tenants_waiting() -> None:
    gateway = Harness(policy={"policy": "fair"}, tokenizer_window=1)
    for number in range(40):
        gateway.client(tokenize(f"q{number}", "x" * 2_000, scheduling=SchedulingParams(tenant="greedy")))
    gateway.client(generate("r", scheduling=SchedulingParams(tenant="modest")))
    num_answered = 0
    while all(isinstance(message, TokenizerQuery) for _, message in gateway.tokenized()):
        answer_next(gateway)
        num_answered += 1
    assert num_answered < 10


def test_an_error_of_the_tokenizer_is_the_querys_final_answer() -> None:
    gateway = Harness()
    gateway.client(detokenize("q"))
    answer_next(gateway, error_code="invalid_request", error_message="token_ids holds 7")
    final = only_final(gateway, "q")
    assert (final.error_code, final.error_message) == ("invalid_request", "token_ids holds 7")
    assert len(gateway.core.table) == 0


def test_a_query_of_a_client_that_has_gone_is_forgotten_and_the_tokenizer_keeps_its_credit() -> None:
    gateway = Harness(tokenizer_window=1)
    for number in range(5):
        gateway.client(tokenize(f"q{number}"), b"gone")
    gateway.core.client_gone(b"gone")
    gateway.flush()
    assert len(gateway.core.table) == gateway.core.requests.prompts.num_waiting == 0
    gateway.client(tokenize("own"))
    assert len(gateway.tokenized()) == 2, "both tokenizers still work at the queries of the client that has gone"
    for _ in range(3):
        answer_next(gateway)
    assert gateway.answers(PromptTokens, b"gone") == []
    assert [answer.request_id for answer in gateway.answers(PromptTokens)] == ["own"]
    assert {type(message) for _, message in gateway.sent[Peer.DETOKENIZER]} == {ClientGone}
    assert gateway.sent[Peer.SCHEDULER] == []


def test_a_cancelled_query_ends_at_once_and_its_late_answer_is_dropped() -> None:
    gateway = Harness(tokenizer_window=1)
    for number in range(3):
        gateway.client(tokenize(f"q{number}"))
    for number in range(3):  # two are at the tokenizers, one waits
        gateway.client(Cancel(request_id=f"q{number}"))
        assert only_final(gateway, f"q{number}").finish_reason == "cancelled"
    answer_next(gateway)
    assert len(gateway.core.table) == 0
    assert gateway.answers(PromptTokens) == []
    assert gateway.messages(Peer.SCHEDULER, Withdraw) == gateway.messages(Peer.SCHEDULER, CancelRequests) == []


@pytest.mark.parametrize("name", ["deadline", "queue_timeout"])
def test_a_query_that_runs_out_of_time_ends_wherever_it_is(name: Any) -> None:
    gateway = Harness(tokenizer_window=1)
    for number in range(3):
        gateway.client(tokenize(f"q{number}", scheduling=SchedulingParams(**{f"{name}_s": 2.0})))
    gateway.tick(1.9)
    assert gateway.finals == {}
    gateway.tick(0.2)
    assert {only_final(gateway, f"q{number}").finish_reason for number in range(3)} == {name}
    assert gateway.messages(Peer.SCHEDULER, Withdraw) == []
    answer_next(gateway)
    assert len(gateway.core.table) == 0


def test_a_full_queue_refuses_queries_with_a_hint() -> None:
    gateway = Harness(tokenizer_window=1, max_open_requests=3)
    for number in range(4):
        gateway.client(tokenize(f"q{number}"))
    refused = gateway.refusal()
    assert (refused.request_id, refused.error_code) == ("q3", "queue_full")
    assert refused.retry_after_s > 0
    full = Harness(tokenizer_window=1, max_queued_bytes=16 << 20)
    for number in range(5):
        full.client(detokenize(f"q{number}", 2 << 20))
    assert "frontend.max_queued_bytes" in full.refusal().error_message
    assert full.refusal().retry_after_s > 0


def test_an_engine_that_starts_or_drains_takes_no_queries_and_finishes_the_open_ones() -> None:
    gateway = Harness(started=False)
    gateway.client(tokenize("early"))
    assert gateway.refusal().error_code == "unavailable"
    gateway = Harness()
    gateway.client(tokenize("open"))
    gateway.core.serving.drain(gateway.now)
    gateway.client(detokenize("late"))
    assert gateway.refusal().error_code == "unavailable"
    assert gateway.messages(Peer.LAUNCHER, Drained) == []
    answer_next(gateway)
    assert len(gateway.answers(PromptTokens)) == 1
    assert len(gateway.messages(Peer.LAUNCHER, Drained)) == 1


def test_an_engine_that_fails_answers_its_queries() -> None:
    gateway = Harness()
    gateway.client(tokenize("q"))
    gateway.core.abort(EngineUnavailable("the GPU process died"))
    gateway.flush()
    assert only_final(gateway, "q").error_code == "unavailable"
    answer_next(gateway)
    assert gateway.answers(PromptTokens) == []


@pytest.mark.parametrize(
    ("query", "text"),
    [
        (tokenize("q", None), "exactly one of prompt, chat and token_ids must be given, not none"),
        (tokenize("q", token_ids=b""), "not prompt and token_ids"),
        (tokenize("q", None, token_ids=b"abc"), "not a multiple of 4"),
        (DetokenizeQuery(request_id="q", token_ids=b"abcde"), "not a multiple of 4"),
        (tokenize(""), "request_id must have 1 to 256"),
        (tokenize("q", scheduling=SchedulingParams(priority=1)), "has no effect in this engine"),
    ],
)
def test_a_query_that_makes_no_sense_is_refused(query: ClientRequest, text: str) -> None:
    gateway = Harness()
    gateway.client(query)
    assert text in gateway.refusal().error_message
    assert gateway.refusal().request_id == query.request_id
    assert gateway.tokenized() == []


def test_an_empty_prompt_has_tokens_to_ask_for() -> None:
    gateway = Harness()
    gateway.client(tokenize("q", ""))
    assert answer_next(gateway).query.request_id == "q"


# A client that does not read


def test_a_client_that_reads_nothing_gets_errors_instead_of_large_answers() -> None:
    gateway = Harness()
    half = "x" * (unread_answers.MAX_UNREAD_BYTES_OF_CLIENT // 2 - unread_answers.ANSWER_OVERHEAD_BYTES)
    for number in range(3):
        gateway.client(detokenize(f"q{number}"))
        answer_next(gateway, half)
    assert len(gateway.answers(DetokenizedText)) == 2
    final = only_final(gateway, "q2")
    assert (final.error_code, final.retry_after_s) == ("queue_full", 1.0)
    assert "this client left unread" in final.error_message
    gateway.client(detokenize("other"), b"d")
    answer_next(gateway, half)
    assert len(gateway.answers(DetokenizedText, b"d")) == 1

    first = gateway.answers(DetokenizedText)[0].receipt
    gateway.client(Received(receipts=[1, 2, first + 1]))  # invented
    gateway.client(Received(receipts=[first]), b"d")  # of another client
    gateway.client(detokenize("q3"))
    answer_next(gateway, half)
    assert only_final(gateway, "q3").error_code == "queue_full"
    gateway.client(Received(receipts=[first, first]))
    gateway.client(detokenize("q4"))
    answer_next(gateway, half)
    assert [answer.request_id for answer in gateway.answers(DetokenizedText)] == ["q0", "q1", "q4"]


def test_all_clients_together_cannot_leave_more_unread_than_a_bound_and_those_that_go_free_theirs() -> None:
    gateway = Harness()
    with patch.multiple(unread_answers, MAX_UNREAD_BYTES_OF_CLIENT=600, MAX_UNREAD_BYTES=1_500):
        for client in (b"a", b"b", b"c"):
            gateway.client(detokenize("q"), client)
            answer_next(gateway, "x" * 10)
        assert "all clients together left unread" in only_final(gateway, "q", b"c").error_message
        gateway.unreachable.add(b"a")
        gateway.tick(1.0)  # probes clients with unread answers, and finds that this one has gone
        gateway.client(detokenize("q2"), b"c")
        answer_next(gateway, "x" * 10)
    assert len(gateway.answers(DetokenizedText, b"c")) == 1
    assert gateway.answers(Alive, b"b") != []


def test_a_client_that_never_says_what_it_has_read_leaves_a_bounded_number_of_receipts() -> None:
    gateway = Harness()
    with patch.object(unread_answers, "MAX_UNREAD_BYTES_OF_CLIENT", 10_000):
        for number in range(100):
            gateway.client(detokenize(f"q{number}"))
            answer_next(gateway, "")
    assert len(gateway.answers(DetokenizedText)) == 10_000 // unread_answers.ANSWER_OVERHEAD_BYTES
    assert only_final(gateway, "q99").error_code == "queue_full"


def test_an_answer_that_finds_no_room_in_its_clients_queue_does_not_count_as_unread() -> None:
    gateway = Harness()
    gateway.full.add(b"c")
    gateway.client(detokenize("q"))
    answer_next(gateway, "x" * 100)
    assert gateway.core._flow._unread.clients == set()
    assert gateway.core.timeout_s(gateway.now) is None, "nothing is left to probe"


def test_the_memory_of_a_waiting_query_counts_its_text_and_its_template() -> None:
    wide = tokenize("q", "🙂" + "a" * 1_000)  # every character takes four bytes in memory
    assert held_bytes(wide, len(encode(wide)), "fifo") > 4_000
    many = detokenize("q", 1_000)
    assert held_bytes(many, len(encode(many)), "fifo") > 4_000
