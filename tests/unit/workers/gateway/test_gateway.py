"""The gateway's core, event by event."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import pytest

from ipc.channels import MAX_CLIENT_FRAME_BYTES
from ipc.chat import EncodedChat
from ipc.codec import encode
from ipc.errors import EngineUnavailable
from ipc.messages import (
    Alive,
    CacheCleared,
    Cancel,
    CancelRequests,
    ClearCache,
    ClientCredit,
    ClientGone,
    Delivered,
    Drained,
    FinalOutput,
    Health,
    Outputs,
    Query,
    Refused,
    RequestTimes,
    Stats,
    Withdraw,
)
from ipc.sampling_params import MAX_SEED, SamplingParams
from ipc.scheduling_params import SchedulingParams
from tests.simulation.scheduled_engine import resume_with
from tests.unit.workers.gateway.gateway_tools import TOKENIZERS, Harness, generate
from tests.unit.workers.text.tools import encoded_chat, user_chat
from workers.gateway.outbox import Peer


def test_a_request_travels_to_a_tokenizer_and_its_answer_back_to_the_client() -> None:
    gateway = Harness()
    gateway.client(generate("r", stream=True))
    [request] = gateway.pass_on()
    assert (request.prompt, request.route.request_id, request.route.stream) == ("hello", "r", True)
    gateway.deliver(request)
    assert [len(finals) for finals in gateway.finals.values()] == [1]
    assert len(gateway.core.table) == 0


def test_scheduling_goes_along_and_a_deadline_counts_from_when_the_gateway_heard_of_it() -> None:
    gateway = Harness(policy={"policy": "priority"})
    gateway.now = 50.0
    scheduling = SchedulingParams(priority=-2, tenant="a", deadline_s=1.5, queue_timeout_s=3.0)
    gateway.client(generate("r", scheduling=scheduling))
    gateway.client(generate("q"))
    first, second = gateway.pass_on()
    assert (first.scheduling, first.deadline_ns) == (scheduling, 51_500_000_000)
    assert (second.scheduling, second.deadline_ns) == (SchedulingParams(), 0)


def test_scheduling_out_of_range_is_refused_where_it_comes_in() -> None:
    gateway = Harness()
    frame = encode(generate("r", scheduling=SchedulingParams(priority=77)))
    gateway.client(frame.replace(b"\x4d", b"\xcd\xff\xff"))  # 65,535
    assert gateway.refusal().request_id == "r"
    assert "priority (65535)" in gateway.refusal().error_message


def test_a_cleared_cache_is_told_to_each_client_that_asked_under_its_own_number() -> None:
    gateway = Harness()
    for client in (b"a", b"b"):
        gateway.client(ClearCache(query_id=1), client)
    first, second = gateway.messages(Peer.SCHEDULER, ClearCache)
    gateway.core.cache_cleared(second.query_id, gateway.now)
    gateway.flush()
    assert gateway.answers(CacheCleared, b"a") == []
    assert gateway.answers(CacheCleared, b"b") == [CacheCleared(query_id=1)]
    gateway.core.cache_cleared(first.query_id, gateway.now)
    gateway.flush()
    assert gateway.answers(CacheCleared, b"a") == [CacheCleared(query_id=1)]


def test_a_request_without_a_seed_gets_one_and_a_given_one_stays() -> None:
    gateway = Harness()
    gateway.client(generate("a"))
    gateway.client(generate("b"))
    gateway.client(generate("c", params=SamplingParams(seed=7)))
    first, second, third = (request.params.seed for _, request in gateway.tokenized())
    assert first is not None
    assert second is not None
    assert 0 <= first <= MAX_SEED
    assert first != second
    assert third == 7


def test_tokenizers_are_loaded_evenly_and_never_beyond_their_window() -> None:
    gateway = Harness()
    for number in range(6):
        gateway.client(generate(f"r{number}"))
    assert [tokenizer for tokenizer, _ in gateway.tokenized()] == [*TOKENIZERS, *TOKENIZERS]
    gateway.core.tokenizer_done(TOKENIZERS[1], gateway.tokenized()[1][1].key, gateway.now)
    gateway.flush()
    assert gateway.tokenized()[-1][0] == TOKENIZERS[1]
    assert [request.route.request_id for _, request in gateway.tokenized()] == ["r0", "r1", "r2", "r3", "r4"]


def test_nothing_is_sent_to_a_tokenizer_that_is_not_connected_yet() -> None:
    gateway = Harness(started=False)
    gateway.core.serving.start(gateway.now)
    gateway.client(generate("r"))
    assert gateway.tokenized() == []
    gateway.core.tokenizer_done(TOKENIZERS[0], 0, gateway.now)
    gateway.flush()
    assert [tokenizer for tokenizer, _ in gateway.tokenized()] == [TOKENIZERS[0]]


def _params(**fields: Any) -> bytes:
    plain = {"type": "Generate", "request_id": "bad", "prompt": "x", "params": fields}
    return msgpack.packb(plain)  # type: ignore[no-any-return]


def _raw_ids(token_ids: Any) -> bytes:
    plain = {"type": "Generate", "request_id": "bad", "token_ids": token_ids, "params": {}}
    return msgpack.packb(plain)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("message", "code", "text"),
    [
        (generate("bad", prompt=""), "invalid_request", "prompt is empty"),
        (generate("bad", chat=EncodedChat(messages=b"")), "invalid_request", "chat is empty"),
        (generate("bad", token_ids=b""), "invalid_request", "token_ids is empty"),
        (generate("bad", token_ids=b"12345"), "invalid_request", "not a multiple of 4"),
        (generate("bad", prompt="x", token_ids=b"1234"), "invalid_request", "prompt and token_ids"),
        (generate("bad", prompt=None), "invalid_request", "not none"),
        (
            _params(temperature=-1.0),
            "invalid_request",
            "temperature (-1.0) must lie in [0, 100]; below 0.001 it is greedy",
        ),
        (_params(max_tokens="many"), "protocol", "params.max_tokens"),
        (_params(tempreture=1.0), "protocol", "tempreture"),
        (_params(stop_token_ids=[True]), "protocol", "stop_token_ids"),
        (_raw_ids([7, 8]), "protocol", "token_ids"),
        (_raw_ids([True, False]), "protocol", "token_ids"),
        (msgpack.packb({"type": "Generate", "request_id": "bad", "extra": 1}), "protocol", "extra"),
        (msgpack.packb({"type": "Nonsense", "request_id": "bad"}), "protocol", "Nonsense"),
        (msgpack.packb({"type": "Cancel", "request_id": "bad", "extra": 1}), "protocol", "extra"),
    ],
)
def test_a_bad_message_is_refused_by_its_name_with_a_clear_text(message: Any, code: str, text: str) -> None:
    gateway = Harness()
    gateway.client(message)
    refused = gateway.refusal()
    assert (refused.request_id, refused.error_code) == ("bad", code)
    assert text in refused.error_message
    assert len(gateway.core.table) == 0


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"\x93\x01", bytes(100), b"\xdd\xff\xff\xff\xff", b"\x91" * 3_000])
def test_garbage_is_refused_without_a_name(frame: bytes) -> None:
    gateway = Harness()
    gateway.client(frame)
    assert gateway.refusal().request_id == ""
    assert gateway.refusal().error_code == "protocol"


def test_oversized_and_multipart_messages_are_refused() -> None:
    gateway = Harness()
    gateway.client(bytes(MAX_CLIENT_FRAME_BYTES + 1))
    assert "larger than" in gateway.refusal().error_message
    gateway.core.client_frames(b"c", [b"", encode(generate("r"))], gateway.now)
    gateway.flush()
    assert "one frame and not 2" in gateway.refusal().error_message


def test_request_ids_are_bounded_and_unique_among_a_clients_open_requests() -> None:
    gateway = Harness()
    for request_id in ("", "x" * 257):
        gateway.client(generate(request_id))
        assert "1 to 256 characters" in gateway.refusal().error_message
    gateway.client(generate("r"))
    gateway.client(generate("r"))
    assert "still open" in gateway.refusal().error_message
    gateway.client(generate("r"), identity=b"other")
    [request, _] = gateway.pass_on()
    gateway.deliver(request)
    gateway.client(generate("r"))
    assert len(gateway.tokenized()) == 1


def test_a_client_with_too_many_open_requests_is_refused_and_others_are_not() -> None:
    gateway = Harness(max_open_requests=3)
    for number in range(4):
        gateway.client(generate(f"r{number}"))
    assert (gateway.refusal().request_id, gateway.refusal().error_code) == ("r3", "queue_full")
    gateway.client(generate("r"), identity=b"other")
    assert len(gateway.core.table) == 4


def test_long_values_are_not_told_back_in_full() -> None:
    gateway = Harness()
    gateway.client(_params(stop=["x" * 100_000]))
    assert len(gateway.refusal().error_message) <= 1_000


def test_a_chat_travels_as_it_is() -> None:
    gateway = Harness()
    chat = encoded_chat([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], tools=[], template="t")
    gateway.client(generate("r", chat=chat))
    assert gateway.tokenized()[0][1].chat == chat


# Cancellation


def test_a_queued_request_is_cancelled_here() -> None:
    gateway = Harness()
    for number in range(5):
        gateway.client(generate(f"r{number}"))
    gateway.client(Cancel(request_id="r4"))
    assert gateway.finals == {(b"c", "r4"): [FinalOutput("cancelled", 0, 0)]}
    assert gateway.times == {(b"c", "r4"): RequestTimes(arrived_ns=100_000_000_000)}
    assert [request.route.request_id for request in gateway.pass_on()] == ["r0", "r1", "r2", "r3"]


def test_a_cancellation_during_tokenizing_is_answered_once_the_scheduler_says_that_the_request_is_not_there() -> None:
    gateway = Harness()
    gateway.client(generate("r"))
    for _ in range(2):
        gateway.client(Cancel(request_id="r"))
    [(_, request)] = gateway.tokenized()
    assert gateway.messages(Peer.SCHEDULER, Withdraw) == [Withdraw(keys=[request.key])]
    assert gateway.finals == {}, "it may run by now"
    gateway.withdrawn(request.key)
    assert gateway.finals == {(b"c", "r"): [FinalOutput("cancelled", 0, 0)]}
    assert len(gateway.core.table) == 0
    gateway.pass_on()  # the tokenizer does not know it
    assert gateway.messages(Peer.SCHEDULER, CancelRequests) == []
    assert len(gateway.finals[b"c", "r"]) == 1


def test_a_cancellation_during_tokenizing_is_passed_on_if_the_request_is_in_the_scheduler() -> None:
    gateway = Harness()
    gateway.client(generate("r"))
    gateway.client(Cancel(request_id="r"))
    [request] = gateway.pass_on()
    assert gateway.messages(Peer.SCHEDULER, CancelRequests) == [CancelRequests(keys=[request.key])]
    assert gateway.finals == {}
    gateway.deliver(request, reason="cancelled")
    assert len(gateway.finals[b"c", "r"]) == 1


def test_a_scheduler_that_waits_for_a_request_that_has_ended_there_is_told_so() -> None:
    gateway = Harness()
    for number in range(2):
        gateway.client(generate(f"r{number}"))
        gateway.client(Cancel(request_id=f"r{number}"))
    first, second = gateway.pass_on()  # both have arrived and ended when the Withdraw does
    gateway.deliver(first)
    gateway.sent[Peer.SCHEDULER].clear()
    gateway.withdrawn(first.key, second.key)
    assert gateway.messages(Peer.SCHEDULER, CancelRequests) == [CancelRequests(keys=[first.key, second.key])]
    gateway.deliver(second)
    assert {len(finals) for finals in gateway.finals.values()} == {1}


def test_an_accepted_request_is_cancelled_once_however_often_that_is_asked() -> None:
    gateway = Harness()
    gateway.client(generate("r"))
    [request] = gateway.pass_on()
    for _ in range(3):
        gateway.client(Cancel(request_id="r"))
    gateway.client(Cancel(request_id="unknown"))
    gateway.client(Cancel(request_id="r"), identity=b"stranger")
    assert gateway.messages(Peer.SCHEDULER, CancelRequests) == [CancelRequests(keys=[request.key])]


# Credit


def test_credit_is_passed_on_and_never_more_than_was_sent() -> None:
    gateway = Harness()
    gateway.client(Delivered(count=5))
    for number in range(2):
        gateway.client(generate(f"r{number}"))
    first, second = gateway.pass_on()
    gateway.deliver(first)
    gateway.client(Delivered(count=1_000_000))
    gateway.deliver(second)
    gateway.client(Delivered(count=1))
    name = first.route.client
    assert gateway.messages(Peer.DETOKENIZER, ClientCredit) == [ClientCredit(client=name, count=1)] * 2
    assert len(gateway.core.table.clients) == 0
    gateway.client(Delivered(count=0))
    assert "at least 1" in gateway.refusal().error_message


def test_the_gateways_own_answers_give_the_detokenizer_no_credit() -> None:
    gateway = Harness()
    for number in range(5):
        gateway.client(generate(f"r{number}"))
    gateway.client(Cancel(request_id="r4"))
    gateway.client(Delivered(count=1))
    assert gateway.messages(Peer.DETOKENIZER, ClientCredit) == []


def test_a_client_that_takes_in_nothing_is_dropped_with_errors_and_its_late_news_reach_nobody() -> None:
    gateway = Harness()
    for number in range(5):
        gateway.client(generate(f"r{number}"))
    requests = gateway.pass_on()
    for request in requests[:3]:
        gateway.deliver(request)
    gateway.tick(29)
    assert len(gateway.core.table) == 2
    gateway.tick(2)
    assert [gateway.finals[b"c", f"r{n}"][0].error_code for n in (3, 4)] == ["request_failed"] * 2
    assert gateway.messages(Peer.SCHEDULER, CancelRequests) == [CancelRequests(keys=[r.key for r in requests[3:]])]
    gateway.client(generate("r3"))
    assert "stopped reading" in gateway.refusal().error_message
    gateway.client(Delivered(count=3))  # it is back
    gateway.client(generate("r3"))
    gateway.deliver(requests[3])
    assert len(gateway.finals[b"c", "r3"]) == 1
    assert gateway.messages(Peer.DETOKENIZER, ClientGone) == [ClientGone(client=requests[0].route.client)] * 2


def test_a_client_at_its_mark_is_dropped_and_told_every_end_once_it_reads() -> None:
    gateway = Harness()
    for number in range(5):
        gateway.client(generate(f"r{number}"))
    requests = gateway.pass_on()
    gateway.full.add(b"c")
    gateway.deliver(requests[0])
    assert gateway.messages(Peer.SCHEDULER, CancelRequests) == [CancelRequests(keys=[r.key for r in requests[1:]])]
    assert gateway.messages(Peer.DETOKENIZER, ClientGone) == [ClientGone(client=requests[0].route.client)]
    assert len(gateway.core.table) == 0
    gateway.tick(2)  # still full
    assert gateway.finals == {}
    gateway.full.clear()
    gateway.client(generate("new"))
    assert (gateway.refusal().request_id, gateway.refusal().error_code) == ("new", "queue_full")
    gateway.tick(2)
    assert [gateway.finals[b"c", f"r{n}"][0].finish_reason for n in range(5)] == ["length"] + ["error"] * 4
    assert all(len(finals) == 1 for finals in gateway.finals.values())
    gateway.client(Delivered(count=1))
    gateway.client(generate("new"))
    assert [request.route.request_id for request in gateway.pass_on()] == ["new"]
    assert all(len(finals) == 1 for finals in gateway.finals.values())


def test_a_client_at_its_mark_that_says_it_has_read_gets_the_rest_at_once() -> None:
    gateway = Harness()
    gateway.client(generate("r"))
    gateway.full.add(b"c")
    gateway.deliver(*gateway.pass_on())
    gateway.full.clear()
    gateway.client(Delivered(count=1))
    assert [final.finish_reason for final in gateway.finals[b"c", "r"]] == ["length"]


def test_an_answer_that_costs_no_credit_is_lost_at_the_mark_and_nothing_is_kept_of_it() -> None:
    gateway = Harness()
    gateway.full.add(b"c")
    for _ in range(3):
        gateway.client(Query(query_id=1, what="health"))
    gateway.full.clear()
    gateway.client(Query(query_id=2, what="health"))
    gateway.tick(2)
    assert [health.query_id for health in gateway.answers(Health)] == [2]
    assert gateway.core.timeout_s(gateway.now) is None


def test_a_client_that_was_dropped_is_forgotten_once_it_has_gone() -> None:
    gateway = Harness()
    gateway.client(generate("r"))
    gateway.full.add(b"c")
    gateway.deliver(*gateway.pass_on())
    gateway.unreachable.add(b"c")
    gateway.tick(2)
    assert gateway.core.timeout_s(gateway.now) is None


def test_a_client_that_asks_for_a_cleared_cache_without_end_is_refused_until_one_is_answered() -> None:
    gateway = Harness()
    for number in range(65):
        gateway.client(ClearCache(query_id=number))
    assert gateway.refusal().error_code == "queue_full"
    gateway.client(ClearCache(query_id=1), b"other")
    clears = gateway.messages(Peer.SCHEDULER, ClearCache)
    assert len(clears) == 64 + 1
    gateway.core.cache_cleared(clears[0].query_id, gateway.now)
    gateway.client(ClearCache(query_id=100))
    assert len(gateway.messages(Peer.SCHEDULER, ClearCache)) == 64 + 2


def test_a_client_that_is_slow_and_reads_is_not_dropped() -> None:
    gateway = Harness()
    for number in range(5):
        gateway.client(generate(f"r{number}"))
    requests = gateway.pass_on()
    for request in requests[:3]:
        gateway.deliver(request)
    for _ in range(3):
        gateway.tick(29)
        gateway.client(Delivered(count=1))
    assert len(gateway.core.table) == 2


# Vanished clients


def test_a_silent_client_is_probed_every_second_and_cancelled_when_it_has_gone() -> None:
    gateway = Harness()
    gateway.tick()
    gateway.client(generate("accepted"))
    [accepted] = gateway.pass_on()
    for number in range(5):
        gateway.client(generate(f"r{number}"))
    gateway.client(generate("other"), identity=b"other")
    gateway.tick(1.5)
    assert len(gateway.answers(Alive)) == 1
    assert gateway.core.timeout_s(gateway.now) == 1.0
    gateway.unreachable.add(b"c")
    gateway.tick(1.5)
    assert gateway.messages(Peer.DETOKENIZER, ClientGone) == [ClientGone(client=accepted.route.client)]
    assert gateway.messages(Peer.SCHEDULER, CancelRequests) == [CancelRequests(keys=[accepted.key])]
    tokenizing = [request.key for _, request in gateway.tokenized()]
    passed_on = gateway.pass_on()
    assert [r.key for r in passed_on[:4]] == tokenizing
    assert [r.route.request_id for r in passed_on[4:]] == ["other"]  # the queued one was never sent
    cancelled = [key for m in gateway.messages(Peer.SCHEDULER, CancelRequests) for key in m.keys]
    assert cancelled == [accepted.key, *tokenizing]
    assert len(gateway.core.table) == 1


def test_a_client_with_news_is_not_probed() -> None:
    gateway = Harness()
    gateway.client(generate("a"))
    gateway.client(generate("b"))
    first, _ = gateway.pass_on()
    gateway.tick()
    num_probes = len(gateway.answers(Alive))
    gateway.deliver(first)
    gateway.tick(1.5)
    assert len(gateway.answers(Alive)) == num_probes


def test_an_idle_gateway_needs_no_clock() -> None:
    gateway = Harness()
    assert gateway.core.timeout_s(gateway.now) is None
    gateway.client(generate("r"))
    [request] = gateway.pass_on()
    gateway.deliver(request)
    gateway.client(Delivered(count=1))
    assert gateway.core.timeout_s(gateway.now) is None


# Queries and the engine's state


def test_health_and_stats_answer_by_their_query_id() -> None:
    gateway = Harness(started=False)
    gateway.client(Query(query_id=1, what="health"))
    gateway.core.serving.start(gateway.now)
    gateway.client(Query(query_id=2, what="health"))
    gateway.client(Query(query_id=3, what="stats"))
    starting, ready = gateway.answers(Health)
    assert (starting.query_id, starting.state, ready.query_id, ready.state) == (1, "starting", 2, "ready")
    assert (ready.model, ready.max_model_len, ready.max_open_requests) == ("tiny", 128, 100)
    assert gateway.answers(Stats)[0] == Stats(query_id=3, roles={"gateway": {"num_open": 0.0}})


def test_health_has_the_http_servers_names_and_parsers() -> None:
    settings = {"served_model_names": ["a", "b"], "tool_parser": "hermes", "reasoning_parser": "none"}
    gateway = Harness(**settings, policy={"policy": "fair"})
    gateway.client(Query(query_id=1, what="health"))
    (health,) = gateway.answers(Health)
    assert health.policy == "fair"
    assert {name: getattr(health, name) for name in settings} == settings


def test_stats_have_the_arrays_that_the_query_names() -> None:
    gateway = Harness()
    gateway.client(Query(query_id=1, what="stats", arrays=["recent", "unknown"]))
    array = gateway.answers(Stats)[0].arrays["scheduler"]["recent"]
    assert memoryview(array.values).cast("q", array.shape).tolist() == [[0, 1], [2, 3], [4, 5]]


def test_a_starting_engine_refuses_requests() -> None:
    gateway = Harness(started=False)
    gateway.client(generate("r"))
    assert (gateway.refusal().error_code, gateway.refusal().error_message) == ("unavailable", "the engine is starting")


def test_draining_finishes_what_is_open_and_refuses_what_is_new() -> None:
    gateway = Harness()
    gateway.client(generate("r"))
    gateway.core.serving.drain(gateway.now)
    gateway.client(generate("late"))
    assert gateway.refusal().error_code == "unavailable"
    assert "draining" in gateway.refusal().error_message
    assert gateway.messages(Peer.LAUNCHER, Drained) == []
    [request] = gateway.pass_on()
    gateway.deliver(request)
    gateway.tick(30)
    assert gateway.messages(Peer.LAUNCHER, Drained) == [Drained()]
    assert [final.finish_reason for final in gateway.finals[b"c", "r"]] == ["length"]


def test_draining_an_idle_engine_is_done_at_once() -> None:
    gateway = Harness()
    gateway.core.serving.drain(gateway.now)
    gateway.flush()
    assert gateway.messages(Peer.LAUNCHER, Drained) == [Drained()]


def test_draining_ends_at_its_time_out_with_errors() -> None:
    gateway = Harness()
    gateway.client(generate("r"))
    [request] = gateway.pass_on()
    gateway.core.serving.drain(gateway.now)
    gateway.tick(19)
    assert gateway.finals == {}
    gateway.tick(2)
    gateway.deliver(request)
    assert [final.error_code for final in gateway.finals[b"c", "r"]] == ["unavailable"]
    assert gateway.messages(Peer.LAUNCHER, Drained) == [Drained()]


def test_aborting_answers_every_open_request_once() -> None:
    gateway = Harness()
    for number in range(6):
        gateway.client(generate(f"r{number}"), identity=b"cd"[number % 2 : number % 2 + 1])
    taken = [request for _, request in gateway.tokenized()]
    gateway.core.abort(EngineUnavailable("the GPU process died"))
    gateway.flush()
    for request in taken:
        gateway.deliver(request)
    assert len(gateway.finals) == 6
    for finals in gateway.finals.values():
        assert finals == [FinalOutput("error", 0, 0, "unavailable", "the GPU process died")]
    assert gateway.messages(Peer.LAUNCHER, Drained) == [Drained()]
    gateway.client(generate("late"))
    assert gateway.refusal().error_message == "the GPU process died"
    gateway.client(Query(query_id=1, what="health"))
    assert gateway.answers(Health)[0].state == "failed"


def test_many_open_requests_are_answered_in_frames_of_bounded_size() -> None:
    gateway = Harness(max_open_requests=20_000)
    for number in range(10_000):
        gateway.core.client_frames(b"c", [encode(generate(f"r{number}"))], gateway.now)
    gateway.core.abort(EngineUnavailable("over"))
    gateway.flush()
    assert [len(outputs.request_ids) for outputs in gateway.answers(Outputs)] == [8_192, 1_808]
    assert len(gateway.finals) == 10_000


# Requests that wait for a tokenizer


def test_requests_that_wait_for_a_tokenizer_are_bounded_in_bytes_and_the_next_is_refused_at_once() -> None:
    gateway = Harness(max_queued_bytes=6_000)
    for number in range(4 + 2):  # the tokenizers have room for four
        gateway.client(generate(f"r{number}", prompt="x" * 1_000))
    gateway.client(generate("r6", prompt="x" * 1_000))
    assert (gateway.refusal().request_id, gateway.refusal().error_code) == ("r6", "queue_full")
    gateway.client(Cancel(request_id="r5"))
    gateway.client(generate("r7", prompt="x" * 1_000))
    gateway.client(generate("r8", prompt="x" * 1_000), identity=b"other")
    assert gateway.answers(Refused, b"other")[0].error_code == "queue_full", "clients share the bound"
    gateway.core.client_gone(b"c")
    for number in range(2):
        gateway.client(generate(f"s{number}", prompt="x" * 1_000), identity=b"other")
    assert len(gateway.answers(Refused, b"other")) == 1


def test_a_request_larger_than_the_bound_waits_alone() -> None:
    gateway = Harness(max_queued_bytes=5_000)
    for number in range(4):
        gateway.client(generate(f"r{number}"))
    gateway.client(generate("large", prompt="x" * 20_000))
    gateway.client(generate("next"))
    assert gateway.refusal().request_id == "next"
    assert [request.route.request_id for request in gateway.pass_on()] == ["r0", "r1", "r2", "r3", "large"]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "x"},
        {"prompt": "x" * 500 + "\N{ROCKET}"},
        {"chat": user_chat(*(f"hi there {number}" for number in range(20)))},
        {"chat": encoded_chat([], tools=[], documents=[], template_kwargs={}, template="{# \N{ROCKET} #}" * 20)},
        {"params": SamplingParams(stop=[f"stop {number}" for number in range(16)], stop_token_ids=[*range(300, 316)])},
        {
            "params": SamplingParams(
                logit_bias={1_000 + token: 0.5 for token in range(300)},
                allowed_token_ids=[*range(1_000, 1_200)],
                bad_words=[f"word {number}" for number in range(50)],
            )
        },
        {"scheduling": SchedulingParams(priority=1, tenant="somebody", deadline_s=1.5, queue_timeout_s=2.5)},
        {"policy": "fair"},
        {
            "params": SamplingParams(n=8),
            "prompt": "x" * 500 + "\N{ROCKET}",
            "resume": resume_with([list(range(300))] * 7 + [None]),
        },
    ],
    ids=[
        "tiny",
        "wide text",
        "chat",
        "chat with all fields",
        "stops",
        "long values",
        "scheduling",
        "tenants",
        "resumed",
    ],
)
def test_what_waits_for_a_tokenizer_is_charged_the_memory_that_it_takes(fields: dict[str, Any]) -> None:
    fields = {"policy": "priority", **fields}
    policy = fields.pop("policy")
    gateway = Harness(max_open_requests=10_000, max_queued_bytes=4 << 20, policy={"policy": policy})
    frames = (encode(generate(f"request {number}", **fields)) for number in range(4_000))
    if policy == "fair":
        tenants = (SchedulingParams(tenant=f"tenant {number}", deadline_s=1.5) for number in range(4_000))
        frames = (encode(generate(f"request {i}", scheduling=tenant)) for i, tenant in enumerate(tenants))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for frame in frames:
            gateway.core.client_frames(b"c", [frame], gateway.now)
            if gateway.core.num_refused:
                break
        gateway.core.take_outbox()  # the refusal, which does not wait
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert gateway.core.num_refused > 0, "the bound was not reached"
    under_way = sum(prompt.held_bytes for prompt in gateway.core.requests.prompts._sent.values())
    assert 0.4 * (4 << 20) < held - before <= (4 << 20) + under_way


# Several samples


def test_the_keys_of_all_samples_are_the_requests_own_and_it_is_sent_to_a_tokenizer_once() -> None:
    gateway = Harness()
    gateway.client(generate("r0", params=SamplingParams(n=3)))
    gateway.client(generate("r1"))
    first, second = gateway.pass_on()
    assert second.key == first.key + 3
    assert first.params.n == 3
    assert first.params.seed is not None


def test_a_cancellation_reaches_every_sample() -> None:
    gateway = Harness()
    gateway.client(generate("r", params=SamplingParams(n=3)))
    gateway.client(Cancel(request_id="r"))
    [request] = gateway.pass_on()
    keys = [request.key, request.key + 1, request.key + 2]
    assert gateway.messages(Peer.SCHEDULER, CancelRequests) == [CancelRequests(keys=keys)]


def test_a_client_that_goes_takes_all_its_samples_along() -> None:
    gateway = Harness()
    gateway.client(generate("r0", params=SamplingParams(n=2)))
    gateway.client(generate("r1", params=SamplingParams(n=3)))
    first, second = gateway.pass_on()
    gateway.core.client_gone(b"c")
    gateway.flush()
    keys = [first.key, first.key + 1, second.key, second.key + 1, second.key + 2]
    assert gateway.messages(Peer.SCHEDULER, CancelRequests) == [CancelRequests(keys=keys)]


def test_every_sample_counts_as_an_open_request() -> None:
    gateway = Harness(max_open_requests=4)
    gateway.client(generate("r0", params=SamplingParams(n=5)))
    assert gateway.refusal().error_code == "invalid_request"
    gateway.client(generate("r1", params=SamplingParams(n=3)))
    gateway.client(generate("r2", params=SamplingParams(n=2)))
    assert gateway.refusal().error_code == "queue_full"
    gateway.client(generate("r3"))
    first, second = gateway.pass_on()
    gateway.deliver(first)
    gateway.client(generate("r4", params=SamplingParams(n=3)))
    gateway.deliver(second, *gateway.pass_on())
    assert len(gateway.core.table) == 0
