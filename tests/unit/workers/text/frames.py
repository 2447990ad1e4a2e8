"""Frames that no client should send: random bytes, mutations of good ones, false claims, deep nesting, wrong types."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgpack

from ipc.codec import encode
from ipc.messages import Cancel, Delivered, DetokenizeQuery, Keep, Query, Recall, Received, TokenizeQuery
from ipc.sampling_params import SamplingParams
from tests.unit.workers.gateway.gateway_tools import generate
from tests.unit.workers.text.tools import user_chat

GOOD = [
    encode(message)
    for message in (
        generate("x1"),
        generate("x2", chat=user_chat("hi"), stream=True),
        generate("x3", token_ids=bytes(16), params=SamplingParams(temperature=0.5, stop=["a"], logprobs=3)),
        Cancel(request_id="x1"),
        Delivered(count=1),
        Query(query_id=3, what="health"),
        TokenizeQuery(request_id="x4", prompt="hi"),
        TokenizeQuery(request_id="x5", chat=user_chat("hi"), add_special_tokens=False),
        DetokenizeQuery(request_id="x6", token_ids=bytes(16), skip_special_tokens=True),
        Keep(request_id="x7", key="k", value=b"abc"),
        Recall(request_id="x8", key="k"),
        Recall(request_id="x9", key="k", forget=True),
        Received(receipts=[1, 2]),
    )
]
_PLAIN = [msgpack.unpackb(frame) for frame in GOOD]
_ODD: list[Any] = [
    None, True, -1, 2**63, 2**64 - 1, -(2**63), 0.5, float("nan"), float("inf"), "", "x" * 300, "\ud7ff\uffff", b"",
    b"abc", [], {}, [[]], {"a": 1}, [None] * 20, {"type": "Generate"}, "Generate", "Outputs", 1e308,
]  # fmt: skip
_HEADERS = (
    b"\xdc",
    b"\xdd",
    b"\xde",
    b"\xdf",
    b"\xc4",
    b"\xc5",
    b"\xc6",
    b"\xd9",
    b"\xda",
    b"\xdb",
    b"\xc7",
    b"\xc8",
    b"\xc9",
)


def bad_frame(draw: random.Random) -> bytes:
    """One frame; a few of the mutated ones happen to be good."""
    return draw.choice(_MAKERS)(draw)


def _random_bytes(draw: random.Random) -> bytes:
    return draw.randbytes(draw.randint(0, 200))


def _flipped(draw: random.Random) -> bytes:
    frame = bytearray(draw.choice(GOOD))
    for _ in range(draw.randint(1, 4)):
        frame[draw.randrange(len(frame))] = draw.randrange(256)
    return bytes(frame)


def _cut_or_joined(draw: random.Random) -> bytes:
    frame = draw.choice(GOOD)
    at = draw.randrange(len(frame))
    return draw.choice([frame[:at], frame[at:], frame + frame, frame[:at] + draw.randbytes(5) + frame[at:]])


def _huge_claim(draw: random.Random) -> bytes:
    header = draw.choice(_HEADERS)
    claim = header + draw.choice([b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x00\x00\x40\x00", b"\xff\xff"])
    at = draw.randrange(len(GOOD[0]))
    return draw.choice([b"", GOOD[0][:at]]) + claim * draw.choice([1, 1, 50]) + bytes(draw.randint(0, 50))


def _deep(draw: random.Random) -> bytes:
    return draw.choice([b"\x91", b"\x81\xa1a", b"\xdc\x00\x01"]) * draw.randint(1, 2_000) + b"\xc0"


def _wrong_types(draw: random.Random) -> bytes:
    message = dict(draw.choice(_PLAIN))
    inside = message
    if isinstance(message.get("params"), dict) and draw.random() < 0.5:
        inside = message["params"] = dict(message["params"])
    for _ in range(draw.randint(1, 3)):
        names = [*inside, "extra", "seed", "stop", "top_p", "max_tokens", "token_ids", "prompt", "chat"]
        inside[draw.choice(names)] = draw.choice(_ODD)
    return msgpack.packb(message)  # type: ignore[no-any-return]


def _extension(draw: random.Random) -> bytes:
    value = msgpack.ExtType(draw.randint(0, 127), draw.randbytes(draw.randint(0, 20)))
    return msgpack.packb(draw.choice([value, {"type": value}, {**_PLAIN[0], "prompt": value}]))  # type: ignore[no-any-return]


_MAKERS: list[Callable[[random.Random], bytes]] = [
    _random_bytes, _flipped, _flipped, _cut_or_joined, _huge_claim, _deep, _wrong_types, _wrong_types, _extension,
]  # fmt: skip
