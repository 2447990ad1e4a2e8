"""Every API says which stop string ended a sample."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.pipeline.http.application import app_of, ask
from tests.unit.pipeline.http.fake_engine import FakeEngine


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
    ],
)
def test_a_choice_names_the_stop_string_that_ended_it(path: str, prompt: dict[str, Any]) -> None:
    engine = FakeEngine()
    engine.stop_reason = "END"
    [choice] = ask(app_of(engine), path, prompt | {"stop": ["x", "END"]}).json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "END")
    engine.stop_reason = None
    [choice] = ask(app_of(engine), path, prompt).json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
