"""Bodies and heads of requests that are wrong in many ways, against a running engine, beside good requests.

`python -m tests.reference.hostile_bodies URL COUNT SEED` sends more of them by hand.
"""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import pytest

from pipeline import Pipeline
from tests.reference.hostile_bodies import send_beside_good_ones

pytestmark = pytest.mark.slow

NUM_REQUESTS = 3_000
SEED = 1


def test_no_wrong_request_is_an_error_of_ours_or_changes_the_answer_of_a_good_one(engine: Pipeline) -> None:
    assert engine.http_url is not None
    port = urlsplit(engine.http_url).port
    assert port is not None
    report, good = asyncio.run(send_beside_good_ones(port, SEED, NUM_REQUESTS))
    assert report.faults == []
    assert report.statuses.total() == NUM_REQUESTS
    assert {200, 400, 404, 405} <= report.statuses.keys()
    assert report.statuses[200] > NUM_REQUESTS // 20
    assert good.faults == []
    assert good.num_answers > 20
    assert engine.client.health().state == "ready"
