"""`/tokenize` and `/detokenize`, with an engine that takes each byte for a token."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.pipeline.http.application import app_of, ask
from tests.unit.pipeline.http.fake_engine import FakeEngine


def test_a_prompt_has_its_tokens_and_their_texts_if_asked() -> None:
    engine = FakeEngine()
    app = app_of(engine)
    plain = ask(app, "/tokenize", {"model": "m", "prompt": "abc"}).json()
    assert plain == {"count": 3, "max_model_len": 64, "tokens": [97, 98, 99], "token_strs": None}
    full = ask(app, "/tokenize", {"prompt": "abc", "add_special_tokens": False, "return_token_strs": True}).json()
    assert full["token_strs"] == ["a", "b", "c"]
    assert engine.tokenized == [("abc", True), ("abc", False)]


def test_an_answer_has_as_many_tokens_as_a_body_may_have_values() -> None:
    answer = ask(app_of(FakeEngine()), "/tokenize", {"prompt": "a" * 524_289})
    assert answer.status_code == 400
    assert "has 524,289 tokens, and an answer holds at most 524,288: send the prompt in parts" in answer.text


def test_messages_are_rendered_as_a_chat_completion_renders_them() -> None:
    engine = FakeEngine()
    tool = {"type": "function", "function": {"name": "now"}}
    body = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "So"}],
        "continue_final_message": True,
        "chat_template_kwargs": {"enable_thinking": False},
        "tools": [tool],
    }
    assert ask(app_of(engine), "/tokenize", body).json()["count"] == 4
    [(chat, _)] = engine.tokenized
    assert (chat.continue_final_message, chat.chat_template_kwargs) == (True, {"enable_thinking": False})
    assert chat.tools == [tool]


def test_tokens_become_text_again() -> None:
    answer = ask(app_of(FakeEngine()), "/detokenize", {"model": "m", "tokens": [104, 105]})
    assert answer.json() == {"prompt": "hi"}


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/tokenize", {}, "prompt", "neither is given"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt", "both are given"),
        ("/tokenize", {"prompt": "a", "tools": [{}]}, "tools", "for messages"),
        ("/tokenize", {"messages": [{}], "add_special_tokens": True}, "add_special_tokens", "leave it out"),
        ("/tokenize", {"promt": "a"}, "promt", "did you mean prompt?"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]", "expected `int`"),
    ],
)
def test_a_wrong_request_names_its_field(path: str, body: dict[str, Any], param: str, words: str) -> None:
    answer = ask(app_of(FakeEngine()), path, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert words in error["message"]


def test_keys_guard_both_and_other_models_are_not_found() -> None:
    app = app_of(FakeEngine(), keys=["k"])
    for path, body in (("/tokenize", {"prompt": "a", "model": "x"}), ("/detokenize", {"tokens": [], "model": "x"})):
        assert ask(app, path, body).status_code == 401
        assert ask(app, path, body, {"authorization": "Bearer k"}).status_code == 404
