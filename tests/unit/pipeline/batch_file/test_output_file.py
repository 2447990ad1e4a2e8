"""The output of a batch: how a torn one is continued, and that one batch at a time writes it."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import msgspec
import pytest

from ipc.errors import InvalidRequest
from pipeline.batch_file.lines import Answer, AnswerLine
from pipeline.batch_file.output_file import OutputFile


def answer(custom_id: str, status: int = 200) -> bytes:
    response = {"status_code": status, "request_id": "r", "body": {}}
    return json.dumps({"id": "b", "custom_id": custom_id, "response": response, "error": None}).encode() + b"\n"


def repaired(path: Path, *, retry_failed: bool = False) -> tuple[set[str], int]:
    with contextlib.closing(OutputFile(path)) as output:
        return output.repair(retry_failed=retry_failed)


def test_a_torn_last_line_is_cut_off_and_its_request_is_not_done(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(answer("a") + answer("b", 400) + b'{"id":"batch_req_1","custom')
    path.chmod(0o640)
    assert repaired(path) == ({"a", "b"}, 1)
    assert path.read_bytes() == answer("a") + answer("b", 400)
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path], "no other file is left"


def test_failed_requests_are_removed_only_to_be_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(answer("b", 400) + answer("a"))
    assert repaired(path, retry_failed=True) == ({"a"}, 0)
    assert path.read_bytes() == answer("a")
    assert repaired(tmp_path / "none.jsonl", retry_failed=True) == (set(), 0)


@pytest.mark.parametrize("text", [b"dear diary\nwithout end", b'{"my": "notes"}', b'{"custom_id": "a", "url": "/"}'])
def test_a_file_that_is_no_output_of_a_batch_is_left_as_it_is(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(text)
    with pytest.raises(InvalidRequest, match=r"notes.txt, line 1: is no line of a batch's output"):
        repaired(path, retry_failed=True)
    assert path.read_bytes() == text
    assert list(tmp_path.iterdir()) == [path]


def line(custom_id: str) -> AnswerLine:
    return AnswerLine(
        id="batch_req_1", custom_id=custom_id, response=Answer(status_code=200, request_id="r", body=msgspec.Raw(b"{}"))
    )


def test_lines_are_appended_also_to_a_repaired_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(answer("a") + b'{"id":"batch_req_1","custom')
    with contextlib.closing(OutputFile(path)) as output:
        output.repair(retry_failed=False)
        output.write(line("b"))
        assert output.num_lines == 1
    assert repaired(path) == ({"a", "b"}, 0)


@pytest.mark.parametrize("torn", [b"", b'{"id":"batch_req_1"'])
def test_a_second_batch_is_refused_until_the_first_one_ends(torn: bytes, tmp_path: Path) -> None:
    """Also when the first one has put a repaired file in the place of the one that it locked."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(answer("a") + torn)
    with contextlib.closing(OutputFile(path)) as output:
        for _ in range(2):
            with pytest.raises(InvalidRequest, match=r"out.jsonl'\): another batch writes this file"):
                OutputFile(path)
            output.repair(retry_failed=False)
    assert repaired(path) == ({"a"}, 0)


def test_a_file_that_is_replaced_while_it_is_opened_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(answer("a"))
    (tmp_path / "new").write_bytes(answer("b"))
    real_open = os.open

    def open_and_replace(*arguments: object) -> int:
        fd = real_open(*arguments)  # type: ignore[arg-type]
        monkeypatch.setattr(os, "open", real_open)
        os.replace(tmp_path / "new", path)
        return fd

    monkeypatch.setattr(os, "open", open_and_replace)
    assert repaired(path) == ({"b"}, 0)


@pytest.mark.parametrize("name", ["-", "/dev/null", "/"])
def test_an_output_that_is_no_file_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^OUT\.jsonl .* (must be a|cannot be written)"):
        OutputFile(Path(name))
