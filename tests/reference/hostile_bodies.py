"""Requests that are wrong in many ways, made from valid ones, and a client that sends them to a running server.

By hand: `python -m tests.reference.hostile_bodies URL COUNT SEED` sends COUNT of them and prints what came back.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from pipeline.http.app import ROUTES
from pipeline.http.transport import Endpoint
from tests.reference.good_requests import NUM_TOKENS, GoodRequests

DEADLINE_S: Final = 60.0  # of one answer
_TOOL: Final = {
    "type": "function",
    "function": {"name": "now", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}},
}
_CHAT: Final = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A class"}]
_BLOCKS: Final = [{"role": "user", "content": [{"type": "text", "text": "A class"}]}]
_SAMPLING: Final = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 1, "stop": ["x"], "logit_bias": {"5": 1.0}}
_SCHEMA: Final = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
VALID: Final[list[tuple[str, dict[str, Any]]]] = [
    ("/v1/completions", {"prompt": "A class", "max_tokens": 2, "logprobs": 2, "echo": True, **_SAMPLING}),
    ("/v1/completions", {"prompt": [[5, 6], [7]], "max_tokens": 2, "n": 2, "stream": True, "min_p": 0.1}),
    ("/v1/completions", {"prompt": ["A", "b"], "max_tokens": 1, "guided_regex": "[a-z]+", "prompt_logprobs": 1}),
    ("/v1/chat/completions", {"messages": _CHAT, "max_tokens": 2, "logprobs": True, "top_logprobs": 2, **_SAMPLING}),
    ("/v1/chat/completions", {"messages": _CHAT, "max_tokens": 2, "tools": [_TOOL], "tool_choice": "auto"}),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "A"}]}], "max_tokens": 2, "stream": True,
            "stream_options": {"include_usage": True},
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": _SCHEMA}},
        },
    ),
    ("/v1/messages", {"messages": _BLOCKS, "max_tokens": 2, "system": "Be brief.", "stop_sequences": ["x"]}),
    (
        "/v1/messages",
        {
            "messages": [
                {"role": "user", "content": "A"},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "now", "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "noon"}]},
            ],
            "max_tokens": 2, "stream": True, "tools": [{"name": "now", "input_schema": _SCHEMA}],
            "tool_choice": {"type": "auto"}, "thinking": {"type": "enabled", "budget_tokens": 1},
        },
    ),
    ("/v1/messages/count_tokens", {"messages": _BLOCKS, "output_config": {"effort": "low"}}),
    ("/v1/responses", {"input": "A class", "max_output_tokens": 2, "instructions": "Be brief.", "store": True}),
    (
        "/v1/responses",
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "A"}]},
                {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "noon"},
            ],
            "max_output_tokens": 2, "stream": True,
            "tools": [{"type": "function", "name": "now", "parameters": _SCHEMA}],
            "text": {"format": {"type": "text"}}, "include": ["message.output_text.logprobs"], "top_logprobs": 1,
            "reasoning": {"effort": "low"}, "metadata": {"a": "b"},
        },
    ),
    ("/v1/responses/input_tokens", {"input": "A class", "previous_response_id": "resp_" + "0" * 32}),
    ("/tokenize", {"prompt": "A class", "add_special_tokens": False, "return_token_strs": True}),
    ("/tokenize", {"messages": _CHAT, "tools": [_TOOL], "add_generation_prompt": True}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
]  # fmt: skip
_DEPTHS: Final = (3, 50, 600, 5_000)
_NUMBERS: Final = (-1, 0, 1, 2, 3, 2**31, 2**53, 2**63, 2**64, -(2**63) - 1, 10**40)
_TEXTS: Final = (
    "NaN", "Infinity", "-Infinity", "1e999", "-0", "1" * 5_000, "01", "1.", "0x1", "nul",
    r'"\ud800"', r'"\udfff\ud800 a"', r'"\u0000"', r'"\x"', '"\n"', '"\ud800"',
)  # fmt: skip
_STRINGS: Final = (
    "", " ", "\0", "é" * 100, "\u202e\ufeff", "🦜" * 50, "x" * 20_000, "%s{}{{{%", "\\", "None", "auto", "required",
    "text", "json_object", "user", "[" * 300, "(a+)+$", "(" * 300, "a{9999}",
)  # fmt: skip
_TYPES: Final = ("text", "function", "json_schema", "tool_use", "image", 5, None)
_MAX_BODY_BYTES: Final = 200_000
_METHODS: Final = ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "BREW", "post", "PROPFIND")
_FIELDS: Final = {  # path: the names of all fields of its body
    route.path: [each.encode_name for each in msgspec.structs.fields(route.endpoint.operation.body)]
    for route in ROUTES
    if isinstance(route.endpoint, Endpoint) and route.endpoint.operation.body is not None
}


class Text(str):
    """JSON text that is no JSON value of Python, such as NaN or a lone surrogate."""


@dataclass
class Request:
    """One HTTP request, ready to send."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def encoded(self) -> bytes:
        head = [f"{self.method} {self.target} HTTP/1.1", "host: here"]
        head += [f"{name}: {value}" for name, value in self.headers]
        head.append(f"content-length: {len(self.body)}")
        return "\r\n".join(head).encode("latin-1", "replace") + b"\r\n\r\n" + self.body


