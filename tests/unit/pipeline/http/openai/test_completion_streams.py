"""`/v1/completions` as a stream, and the engine's parameters that follow from a body."""

from __future__ import annotations

from typing import Any

import pytest

from ipc.errors import EngineUnavailable
from pipeline.http.generation.defaults import SamplingDefaults
from tests.unit.pipeline.http.application import app_of, ask, stream_of
from tests.unit.pipeline.http.fake_engine import BOS, FakeEngine

PATH = "/v1/completions"
SCHEMA = {"type": "object"}
OBJECT = '{"type":"object"}'


def streamed(engine: FakeEngine, **body: Any) -> list[dict[str, Any]]:
    return stream_of(app_of(engine), PATH, {"prompt": "ab", **body})


def joined_choices(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The choices that the chunks make up: texts and lists put together, everything else from the last chunk."""
    found: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        whole = found.setdefault(choice["index"], {})
        for name, value in choice.items():
            if isinstance(value, str | list) and name in ("text", "token_ids"):
                whole[name] = whole.get(name, type(value)()) + value
            elif name == "logprobs" and value is not None and whole.get(name) is not None:
                whole[name] = {key: whole[name][key] + rows for key, rows in value.items()}
            elif value is not None or name not in whole:
                whole[name] = value
    return found


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "ab"},
        {"prompt": ["ab", "cd"], "n": 2},
        {"prompt": "ab", "echo": True, "logprobs": 2, "n": 2},
        {"prompt": ["ab", [99, 100]], "echo": True},
        {"prompt": "ab", "logprobs": 1, "return_token_ids": True},
        {"prompt": "ab", "echo": True, "logprob_token_ids": [65]},
        {"prompt": "ab", "max_tokens": 0, "echo": True, "logprobs": 1, "return_token_ids": True},
    ],
)
def test_a_stream_makes_up_the_whole_answer(body: dict[str, Any]) -> None:
    engine = FakeEngine(["Hé", "", "llo", " you"], begins_with=[BOS])
    engine.stop_reason = "END"
    whole = ask(app_of(engine), PATH, body).json()
    chunks = stream_of(app_of(engine), PATH, {**body, "stream_options": {"include_usage": True}})
    found = joined_choices(chunks)
    assert [found[i] for i in sorted(found)] == whole["choices"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_each_output_of_the_engine_is_one_event_without_usage_unless_asked_for() -> None:
    chunks = streamed(FakeEngine(["a", '"\n\u2028', "c"]))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", '"\n\u2028', "c"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert not any("usage" in chunk for chunk in chunks)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_continuous_usage_counts_prompt_and_output_from_the_first_chunk_on() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = streamed(FakeEngine(["a", "bc", "d"]), stream_options=options)
    usages = [(chunk["usage"]["prompt_tokens"], chunk["usage"]["completion_tokens"]) for chunk in chunks]
    assert usages == [(2, 1), (2, 3), (2, 4), (2, 4)]
    scored = streamed(FakeEngine(["a"]), stream_options=options, echo=True, max_tokens=0)
    assert [chunk["usage"]["completion_tokens"] for chunk in scored] == [0, 0]


def test_an_error_after_the_first_event_ends_the_stream_and_cancels_the_other_prompts() -> None:
    engine = FakeEngine(["a", EngineUnavailable("the engine is gone")])
    engine.waiting = {"w"}
    answer = ask(app_of(engine), PATH, {"prompt": ["ab", "w"], "stream": True})
    assert answer.status_code == 200
    first, error, done, rest = answer.text.split("\n\n")
    assert '"text":"a"' in first
    assert "the engine is gone" in error
    assert (done, rest) == ("data: [DONE]", "")
    assert "w" in engine.cancelled


@pytest.mark.parametrize("stream", [False, True])
def test_time_that_runs_out_is_an_error_only_without_output(stream: bool) -> None:
    engine = FakeEngine([""])
    for reason in ("deadline", "queue_timeout"):
        engine.finish_reason = reason
        answer = ask(app_of(engine), PATH, {"prompt": "ab", "stream": stream})
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, reason)
    engine.finish_reason, engine.pieces = "deadline", ["a"]
    choice = (
        joined_choices(streamed(engine))[0]
        if stream
        else ask(app_of(engine), PATH, {"prompt": "ab"}).json()["choices"][0]
    )
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("a", "length", "deadline")


def test_the_id_of_an_answer_holds_the_request_id_of_the_body_and_the_engine_gets_one_of_its_own() -> None:
    engine = FakeEngine(["a"])
    app = app_of(engine)
    for _ in range(2):
        assert ask(app, PATH, {"prompt": ["a", "b"], "request_id": "mine"}).json()["id"] == "cmpl-mine"
    assert len({options["request_id"] for options in engine.options}) == 4


def test_every_sampling_field_reaches_the_engine() -> None:
    engine = FakeEngine(["a"])
    fields: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.2,
        "frequency_penalty": 0.3, "allowed_token_ids": [1, 2], "bad_words": ["x"], "min_tokens": 2, "max_tokens": 9,
        "thinking_token_budget": 5, "seed": 3, "include_stop_str_in_output": True, "stop_token_ids": [4],
        "skip_special_tokens": False, "spaces_between_special_tokens": False, "truncate_prompt_tokens": 6,
        "logprob_token_ids": [8], "prompt_logprobs": 1, "logprobs": 2, "logprobs_mode": "processed_logprobs",
        "n": 2,
    }  # fmt: skip
    body = {"prompt": "ab", **fields, "stop": "END", "logit_bias": {"65": -1}, "user": "u"}
    assert ask(app_of(engine), PATH, body).status_code == 200
    (params,) = engine.params
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.stop, params.logit_bias) == (["END"], {65: -1})


def test_values_left_out_are_the_models_then_those_of_openai() -> None:
    engine = FakeEngine(["a"])
    app = app_of(engine)
    ask(app, PATH, {"prompt": "ab"})
    assert (engine.params[-1].temperature, engine.params[-1].max_tokens) == (1.0, 16)
    app.state.service.defaults = SamplingDefaults({"temperature": 0.6, "top_k": 20, "max_tokens": 50})
    ask(app, PATH, {"prompt": "ab", "top_k": 3})
    assert (engine.params[-1].temperature, engine.params[-1].top_k) == (0.6, 3)


def test_a_priority_without_effect_is_refused_with_the_number_of_the_request() -> None:
    app = app_of(FakeEngine(["a"]))
    app.state.service.takes_priority = False
    answer = ask(app, PATH, {"prompt": "ab", "priority": 1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority")
    assert answer.json()["error"]["message"].startswith("priority (1) has no effect")
    assert ask(app, PATH, {"prompt": "ab", "priority": 0}).status_code == 200


@pytest.mark.parametrize("path", [PATH, "/v1/chat/completions", "/v1/responses"])
def test_stream_options_need_a_stream(path: str) -> None:
    prompt = {PATH: "prompt", "/v1/responses": "input"}.get(path)
    body = {prompt: "ab"} if prompt else {"messages": [{"role": "user", "content": "ab"}]}
    for stream in ({}, {"stream": False}):
        answer = ask(
            app_of(FakeEngine(["a"])), path, {**body, **stream, "stream_options": {"include_obfuscation": True}}
        )
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stream_options")


@pytest.mark.parametrize(("given", "engines"), [(5, -5), (-5, 5), (10**6, -1_000), (-(10**6), 1_000), (None, 0)])
def test_a_lower_priority_is_scheduled_earlier_as_in_vllm(given: int | None, engines: int) -> None:
    engine = FakeEngine(["a"])
    ask(app_of(engine), PATH, {"prompt": "ab", "priority": given})
    assert engine.options[-1]["scheduling"].priority == engines


def test_the_tenant_of_the_body_wins_over_that_of_the_header() -> None:
    engine = FakeEngine(["a"])
    body = {"prompt": "ab", "deadline_s": 3, "queue_timeout_s": 1.5, "cache_salt": "s"}
    ask(app_of(engine), PATH, body, headers={"X-Tenant": "head"})
    scheduling = engine.options[-1]["scheduling"]
    assert (scheduling.tenant, scheduling.deadline_s, scheduling.queue_timeout_s) == ("head", 3, 1.5)
    assert engine.options[-1]["cache_salt"] == "s"
    ask(app_of(engine), PATH, {**body, "tenant": "own"}, headers={"X-Tenant": "head"})
    assert engine.options[-1]["scheduling"].tenant == "own"


@pytest.mark.parametrize(
    ("body", "name", "value"),
    [
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", ["a", "b"]),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["a"]}, "choice", ["a"]),
        ({"guided_json": SCHEMA}, "json", OBJECT),
        ({"guided_grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}, "json", OBJECT),
    ],
)
def test_a_grammar_has_the_names_of_vllm_and_of_openai(body: dict[str, Any], name: str, value: Any) -> None:
    engine = FakeEngine(["a"])
    answer = ask(app_of(engine), PATH, {"prompt": "ab", **body})
    assert answer.status_code == 200, answer.text
    assert getattr(engine.params[-1].structured_outputs, name) == value
