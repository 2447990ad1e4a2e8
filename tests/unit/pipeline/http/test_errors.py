"""The words of errors that clients look for."""

from __future__ import annotations

import pytest

from ipc.errors import InvalidRequest
from pipeline.http.errors import anthropic_body, http_error, openai_body

PROMPT = "the prompt (9 tokens) leaves no room for a new token in the longest sequence of this engine (8 tokens)"
BOTH = "the prompt (5 tokens) and max_tokens (4) exceed the longest sequence of this engine (8 tokens)"


@pytest.mark.parametrize(
    ("message", "phrase"),
    [(PROMPT, "prompt is too long: "), (BOTH, "input length and `max_tokens` exceed context limit: ")],
)
def test_clients_recognize_a_sequence_that_is_too_long_by_the_phrases_of_their_api(message: str, phrase: str) -> None:
    error = http_error(InvalidRequest(message))
    assert error is not None
    openais = openai_body(error)["error"]
    assert openais["code"] == "context_length_exceeded"
    assert openais["message"].startswith("this model's maximum context length is exceeded: ")
    anthropics = anthropic_body(error)["error"]["message"]
    assert anthropics.startswith(phrase)
    assert openais["message"].endswith(message)
    assert anthropics.endswith(message)


def test_other_errors_keep_their_words() -> None:
    error = http_error(InvalidRequest("top_k (-3) must be at least -1"))
    assert error is not None
    assert openai_body(error)["error"]["message"] == anthropic_body(error)["error"]["message"] == error.message