class RequestMaker:
    """Makes requests from a seed: the same seed makes the same ones."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def make(self) -> Request:
        """The next request. About one in ten is valid."""
        draw = self._random
        path, valid = draw.choice(VALID)
        value: Any = msgspec.json.decode(msgspec.json.encode(valid))
        for _ in range(draw.choice((0, 1, 1, 1, 1, 2, 2, 3, 5, 8))):
            value = self._changed(value, path)
        body = encode(value, draw).encode("utf-8", "surrogatepass")[:_MAX_BODY_BYTES]
        request = Request("POST", path, [("content-type", "application/json")], body)
        if draw.random() < 0.2:
            request.body = self._broken(body)
        if draw.random() < 0.1:
            self._change_head(request)
        return request

    def _changed(self, value: Any, path: str) -> Any:
        """The value with one change somewhere in it."""
        draw = self._random
        places = [place for place in _places(value) if place[0] is not None]
        if not places or draw.random() < 0.02:
            return self._junk(value)
        holder, key = draw.choice(places)
        old = holder[key]
        match draw.randrange(8):
            case 0 | 1 | 2:
                holder[key] = self._junk(old)
            case 3:
                if isinstance(holder, dict):
                    holder[draw.choice(_FIELDS[path])] = self._junk(old)
                else:
                    holder.insert(key, self._junk(old))
            case 4:
                other, other_key = draw.choice(places)
                holder[key] = copy.deepcopy(other[other_key])
            case 5:
                del holder[key]
            case 6:
                # Copies of copies would grow without bound.
                holder[key] = [old] * (2 if isinstance(old, dict | list) else draw.choice((0, 1, 2, 20, 100)))
            case _:
                holder[key] = {str(draw.choice(("a", "type", "$ref", "role", "", "\0", "5", "9" * 5_000))): old}
        return value

    def _junk(self, old: Any) -> Any:
        draw = self._random
        depth, number = draw.choice(_DEPTHS), draw.choice(_NUMBERS)
        match draw.randrange(12):
            case 0:
                return draw.choice((None, True, False, [], {}))
            case 1:
                return number
            case 2:
                return float(number) * draw.choice((0.5, 1e-30, 1e200))
            case 3:
                return Text(draw.choice(_TEXTS))
            case 4 | 5:
                return draw.choice(_STRINGS)
            case 6:
                return [number] * draw.choice((1, 3, 1_000))
            case 7:
                return {"type": draw.choice(_TYPES), "text": old}
            case 8:
                return Text("[" * depth + "]" * depth)
            case 9:
                return Text('{"a":' * depth + "1" + "}" * depth)
            case 10:
                return str(old)[:1_000]
            case _:
                return -old if isinstance(old, int | float) else [old]

    def _broken(self, body: bytes) -> bytes:
        draw = self._random
        at = draw.randrange(len(body) + 1)
        match draw.randrange(8):
            case 0:
                return body[:at]
            case 1:
                return (
                    body[:at] + draw.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\0", b"\xef\xbb\xbf")) + body[at:]
                )
            case 2:
                return bytes([*body[:at], draw.randrange(256), *body[at + 1 :]])
            case 3:
                return body + body
            case 4:
                return draw.choice((b"", b"null", b"[]", b"0", b'""', b"true", b"{", b"[" * 100_000, b"\xef\xbb\xbf{}"))
            case 5:
                return body.decode("utf-8", "replace").encode(draw.choice(("utf-16", "utf-32")))
            case 6:
                return body.replace(b'"', b"'")
            case _:
                return body[:at] + b" " * draw.choice((1, 100_000)) + body[at:]

    def _change_head(self, request: Request) -> None:
        draw = self._random
        match draw.randrange(6):
            case 0:
                request.method = draw.choice(_METHODS)
            case 1:
                request.target = draw.choice([route.path for route in ROUTES]) + draw.choice(("", "/", "?", "x", "/.."))
                request.method = draw.choice(("GET", "POST", "DELETE"))
            case 2:
                request.target += draw.choice(("?after=x", "?%ff=%00", "?" + "a" * 9_000, "#x", "%2f..", "/%e9", "//"))
            case 3:
                kinds = ("text/plain", "", "application/xml; q=ü", "multipart/form-data; boundary=x", "\x01")
                request.headers = [("content-type", draw.choice(kinds))]
            case 4:
                names = ("x-request-id", "x-tenant", "authorization", "x-api-key", "accept", "traceparent", "cookie")
                values = ("", "é\xff", "a" * 3_000, "Bearer", '"', "00-0-0-0", "\t", "application/openmetrics-text")
                request.headers.append((draw.choice(names), draw.choice(values)))
            case _:
                request.headers.append(("connection", draw.choice(("close", "keep-alive", "Upgrade", "x"))))
                request.headers.append(("upgrade", draw.choice(("h2c", "websocket", "x"))))


def _places(value: Any, holder: Any = None, key: Any = None) -> list[tuple[Any, Any]]:
    """Every value inside `value`, as the dict or list that holds it and its key there. Long lists count in part."""
    found = [(holder, key)]
    if isinstance(value, dict):
        for name, each in value.items():
            found += _places(each, value, name)
    elif isinstance(value, list):
        for i, each in enumerate(value[:5]):
            found += _places(each, value, i)
    return found


def encode(value: Any, draw: random.Random) -> str:
    """JSON text of a value with Texts in it. Now and then a key comes twice."""
    if isinstance(value, Text):
        return str(value)
    if isinstance(value, dict):
        items = list(value.items())
        if items and draw.random() < 0.02:
            items.append((items[0][0], draw.choice(items)[1]))
        return "{" + ",".join(f"{encode(name, draw)}:{encode(each, draw)}" for name, each in items) + "}"
    if isinstance(value, list):
        return "[" + ",".join(encode(each, draw) for each in value) + "]"
    return json.dumps(value, ensure_ascii=False)


@dataclass
class Answer:
    """What came back. `status` 0: nothing did, or not HTTP; `body` then says what happened."""

    status: int
    body: bytes
    is_last: bool = True  # the server closes the connection after it


class Connection:
    """A connection that stays open as long as the server leaves it open."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: Request) -> Answer:
        """Send a request and read its whole answer."""
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 24)
            reader, writer = self._streams
            writer.write(request.encoded())
            async with asyncio.timeout(DEADLINE_S):  # Python 3.11's wait_for can lose a cancellation
                answer = await _read_answer(reader, request.method)
        except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError) as error:
            answer = Answer(0, repr(error).encode())
        if answer.is_last:
            self.close()
        return answer

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


