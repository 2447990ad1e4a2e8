"""The lines of a batch: requests of the input file, and answers of the output file. Knows no engine.

input   {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}
output  {"id": ..., "custom_id": ..., "response": {"status_code": ..., "request_id": ..., "body": {...}},
         "error": null}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Final

import msgspec

from ipc.errors import InvalidRequest

MAX_LINE_BYTES: Final = 64 << 20


class RequestLine(msgspec.Struct, kw_only=True):
    """A line of the input file. Other fields are ignored, as OpenAI does."""

    custom_id: str
    method: str = "POST"
    url: str
    body: msgspec.Raw


class Answer(msgspec.Struct, kw_only=True):
    """The answer of one request, as the endpoint of its `url` gives it."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class AnswerLine(msgspec.Struct, kw_only=True):
    """A line of the output file. `error` is always null: a failed request has an answer with its status and reason."""

    id: str
    custom_id: str
    response: Answer
    error: None = None


class _Outcome(msgspec.Struct):
    status_code: int


class EarlierAnswer(msgspec.Struct):
    """The part of an output line that tells whether its request is done."""

    custom_id: str
    response: _Outcome


LINE_BEGIN: Final = b'{"id":"batch_req_'  # of each line that we write; a torn line begins so too
_NO_OUTPUT: Final = "is no line of a batch's output: give another output file"
_requests: Final = msgspec.json.Decoder(RequestLine)
_earlier: Final = msgspec.json.Decoder(EarlierAnswer)


def read_requests(file: IO[bytes], name: str) -> Iterator[RequestLine]:
    """All requests from the beginning of the file, one after the other. Empty lines are skipped.

    Raises InvalidRequest for a line that is no request, with its number.
    """
    file.seek(0)
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), start=1):
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            raise InvalidRequest(f"{name}, line {number}: has more than {MAX_LINE_BYTES:,} bytes")
        if not line.strip():
            continue
        try:
            yield _requests.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequest(
                f"{name}, line {number}: is no request: {error}; it must be an object with custom_id, url and body"
            ) from None


def check_requests(file: IO[bytes], name: str) -> int:
    """Read the whole file once. Returns the number of requests.

    Raises InvalidRequest for a line that is no request, or a custom_id that two lines have.
    """
    seen: set[str] = set()
    for request in read_requests(file, name):
        if request.custom_id in seen:
            raise InvalidRequest(f"{name}: two lines have the custom_id {request.custom_id[:100]!r}: make it unique")
        seen.add(request.custom_id)
    return len(seen)


def read_answers(file: IO[bytes], name: str) -> Iterator[tuple[bytes, EarlierAnswer | None]]:
    """All lines of a batch's output from the file's position, with the answer in each.

    None instead of an answer: the last line, which was not written to its end. Raises InvalidRequest for a file that is
    not the output of a batch.
    """
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            if not line.startswith(LINE_BEGIN[: len(line)]):
                raise InvalidRequest(f"{name}, line {number}: {_NO_OUTPUT}")
            yield line, None
            return
        try:
            answer = _earlier.decode(line)
        except msgspec.DecodeError:
            raise InvalidRequest(f"{name}, line {number}: {_NO_OUTPUT}") from None
        yield line, answer
