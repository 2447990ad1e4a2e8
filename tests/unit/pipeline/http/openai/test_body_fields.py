"""Every field of a body has an effect or an error: none is read into a struct and forgotten."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from pipeline.client.outputs import TokenLogprob
from pipeline.http.openai import chat_completions, completions
from pipeline.http.openai.wire import StreamOptions, chat_logprobs
from tests.unit.pipeline.http.application import app_of, ask
from tests.unit.pipeline.http.fake_engine import CACHED_TOKENS, FakeEngine

PATHS = {chat_completions: "/v1/chat/completions", completions: "/v1/completions"}
PROMPTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 8},
}
WITHOUT_EFFECT = {"include_obfuscation"}


class Watched:
    """A struct, and the names of its fields that somebody has read."""

    def __init__(self, values: msgspec.Struct, read: set[str]) -> None:
        self._values, self._read = values, read

    def __getattr__(self, name: str) -> Any:
        self._read.add(name)
        value = getattr(self._values, name)
        return Watched(value, self._read) if isinstance(value, StreamOptions) else value


def chunks_of(answer: Any) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("module", PATHS)
def test_every_field_of_a_body_is_read(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read_body, read = module.read_body, set[str]()
    kinds: set[type[msgspec.Struct]] = {StreamOptions}

    def watched(body: bytes, kind: type[msgspec.Struct], **options: Any) -> Watched:
        kinds.add(kind)
        return Watched(read_body(body, kind, **options), read)

    monkeypatch.setattr(module, "read_body", watched)
    for streams in (False, True):
        options = {"stream_options": {"include_usage": True}} if streams else {}
        path = PATHS[module]
        assert ask(app_of(FakeEngine()), path, {**PROMPTS[path], "stream": streams, **options}).status_code == 200
    fields = {field.name for kind in kinds for field in msgspec.structs.fields(kind)}
    assert fields - read == WITHOUT_EFFECT


@pytest.mark.parametrize("path", PROMPTS)
def test_the_usage_so_far_counts_the_prompt_and_the_tokens_up_to_each_chunk(path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**PROMPTS[path], "stream": True, "stream_options": options}
    chunks = chunks_of(ask(app_of(FakeEngine(["a", "b", "c"])), path, body))
    usages = [chunk["usage"] for chunk in chunks if chunk["choices"] and chunk["choices"][0].get("text") != ""]
    assert [usage["completion_tokens"] for usage in usages][-3:] == [1, 2, 3]
    assert {usage["prompt_tokens"] for usage in usages} == {2}
    assert usages[0]["prompt_tokens_details"] == {"cached_tokens": CACHED_TOKENS}
    assert usages[-1] == chunks[-1]["usage"]


@pytest.mark.parametrize("path", PROMPTS)
@pytest.mark.parametrize("streams", [False, True])
def test_a_request_id_of_the_body_is_part_of_the_answers_id(path: str, streams: bool) -> None:
    body = {**PROMPTS[path], "request_id": "mine", "stream": streams}
    answer = ask(app_of(FakeEngine()), path, body)
    value = chunks_of(answer)[0] if streams else answer.json()
    assert value["id"] == ("chatcmpl-mine" if "chat" in path else "cmpl-mine")
    assert ask(app_of(FakeEngine()), path, {**body, "request_id": "x" * 257}).json()["error"]["param"] == "request_id"


@pytest.mark.parametrize("path", PROMPTS)
def test_prompt_logprobs_are_refused_in_a_stream(path: str) -> None:
    answer = ask(app_of(FakeEngine()), path, {**PROMPTS[path], "prompt_logprobs": 1, "stream": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt_logprobs"


def test_tokens_are_named_by_their_ids_on_request() -> None:
    row = TokenLogprob(token_id=7, logprob=-1.0, top={3: -0.5}, token_bytes={7: b"a", 3: b"b"})
    [token] = chat_logprobs([row], as_ids=True)["content"]
    assert (token["token"], token["bytes"], token["top_logprobs"][0]["token"]) == ("token_id:7", [97], "token_id:3")
    assert chat_logprobs([row])["content"][0]["token"] == "a"