async def _read_answer(reader: asyncio.StreamReader, method: str) -> Answer:
    while True:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head.split(b" ", 2)[1])
        if status >= 200:
            break
    headers = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    body = b""
    if method != "HEAD" and headers.get(b"transfer-encoding") == b"chunked":
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    elif method != "HEAD":
        body = await reader.readexactly(int(headers[b"content-length"]))
    if headers.get(b"content-type") == b"application/json" and method != "HEAD":
        msgspec.json.decode(body)
    return Answer(status, body, headers.get(b"connection") == b"close")


@dataclass
class Report:
    """What came back for all requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[tuple[Request, Answer]] = field(default_factory=list)
    slowest: tuple[float, Request | None] = (0.0, None)  # seconds

    def add(self, request: Request, answer: Answer, seconds: float) -> None:
        self.statuses[answer.status] += 1
        if seconds > self.slowest[0]:
            self.slowest = (seconds, request)
        is_fault = answer.status < 200 or (answer.status >= 500 and answer.status != 503)
        if is_fault or b"internal error" in answer.body:  # also as an event of a stream
            self.faults.append((request, answer))


async def send_all(port: int, seed: int, count: int, num_connections: int = 32) -> Report:
    """Send `count` requests, one at a time on each connection."""
    maker, report = RequestMaker(seed), Report()
    remaining = iter(range(count))

    async def send() -> None:
        with contextlib.closing(Connection(port)) as connection:
            for _ in remaining:
                request = maker.make()
                begin = time.monotonic()
                report.add(request, await connection.ask(request), time.monotonic() - begin)

    await asyncio.gather(*(send() for _ in range(num_connections)))
    return report


class GoodClient(GoodRequests):
    """Good requests to the server that the hostile bodies go to."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port

    async def answers(self, prompt: str) -> AsyncIterator[list[int] | str]:
        options = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        request = Request("POST", "/v1/completions", [], msgspec.json.encode({"prompt": prompt, **options}))
        with contextlib.closing(Connection(self._port)) as connection:
            while True:
                answer = await connection.ask(request)
                if answer.status == 200:
                    yield msgspec.json.decode(answer.body)["choices"][0]["token_ids"]
                else:
                    yield f"status {answer.status}: {answer.body[:300]!r}"


async def send_beside_good_ones(port: int, seed: int, count: int) -> tuple[Report, GoodClient]:
    """`send_all`, while a GoodClient runs."""
    good = GoodClient(port)
    task = asyncio.ensure_future(good.run())
    try:
        return await send_all(port, seed, count), good
    finally:
        task.cancel()
        await asyncio.wait([task])


def main() -> None:
    url, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    begin = time.monotonic()
    report, good = asyncio.run(send_beside_good_ones(int(url.rsplit(":", 1)[1]), seed, count))
    print(f"{count} requests in {time.monotonic() - begin:.0f} s", dict(sorted(report.statuses.items())))
    print(f"{good.num_answers} good requests, faults: {good.faults[:5]}")
    seconds, slowest = report.slowest
    print(f"the slowest took {seconds:.2f} s:", str(slowest)[:300])
    print(len(report.faults), "faults")
    for request, answer in report.faults[:20]:
        print(str(request)[:300], "->", answer.status, answer.body[:300])


if __name__ == "__main__":
    main()
