"""The files of a batch: what is read, what is refused, and how a torn output is continued."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from ipc.errors import InvalidRequest
from pipeline.batch_file.lines import check_requests, read_requests, repair_output


def request(custom_id: Any, **changes: Any) -> bytes:
    plain = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}} | changes
    return json.dumps(plain).encode() + b"\n"


def answer(custom_id: str, status: int = 200) -> bytes:
    response = {"status_code": status, "request_id": "r", "body": {}}
    return json.dumps({"id": "b", "custom_id": custom_id, "response": response, "error": None}).encode() + b"\n"


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


def test_a_torn_last_line_is_cut_off_and_its_request_is_not_done(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(answer("a") + answer("b", 400) + b'{"id":"batch_req_1","custom')
    path.chmod(0o640)
    assert repair_output(path, retry_failed=False) == ({"a", "b"}, 1)
    assert path.read_bytes() == answer("a") + answer("b", 400)
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path], "no other file is left"


def test_failed_requests_are_removed_only_to_be_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(answer("b", 400) + answer("a"))
    assert repair_output(path, retry_failed=True) == ({"a"}, 0)
    assert path.read_bytes() == answer("a")
    assert repair_output(tmp_path / "none.jsonl", retry_failed=True) == (set(), 0)


@pytest.mark.parametrize("text", [b"dear diary\nwithout end", b'{"my": "notes"}', request("a").rstrip(b"\n")])
def test_a_file_that_is_no_output_of_a_batch_is_left_as_it_is(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(text)
    with pytest.raises(InvalidRequest, match=r"notes.txt, line 1: is no line of a batch's output"):
        repair_output(path, retry_failed=True)
    assert path.read_bytes() == text
    assert list(tmp_path.iterdir()) == [path]
