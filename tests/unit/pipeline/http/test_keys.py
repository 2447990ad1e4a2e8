"""Keys: the file that holds them, and the headers that carry them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.http.config import HttpConfig
from pipeline.http.listener import read_keys
from tests.unit.pipeline.http.application import app_of, ask
from tests.unit.pipeline.http.fake_engine import FakeEngine


def test_a_key_file_may_have_comments_empty_lines_and_the_mark_of_an_editor(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbfone\n\n# no key\n  # no key either\n  two \n")
    assert read_keys(HttpConfig(api_key_file=str(tmp_path / "keys"))) == ["one", "two"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": "Bearer k"}, 200),
        ({"authorization": "bearer  k "}, 200),
        ({"x-api-key": "k"}, 200),
        ({"authorization": "Bearer of another service", "x-api-key": "k"}, 200),
        ({"authorization": "Bearer k", "x-api-key": "of another service"}, 200),
        ({"authorization": "Basic k"}, 401),
        ({"authorization": "Bearer wrong", "x-api-key": "wrong"}, 401),
        ({"authorization": "Bearer ", "x-api-key": ""}, 401),
        ({}, 401),
    ],
)
def test_a_key_may_be_in_either_header(headers: dict[str, str], status: int) -> None:
    answer = ask(app_of(FakeEngine(), keys=["k"]), "/tokenize", {"prompt": "x"}, headers)
    assert answer.status_code == status
    assert answer.headers.get("www-authenticate") == ('Bearer realm="ringfeed"' if status == 401 else None)
