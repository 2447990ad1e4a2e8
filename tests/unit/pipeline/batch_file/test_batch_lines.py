"""The requests of a batch: which lines are read, and which are refused."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from ipc.errors import InvalidRequest
from pipeline.batch_file.lines import check_requests, read_requests


def request(custom_id: Any, **changes: Any) -> bytes:
    plain = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}} | changes
    return json.dumps(plain).encode() + b"\n"


def test_requests_are_read_again_from_the_beginning_without_empty_lines() -> None:
    file = io.BytesIO(request("a") + b"\n  \n" + request("b", other=1).rstrip(b"\n"))
    assert check_requests(file, "in") == 2
    assert [each.custom_id for each in read_requests(file, "in")] == ["a", "b"]
    assert bytes(next(read_requests(file, "in")).body) == b'{"prompt": "a"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: is no request"),
        (b"[1]", "line 2: is no request"),
        (request(7), "custom_id"),
        (b'{"custom_id": "x", "url": "/v1/completions"}', "body"),
        (b"\xff\xfe", "line 2: is no request"),
        (b"[" * 100_000, "line 2: is no request"),
        (request("a"), "two lines have the custom_id 'a'"),
    ],
)
def test_a_line_that_is_no_request_is_named_before_anything_runs(line: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check_requests(io.BytesIO(request("a") + line), "in.jsonl")
