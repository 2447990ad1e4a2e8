"""`/v1/completions`: prompts in every form, and what answers repeat of them."""

from __future__ import annotations

from typing import Any

import pytest

from ipc.errors import InvalidRequest, QueueFull
from tests.unit.pipeline.http.application import app_of, ask
from tests.unit.pipeline.http.fake_engine import BOS, FakeEngine

PATH = "/v1/completions"


def answered(engine: FakeEngine, **body: Any) -> Any:
    answer = ask(app_of(engine), PATH, body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(engine: FakeEngine, **body: Any) -> dict[str, Any]:
    """The error of a request that the engine never gets."""
    answer = ask(app_of(engine), PATH, body)
    assert answer.status_code == 400, answer.text
    assert not engine.params
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["abx"]),
        ([97, 98], ["abx"]),
        (["ab", "cd"], ["abx", "cdx"]),
        ([[97, 98], [99, 100]], ["abx", "cdx"]),
        (["ab", [99, 100]], ["abx", "cdx"]),
    ],
)
def test_a_prompt_is_a_text_or_token_ids_or_a_list_of_these(prompt: Any, texts: list[str]) -> None:
    answer = answered(FakeEngine(["x"]), prompt=prompt, echo=True)
    assert [choice["text"] for choice in answer["choices"]] == texts


def test_choices_count_the_samples_of_the_first_prompt_first() -> None:
    answer = answered(FakeEngine(["x"]), prompt=["a", "b"], n=2, echo=True, best_of=2)
    assert [(each["index"], each["text"]) for each in answer["choices"]] == [
        (0, "ax"),
        (1, "a1x"),
        (2, "bx"),
        (3, "b1x"),
    ]
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


@pytest.mark.parametrize(
    ("error", "status"), [(InvalidRequest("top_p (3) must lie in (0, 1]"), 400), (QueueFull("full", 2.0), 429)]
)
def test_a_failure_of_one_prompt_fails_the_request_and_cancels_the_others(error: Exception, status: int) -> None:
    engine = FakeEngine()
    engine.failing, engine.waiting = {"b": error}, {"a", "c"}
    assert ask(app_of(engine), PATH, {"prompt": ["a", "b", "c"]}).status_code == status
    assert sorted(engine.cancelled) == ["a", "c"]
    engine.cancelled.clear()
    assert ask(app_of(engine), PATH, {"prompt": ["a", "b", "c"], "stream": True}).status_code == status
    assert sorted(engine.cancelled) == ["a", "c"]


def test_a_prompt_is_scored_without_generating() -> None:
    engine = FakeEngine(["never shown"])
    answer = answered(engine, prompt="AxB", max_tokens=0, echo=True, logprobs=2, return_token_ids=True)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == ("AxB", "length", [])
    assert choice["logprobs"]["tokens"] == ["A", "x", "B"]
    assert choice["logprobs"]["token_logprobs"] == [None, -120 / 128, -66 / 128]
    tops = [None if top is None else list(top) for top in choice["logprobs"]["top_logprobs"]]
    assert tops == [None, ["x", "A", "B"], ["B", "A"]]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 0
    assert engine.params[-1].max_tokens == 1


def test_offsets_pass_over_the_special_tokens_that_the_text_does_not_show() -> None:
    engine = FakeEngine(["z"], begins_with=[BOS])
    (choice,) = answered(engine, prompt="ab", echo=True, logprobs=0)["choices"]
    assert choice["text"] == "abz"
    assert choice["logprobs"]["tokens"] == ["<s>", "a", "b", "z"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2]


def test_the_special_tokens_of_a_text_can_be_left_out() -> None:
    engine = FakeEngine(begins_with=[BOS])
    answer = answered(engine, prompt="ab", add_special_tokens=False)
    assert engine.chats == [[97, 98]]
    assert answer["usage"]["prompt_tokens"] == 2
    answered(engine, prompt="ab", add_special_tokens=True)
    assert engine.chats[-1] == "ab"


def test_token_ids_come_with_prompt_and_output() -> None:
    engine = FakeEngine(["xy"], begins_with=[BOS])
    (choice,) = answered(engine, prompt="ab", return_token_ids=True)["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([BOS, 97, 98], [120, 121])
    assert engine.chats == [[BOS, 97, 98]]
    (plain,) = answered(engine, prompt="ab")["choices"]
    assert not plain.keys() & {"prompt_token_ids", "token_ids"}


@pytest.mark.parametrize(
    ("prompt", "kept", "ids", "text"),
    [
        ("abcdef", 3, [BOS, 101, 102], "<s>ef"),
        ("abcdef", 1, [102], "f"),
        ("ab", 3, [BOS, 97, 98], "ab"),
        ([97, 98, 99], 2, [98, 99], "bc"),
        ("a" * 80, -1, [BOS] + [97] * 47, "<s>" + "a" * 47),
    ],
)
def test_a_shortened_prompt_is_repeated_as_the_engine_gets_it(
    prompt: Any, kept: int, ids: list[int], text: str
) -> None:
    engine = FakeEngine(["!"], begins_with=[BOS])
    answer = answered(engine, prompt=prompt, truncate_prompt_tokens=kept, echo=True, logprobs=0, return_token_ids=True)
    (choice,) = answer["choices"]
    assert engine.chats == [ids] == [choice["prompt_token_ids"]]
    assert choice["text"] == text + "!"
    assert len(choice["logprobs"]["tokens"]) == len(ids) + 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a", []]}, "prompt"),
        ({"prompt": ["a"] * 1_025}, "prompt"),
        ({"prompt": "", "echo": True, "logprobs": 0}, None),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "temperature": 2.1}, "temperature"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt": "a", "top_kk": 1}, "top_kk"),
        ({"prompt": "a", "guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"prompt": "a", "tenant": "t" * 257}, "tenant"),
        ({}, None),
    ],
)
def test_a_body_that_cannot_be_honoured_is_refused_by_field(body: dict[str, Any], param: str | None) -> None:
    error = refused(FakeEngine(), **body)
    assert error["param"] == param
    assert "\n" not in error["message"]
