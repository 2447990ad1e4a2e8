"""The lines of a batch: requests of the input file, and answers of the output file. Knows no engine.

input   {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}
output  {"id": ..., "custom_id": ..., "response": {"status_code": ..., "request_id": ..., "body": {...}},
         "error": null}
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

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


class _Done(msgspec.Struct):
    """The part of an output line that tells whether its request is done."""

    custom_id: str
    response: _Outcome


LINE_BEGIN: Final = b'{"id":"batch_req_'  # of each line that we write; a torn line begins so too
_NO_OUTPUT: Final = "is no line of a batch's output: give another output file"
_requests: Final = msgspec.json.Decoder(RequestLine)
_done: Final = msgspec.json.Decoder(_Done)


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


def repair_output(path: Path, *, retry_failed: bool) -> tuple[set[str], int]:
    """Make the output of an earlier run ready to be continued. Returns the ids that are done, and how many failed.

    Removes a last line that was not written to its end, and with `retry_failed` the lines of failed requests. Raises
    InvalidRequest for a file that is no output of a batch.
    """
    done: set[str] = set()
    num_failed, keeps_all = 0, True
    try:
        source = path.open("rb")
    except FileNotFoundError:
        return done, 0
    with source, tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as kept:
        try:
            for number, line in enumerate(source, start=1):
                if not line.endswith(b"\n"):
                    if not line.startswith(LINE_BEGIN[: len(line)]):
                        raise InvalidRequest(f"{path}, line {number}: {_NO_OUTPUT}")
                    keeps_all = False
                    break
                try:
                    answer = _done.decode(line)
                except msgspec.DecodeError:
                    raise InvalidRequest(f"{path}, line {number}: {_NO_OUTPUT}") from None
                is_failed = answer.response.status_code != 200
                if is_failed and retry_failed:
                    keeps_all = False
                    continue
                done.add(answer.custom_id)
                num_failed += is_failed
                kept.write(line)
            kept.flush()
            if not keeps_all:
                shutil.copymode(path, kept.name)
                os.fsync(kept.fileno())
                os.replace(kept.name, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(kept.name)
    return done, num_failed


def encode_line(value: Any) -> bytes:
    """A value as one line of JSON."""
    return msgspec.json.encode(value) + b"\n"
