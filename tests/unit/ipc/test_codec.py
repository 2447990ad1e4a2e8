from __future__ import annotations

import contextlib
import math
import struct
import tracemalloc

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.codec import MAX_FRAME_BYTES, MAX_ITEMS, decode, encode
from ipc.errors import InvalidRequest, ProtocolError
from ipc.messages import (
    Cancel,
    CancelRequests,
    ChatMessage,
    ClientMessage,
    Delivered,
    Delivery,
    Ended,
    FinalOutput,
    GatewayToClient,
    Generate,
    Health,
    LauncherToWorker,
    Opened,
    Outputs,
    Progress,
    Query,
    Refused,
    Route,
    SchedulerToGateway,
    Start,
    Stats,
    StepLogprobs,
    StepOutputs,
    Stop,
    ToDetokenizer,
    Tokenize,
    Tokenized,
    TokenLogprobs,
    ToScheduler,
    Withdraw,
    Withdrawn,
    WorkerToLauncher,
)
from ipc.sampling_params import SamplingParams

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
BYTES = st.binary(max_size=24)
KEY = st.integers(0, 2**63 - 1)
COUNT = st.integers(0, 2**31 - 1)
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(1, 99),
    temperature=st.just(0.0) | st.floats(0.001, 100),
    seed=st.none() | KEY,
    stop=st.lists(st.sampled_from(["END", "é"]), max_size=3),
    ignore_eos=st.booleans(),
    n=st.integers(1, 64),
)
ROUTE = st.builds(Route, client=BYTES, request_id=TEXT, stream=st.booleans())
REASON = st.sampled_from(["stop", "length", "cancelled", "error"])
FINAL = st.builds(FinalOutput, finish_reason=REASON, num_prompt_tokens=COUNT, num_completion_tokens=COUNT,
                  error_message=TEXT, num_open=COUNT)  # fmt: skip
MESSAGES = st.one_of(
    st.builds(Generate, request_id=TEXT, params=PARAMS, prompt=st.none() | TEXT, token_ids=st.none() | BYTES,
              chat=st.none() | st.lists(st.builds(ChatMessage, role=TEXT, content=TEXT), max_size=3)),
    st.builds(Cancel, request_id=TEXT),
    st.builds(Delivered, count=COUNT),
    st.builds(Query, query_id=COUNT, what=st.sampled_from(["health", "stats"])),
    st.builds(Outputs, request_ids=st.lists(TEXT, max_size=3), texts=st.lists(TEXT, max_size=3), num_token_ids=BYTES,
              token_ids=BYTES, samples=BYTES, finals=st.lists(st.tuples(COUNT, FINAL), max_size=2),
              logprobs=st.lists(st.tuples(COUNT, st.builds(TokenLogprobs, num_top=COUNT, logprobs=BYTES, top_ids=BYTES,
                                                           top_logprobs=BYTES)), max_size=2)),
    st.builds(Refused, request_id=TEXT, error_code=TEXT, error_message=TEXT, retry_after_s=st.floats(0, 60)),
    st.builds(Stats, query_id=COUNT,
              roles=st.dictionaries(TEXT, st.dictionaries(TEXT, st.floats(allow_nan=False), max_size=3), max_size=2)),
    st.builds(Tokenize, key=KEY, route=ROUTE, params=PARAMS, prompt=TEXT, arrived_ns=KEY),
    st.builds(Tokenized, key=KEY, route=ROUTE, params=PARAMS, ring=COUNT, ticket=KEY, num_prompt_tokens=COUNT,
              arrived_ns=KEY),
    st.builds(CancelRequests, keys=st.lists(KEY, max_size=5)),
    st.builds(Withdraw, keys=st.lists(KEY, max_size=5)),
    st.builds(Withdrawn, keys=st.lists(KEY, max_size=5)),
    st.builds(StepOutputs, keys=BYTES, token_ids=BYTES, finish=BYTES,
              opened=st.lists(st.builds(Opened, key=KEY, route=ROUTE, stop=st.lists(TEXT, max_size=2),
                                        num_prompt_tokens=COUNT, num_logprobs=st.none() | COUNT,
                                        num_samples=COUNT, prompt_tail=BYTES), max_size=2),
              logprobs=st.none() | st.builds(StepLogprobs, num_top=COUNT, logprobs=BYTES, top_ids=BYTES,
                                             top_logprobs=BYTES),
              ended=st.lists(st.builds(Ended, key=KEY, finish_reason=REASON, error_message=TEXT), max_size=2)),
    st.builds(Delivery, clients=st.lists(BYTES, max_size=3), finished=st.lists(st.lists(KEY, max_size=3), max_size=3)),
    st.builds(Progress, role=TEXT, stage=TEXT, fraction=st.floats(0, 1)),
    st.builds(Start, info=st.dictionaries(TEXT, COUNT, max_size=3)),
    st.just(Stop()),
)  # fmt: skip
ANY_MESSAGE = (
    ClientMessage | GatewayToClient | Tokenize | ToScheduler | SchedulerToGateway | ToDetokenizer | Delivery
    | WorkerToLauncher | LauncherToWorker
)  # fmt: skip


