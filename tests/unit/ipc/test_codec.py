from __future__ import annotations

import math
import struct
import tracemalloc

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect

from ipc.codec import MAX_FRAME_BYTES, MAX_ITEMS, decode, decode_untrusted, encode
from ipc.errors import InvalidRequest, ProtocolError
from ipc.messages import Cancel, CancelRequests, ClientMessage, Health, Query, StepOutputs, Withdraw, split_keys
from tests.unit.ipc.message_strategies import ALL_MESSAGES, ANY_MESSAGE, MESSAGES, structs_of


@pytest.mark.parametrize("kind", ALL_MESSAGES, ids=lambda kind: kind.__name__)
@settings(max_examples=25)
@given(data=st.data())
def test_every_message_survives_the_wire_and_msgpack_reads_the_same(kind, data):
    message = data.draw(structs_of(kind))
    frame = encode(message)
    plain = msgspec.to_builtins(message, builtin_types=(bytes,))
    assert msgpack.unpackb(frame, strict_map_key=False) == msgpack.unpackb(msgpack.packb(plain), strict_map_key=False)
    for read in (decode, decode_untrusted):
        assert read(frame, ANY_MESSAGE) == message
        assert read(memoryview(frame), kind) == message


@given(st.binary(max_size=200))
def test_no_bytes_do_worse_than_a_protocol_error(frame):
    for read in (decode, decode_untrusted):
        with pytest.raises(ProtocolError):
            read(frame, ClientMessage)


@settings(max_examples=300)
@given(MESSAGES.map(encode), st.data())
def test_both_readers_agree_on_a_damaged_message(frame, data):
    damaged = bytearray(frame)
    damaged[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    results = []
    for read in (decode, decode_untrusted):
        try:
            results.append(encode(read(bytes(damaged), ANY_MESSAGE)))  # bytes, because NaN equals nothing
        except (ProtocolError, InvalidRequest):
            results.append(b"refused")  # of two faults, each reader names the one that it meets first
    assert results[0] == results[1]


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
        (msgpack.packb({1: 2}), "Object missing required field `type`|Expected `str`"),
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
        decode_untrusted(frame, ClientMessage)
    with pytest.raises(ProtocolError):
        decode(frame, ClientMessage)


def with_field(name: str, value: bytes, kind: str = "CancelRequests") -> bytes:
    """A message's frame with one field, whose value is given in bytes."""
    return b"\x82" + msgpack.packb("type") + msgpack.packb(kind) + msgpack.packb(name) + value


MANY = struct.pack(">I", 2**32 - 1)


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (b"", "not a msgpack message: Input data was truncated"),
        (b"\xc1", "not a msgpack message: .*invalid opcode"),
        (encode(Cancel(request_id="a")) + b"\x80", "not a msgpack message: .*trailing characters"),
        (with_field("request_id", b"\xa2\xff\xfe", "Cancel"), "not a msgpack message: .*can't decode byte"),
        (b"\x82\xa1x" + b"\x91" * 100_000, "nested too deeply"),  # where the type is still unknown
        (with_field("keys", b"\xdd" + MANY), "length <= 16384 - at `\\$.keys`"),
        (with_field("keys", msgpack.packb([0] * (MAX_ITEMS + 1))), "length <= 16384 - at `\\$.keys`"),
        (with_field("keys", b"\x91\xdd" + MANY), "Expected `int`, got `array` - at `\\$.keys\\[0\\]`"),
        (with_field("keys", b"\xc6" + MANY), "Expected `array`|truncated"),
        (with_field("keys", b"\x91\xcb\x7f\xf8" + bytes(6)), "Expected `int`, got `float`"),
        (with_field("keys", b"\x91\xd4\x03x"), "Expected `int`, got `ext`"),
        (with_field("keys", b"\x91" + msgpack.packb(msgpack.Timestamp(5))), "Expected `int`, got `ext`"),
        (with_field("roles", b"\xdf" + MANY, "Stats"), "length <= 1024 - at `\\$.roles`"),
        (with_field("request_id", b"\xdb" + MANY, "Cancel"), "truncated"),
        (with_field("keys", b"\xc6" + MANY, "StepOutputs"), "truncated"),
        (with_field("other", b"\x90"), "unknown field `other`"),
        (with_field("a\nb", b"\x90"), "unknown field `a b`"),
        (b"\x81\x01\x02", "Expected `str`, got `int`"),
        (b"\xdf" + MANY, "truncated"),
        (b"\xdd" + MANY, "Expected `object`, got `array`"),
    ],
)
def test_the_engines_own_reader_refuses_what_is_no_message_and_allocates_nothing_for_it(frame, text):
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match=text) as caught:
            decode(frame, ANY_MESSAGE)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_of_two_fields_of_one_name_both_readers_take_the_last():
    frame = b"\x83" + with_field("request_id", b"\xa1a", "Cancel")[1:] + msgpack.packb("request_id") + b"\xa1b"
    assert decode(frame, ClientMessage) == decode_untrusted(frame, ClientMessage) == Cancel(request_id="b")


