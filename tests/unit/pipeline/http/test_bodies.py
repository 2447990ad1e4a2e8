"""Names that a client has chosen: they cost no more than any other bytes of a body."""

from __future__ import annotations

import time

import msgspec
import pytest

from pipeline.http.bodies import read_body
from pipeline.http.errors import HttpError


class Body(msgspec.Struct):
    temperature: float = 1.0


@pytest.mark.parametrize(
    "body",
    [
        b'{"temperatura' + b"x" * (8 << 20) + b'":1}',
        b'{"k":1' + b"".join(b',"k%d":1' % i for i in range(300_000)) + b"}",
    ],
)
def test_unknown_names_are_refused_quickly_however_long_or_many_they_are(body: bytes) -> None:
    begin = time.process_time()
    msgspec.json.decode(body)
    decoded = time.process_time()
    with pytest.raises(HttpError, match="is no field of this request") as refused:
        read_body(body, Body)
    assert time.process_time() - decoded < 3 * (decoded - begin) + 0.1
    assert len(refused.value.message) < 300


def test_the_first_unknown_name_is_reported_with_the_nearest_known_one() -> None:
    with pytest.raises(HttpError, match="temprature is no field of this request: did you mean temperature"):
        read_body(b'{"temprature": 1, "a": 1}', Body)