@settings(max_examples=200)
@given(MESSAGES)
def test_every_message_survives_the_wire(message):
    assert decode(encode(message), ANY_MESSAGE) == message
    assert decode(memoryview(encode(message)), type(message)) == message


@given(st.binary(max_size=200))
def test_no_bytes_do_worse_than_a_protocol_error(frame):
    with pytest.raises(ProtocolError):
        decode(frame, ClientMessage)


@settings(max_examples=200)
@given(MESSAGES.map(encode), st.data())
def test_a_damaged_message_is_read_or_refused(frame, data):
    damaged = bytearray(frame)
    damaged[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError, InvalidRequest):
        decode(bytes(damaged), ANY_MESSAGE)


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (b"", "incomplete input"),
        (b"\xc1", "FormatError"),
        (b"\x80\x80", "extra data"),
        (msgpack.packb(msgpack.ExtType(3, b"")), "extension type 3"),
        (msgpack.packb(msgpack.ExtType(3, b"code")), "max_ext_len"),
        (msgpack.packb({"type": "Cancel", "request_id": msgpack.Timestamp(5)}), "max_ext_len"),
        (b"\x91" * 5_000, "StackError"),
        (msgpack.packb([None] * 20_000), "exceeds max_array_len"),
        (msgpack.packb({str(i): None for i in range(20_000)}), "exceeds max_map_len"),
        (b"\xdd\xff\xff\xff\xff", "exceeds max_array_len"),
        (b"\xdf\xff\xff\xff\xff", "exceeds max_map_len"),
        (b"\xdb\xff\xff\xff\xff", "incomplete input"),
        (b"\xc6\xff\xff\xff\xff", "incomplete input"),
        (b"\xa2\xff\xfe", "can't decode byte"),
        (msgpack.packb({1: 2}), "map key"),
        (msgpack.packb({"type": "Cancel"}), "missing required field `request_id`"),
        (msgpack.packb({"type": "Cancel", "request_id": 7}), "Expected `str`, got `int`"),
        (msgpack.packb({"type": "Cancel", "request_id": "a", "why": 1}), "unknown field `why`"),
        (msgpack.packb({"type": "Stop"}), "Invalid value 'Stop'"),
        (msgpack.packb({"type": "Delivered", "count": True}), "Expected `int`, got `bool`"),
        (msgpack.packb({"type": "Delivered", "count": math.nan}), "Expected `int`, got `float`"),
        (msgpack.packb({"type": "Generate", "request_id": "a", "params": {}, "token_ids": "AAAA"}), "Expected `bytes"),
    ],
)
def test_what_is_no_message_is_refused_with_a_reason(frame, text):
    with pytest.raises(ProtocolError, match=text):
        decode(frame, ClientMessage)


def test_headers_that_claim_much_at_every_depth_get_little_memory():
    nested = struct.pack(">BI", 0xDD, MAX_ITEMS) * 500 + bytes(MAX_ITEMS)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode(nested, ClientMessage)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_a_frame_beyond_the_limit_is_neither_sent_nor_read():
    with pytest.raises(ProtocolError, match="larger than"):
        decode(bytes(MAX_FRAME_BYTES + 1), ClientMessage)
    with pytest.raises(ProtocolError, match="larger than"):
        encode(StepOutputs(keys=bytes(MAX_FRAME_BYTES)))


def test_a_value_out_of_range_is_the_requests_fault_and_not_the_protocols():
    for value in (math.nan, math.inf, -1.0):
        frame = msgpack.packb({"type": "Generate", "request_id": "a", "params": {"temperature": value}})
        with pytest.raises(InvalidRequest, match=r"^temperature \(.*\) must be 0"):
            decode(frame, ClientMessage)


def test_text_without_a_utf8_form_is_refused_where_it_is_sent():
    with pytest.raises(InvalidRequest, match="lone surrogate at character 2"):
        encode(Cancel(request_id="ab\ud800"))


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1])
def test_an_integer_that_has_no_form_on_the_wire_is_refused_where_it_is_sent(value):
    with pytest.raises(InvalidRequest, match="beyond 64 bits"):
        encode(Query(query_id=value, what="stats"))


def test_health_crosses_the_wire_as_a_plain_map():
    health = Health(
        query_id=1, state="ready", detail="", protocol_version=1, model="m", max_model_len=8, max_open_requests=2
    )
    assert msgpack.unpackb(encode(health))["type"] == "Health"