def unbounded_parts(kind: inspect.Type, path: str) -> list[str]:
    """Where lists and maps of any length may stand in values of this type."""
    found = []
    if isinstance(kind, inspect.ListType | inspect.DictType) and kind.max_length is None:
        found.append(path)
    parts = list(getattr(kind, "types", ())) + list(getattr(kind, "item_types", ()))
    parts += [part for name in ("item_type", "key_type", "value_type") if (part := getattr(kind, name, None))]
    for part in parts:
        found += unbounded_parts(part, path)
    for field in getattr(kind, "fields", ()):
        found += unbounded_parts(field.type, f"{path}.{field.name}")
    assert not isinstance(kind, inspect.AnyType), f"{path} has no type that bounds how deep it nests"
    return found


def test_every_list_and_map_of_every_message_is_bounded():
    assert len(ALL_MESSAGES) > 25
    for kind in ALL_MESSAGES:
        assert unbounded_parts(inspect.type_info(kind), kind.__name__) == []


def test_any_number_of_keys_is_split_into_messages_that_their_receiver_reads():
    keys = list(range(2 * MAX_ITEMS + 3))
    for kind in (CancelRequests, Withdraw):
        messages = [decode(encode(message), kind) for message in split_keys(kind, keys)]
        assert [len(message.keys) for message in messages] == [MAX_ITEMS, MAX_ITEMS, 3]
        assert [key for message in messages for key in message.keys] == keys
    assert list(split_keys(CancelRequests, [])) == []


def test_headers_that_claim_much_at_every_depth_get_little_memory():
    nested = struct.pack(">BI", 0xDD, MAX_ITEMS) * 500 + bytes(MAX_ITEMS)
    tracemalloc.start()
    try:
        for read in (decode, decode_untrusted):
            with pytest.raises(ProtocolError):
                read(nested, ClientMessage)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_a_frame_beyond_the_limit_is_neither_sent_nor_read():
    for read in (decode, decode_untrusted):
        with pytest.raises(ProtocolError, match="larger than"):
            read(bytes(MAX_FRAME_BYTES + 1), ClientMessage)
    with pytest.raises(ProtocolError, match="larger than"):
        encode(StepOutputs(keys=bytes(MAX_FRAME_BYTES)))


def test_a_value_out_of_range_is_the_requests_fault_and_not_the_protocols():
    for value in (math.nan, math.inf, -1.0):
        frame = msgpack.packb({"type": "Generate", "request_id": "a", "params": {"temperature": value}})
        for read in (decode, decode_untrusted):
            with pytest.raises(InvalidRequest, match=r"^temperature \(.*\) must lie in"):
                read(frame, ClientMessage)


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


def test_numpys_floats_and_texts_are_sent_as_pythons():
    assert msgpack.unpackb(encode([np.float64(1.5), np.str_("é"), {np.str_("a"): 1}])) == [1.5, "é", {"a": 1}]
    with pytest.raises(TypeError, match="int64 cannot be sent"):
        encode([np.int64(1)])
