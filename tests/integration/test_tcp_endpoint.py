"""Engines at TCP endpoints: keys end to end, and hostile frames beside good requests.

`python -m tests.reference.hostile_frames CONFIG --frames N [--curve]` sends more frames, and prints what it finds.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from ipc.key_files import read_secret_file
from pipeline import Client, EngineUnavailable, Pipeline, SamplingParams
from pipeline.keys import _make_client
from tests.integration.conftest import TINY_CONFIG
from tests.reference.hostile_frames import Report, Run, endpoint_settings

pytestmark = pytest.mark.slow

MAX_GROWTH = 48 << 20  # bytes, of the gateway
GREEDY = SamplingParams(max_tokens=8)


class Engine(NamedTuple):
    pipeline: Pipeline
    folder: Path
    key_file: str


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine that requires keys."""
    folder = tmp_path_factory.mktemp("keys")
    settings, key_file = endpoint_settings(folder)
    assert key_file is not None
    with Pipeline(TINY_CONFIG, settings) as pipeline:
        yield Engine(pipeline, folder, key_file)


def check(report: Report, num_frames: int) -> None:
    assert report.sent.num_frames >= num_frames
    assert report.sent.num_unanswered == 0
    assert report.ended == []
    assert report.faults == []
    assert report.num_good > 8
    assert report.strangers_key is None
    before, most, after = report.gateway_bytes
    assert max(most, after) - before < MAX_GROWTH


def test_clients_with_keys_http_and_the_own_client_get_the_same_answer(engine: Engine) -> None:
    pipeline = engine.pipeline
    expected = pipeline.client.generate("A class", GREEDY).text
    with Client(pipeline.endpoint, key_file=engine.key_file) as client:
        assert client.generate("A class", GREEDY).text == expected
        with pickle.loads(pickle.dumps(client)) as copy:
            assert copy.generate("A class", GREEDY).text == expected
    body = json.dumps({"prompt": "A class", "max_tokens": 8, "temperature": 0}).encode()
    request = urllib.request.Request(f"{pipeline.http_url}/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["choices"][0]["text"] == expected


def test_a_client_learns_why_its_key_does_not_work_and_is_served_once_it_does(engine: Engine) -> None:
    endpoint, folder = engine.pipeline.endpoint, engine.folder
    with (
        Client(endpoint, timeout_s=1.0) as stranger,
        pytest.raises(EngineUnavailable, match="it may use keys: give key_"),
    ):
        stranger.health()
    late = _make_client(folder, "late", read_secret_file(folder / "server.key_secret"))
    (folder / "clients" / "late.key").rename(folder / "late.key")
    with Client(endpoint, timeout_s=30.0, key_file=late) as client:
        with (
            Client(endpoint, timeout_s=1.0, key_file=late) as hasty,
            pytest.raises(EngineUnavailable, match=r"it refuses the key of .*late.key_secret: add the client's NAME"),
        ):
            hasty.health()
        (folder / "late.key").rename(folder / "clients" / "late.key")
        assert client.health().state == "ready"


def test_hostile_frames_with_keys_harm_no_good_request(engine: Engine) -> None:
    check(asyncio.run(Run(engine.pipeline, engine.key_file).frames(4_000, 3)), 4_000)


def test_hostile_frames_without_keys_harm_no_good_request() -> None:
    settings, _ = endpoint_settings(None)
    with Pipeline(TINY_CONFIG, settings) as pipeline:
        check(asyncio.run(Run(pipeline).frames(20_000, 4)), 20_000)
