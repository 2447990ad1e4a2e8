"""The rows of log-probabilities of `/v1/completions`."""

from __future__ import annotations

from pipeline.client.outputs import TokenLogprob
from pipeline.http.openai.completion_logprobs import LogprobWriter, joined

SPLIT = {1: b"a", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: b"b"}


def row(token_id: int, top: dict[int, float] | None = None, requested: dict[int, float] | None = None) -> TokenLogprob:
    return TokenLogprob(token_id, -1.0, top or {}, requested or {}, SPLIT)


def test_offsets_point_into_the_text_where_a_character_has_two_tokens() -> None:
    writer = LogprobWriter(0, as_ids=False)
    first, second = writer.write([row(1), row(2)]), writer.write([row(3), row(4)])
    assert first["text_offset"] + second["text_offset"] == [0, 1, 1, 2]
    assert first["tokens"] + second["tokens"] == ["a", "\ufffd", "\ufffd", "b"]
    whole = joined(first, second)
    assert whole is not None
    assert whole["text_offset"] == [0, 1, 1, 2]


def test_the_sampled_token_and_the_requested_ones_are_among_the_likeliest() -> None:
    written = LogprobWriter(1, as_ids=False).write([row(4, top={1: -0.5, 3: -0.7}, requested={3: -0.7, 4: -1.0})])
    assert written["top_logprobs"] == [{"b": -1.0, "a": -0.5, "\ufffd": -0.7}]
    assert LogprobWriter(0, as_ids=False).write([row(4, top={1: -0.5})])["top_logprobs"] == [{"b": -1.0}]


def test_the_likelier_of_two_tokens_with_the_same_text_counts() -> None:
    (top,) = LogprobWriter(2, as_ids=False).write([row(1, top={2: -0.1, 3: -0.2})])["top_logprobs"]
    assert top == {"a": -1.0, "\ufffd": -0.1}


def test_tokens_can_be_written_as_their_ids() -> None:
    written = LogprobWriter(2, as_ids=True).write([None, row(3, top={2: -0.1})], row(1))
    assert written["tokens"] == ["token_id:1", "token_id:3"]
    assert written["top_logprobs"] == [None, {"token_id:3": -1.0, "token_id:2": -0.1}]
    assert written["text_offset"] == [0, 1]


def test_a_token_that_cannot_be_sampled_has_a_finite_log_probability() -> None:
    impossible = TokenLogprob(1, float("-inf"), {}, {}, SPLIT)
    assert LogprobWriter(0, as_ids=False).write([impossible])["token_logprobs"] == [-9999.0]
