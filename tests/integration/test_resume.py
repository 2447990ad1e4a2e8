"""Interrupted requests: an engine that is told what a client has received gives exactly the rest.

Every request runs whole. Then it is sent again with what had arrived at some moments of that, and must give the same
text, tokens, log-probabilities, usage and ends from there on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pytest
import zmq

from ipc.channels import connect_dealer
from ipc.codec import decode, encode
from ipc.messages import Delivered, FinalOutput, GatewayToClient, Generate, Outputs, Refused, Resume, ResumedSample
from ipc.sampling_params import MAX_SEED
from pipeline import Pipeline, SamplingParams, StructuredOutputs
from tests.integration.test_every_parameter import MAX_TOKENS, Served, asked
from tests.integration.test_token_equality import config

pytestmark = pytest.mark.slow

DEADLINE_S: Final = 120.0
SCHEMA: Final = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "今天"]}}}


@dataclass
class Item:
    """One sample's part of an `Outputs` message."""

    sample: int
    text: str
    token_ids: list[int]
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    final: FinalOutput | None = None


class RawClient:
    """Speaks the protocol itself, and keeps each request's items in order of arrival."""

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = connect_dealer(self._context, endpoint)

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()

    def run(self, requests: list[Generate]) -> dict[str, list[Item]]:
        """Send the requests together and wait for their ends."""
        for request in requests:
            self._socket.send(encode(request))
        items: dict[str, list[Item]] = {request.request_id: [] for request in requests}
        num_open, deadline = len(requests), time.monotonic() + DEADLINE_S
        while num_open:
            assert self._socket.poll(round(1e3 * max(0.0, deadline - time.monotonic()))), f"{num_open} never ended"
            message = decode(self._socket.recv(), GatewayToClient)
            assert not isinstance(message, Refused), message
            if isinstance(message, Outputs):
                self._socket.send(encode(Delivered(count=1)))
                num_open -= _take(message, items)
        return items


def _take(outputs: Outputs, items: dict[str, list[Item]]) -> int:
    """Add the items of a message to their requests. Returns how many requests end with it."""
    tokens = np.frombuffer(outputs.token_ids, "<i4").tolist()
    counts = np.frombuffer(outputs.num_token_ids, "<i4").tolist()
    samples = np.frombuffer(outputs.samples, "<i4").tolist() or [0] * len(counts)
    new = []
    for sample, text, count in zip(samples, outputs.texts, counts, strict=True):
        new.append(Item(sample, text, tokens[:count]))
        tokens = tokens[count:]
    for index, columns in outputs.logprobs:
        new[index].logprobs = np.frombuffer(columns.logprobs, "<f4").tolist()
    for index, part in outputs.prompt_logprobs:
        new[index].prompt_logprobs += np.frombuffer(part.columns.logprobs, "<f4").tolist()
    for index, final in outputs.finals:
        new[index].final = final
    for request_id, item in zip(outputs.request_ids, new, strict=True):
        items[request_id].append(item)
    return sum(final.num_open == 0 for _, final in outputs.finals)


@dataclass
class Received:
    """What a client has of one sample."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    final: FinalOutput | None = None


def received(items: list[Item], num_samples: int) -> list[Received]:
    samples = [Received() for _ in range(num_samples)]
    for item in items:
        sample = samples[item.sample]
        assert sample.final is None, "news after the end of a sample"
        sample.text += item.text
        sample.token_ids += item.token_ids
        sample.logprobs += item.logprobs
        sample.prompt_logprobs += item.prompt_logprobs
        sample.final = item.final
    return samples


def resume_behind(samples: list[Received]) -> Resume:
    return Resume(
        samples=[
            ResumedSample(
                token_ids=np.array(sample.token_ids, "<i4").tobytes(), num_chars=len(sample.text),
                has_ended=sample.final is not None,
            )
            for sample in samples
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served.make(tmp_path_factory.mktemp("resumed"))


@pytest.fixture(scope="module")
def engine(served: Served) -> Iterator[Pipeline]:
    """Small enough that resumed requests queue, are computed in chunks, and are preempted."""
    with Pipeline(config(served.folder, **{"frontend.max_open_requests": 2_000})) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def client(engine: Pipeline) -> Iterator[RawClient]:
    raw = RawClient(engine.endpoint)
    yield raw
    raw.close()


def requests_of(served: Served, engine: Pipeline) -> list[Generate]:
    """Every row of the parameters' table, greedy and sampled, and what the table does not have."""
    rows = asked(served)
    prompt = rows[0][1]
    sampled = {"temperature": 1.0, "seed": 11, "max_tokens": MAX_TOKENS}
    text = engine.client.generate(prompt, SamplingParams(**sampled)).text
    stops = [text[at : at + size] for at in (5, 9) for size in (1, 3) if text[at : at + size]]
    thinking = [*prompt, served.id("<think>")]
    others: list[tuple[str, list[int], dict[str, Any]]] = [
        ("n = 3", prompt, {"n": 3}),
        ("n = 3 of different lengths", prompt, {
            "n": 3, "stop_token_ids": list(range(5, 21)), "logit_bias": dict.fromkeys(range(5, 21), 1.0),
        }),
        ("n = 3 with a stop string", prompt, {"n": 3, "stop": [stops[0]], "logprobs": 1}),
        *((f"stop {stop!r}", prompt, {"stop": [stop, "\N{REPLACEMENT CHARACTER}" * 3]}) for stop in stops),
        ("stop included", prompt, {"stop": stops[-1:], "include_stop_str_in_output": True}),
        ("stop not before min_tokens", prompt, {"stop": stops, "min_tokens": 9}),
        ("long stop that never comes", prompt, {"stop": [text + "x"]}),
        ("special tokens", prompt, {"skip_special_tokens": False, "logit_bias": {served.id("</think>"): 6.0}}),
        ("hidden special tokens in a stop string", prompt, {
            "stop": ["</think>"], "logit_bias": {served.id("</think>"): 6.0}, "include_stop_str_in_output": True,
        }),
        ("logprobs", prompt, {"logprobs": 2, "logprob_token_ids": [7, 9]}),
        ("processed logprobs", prompt, {"logprobs": 0, "logprobs_mode": "processed_logprobs", "top_k": 9}),
        ("prompt logprobs", prompt, {"prompt_logprobs": 1, "n": 2}),
        ("json", prompt, {"structured_outputs": StructuredOutputs(json=SCHEMA), "max_tokens": 40}),
        ("regex, n = 3", prompt, {"structured_outputs": StructuredOutputs(regex="(今天|[a-c ]+🙂){2,4}"), "n": 3}),
        ("a grammar behind a reasoning", thinking, {
            "structured_outputs": StructuredOutputs(choice=["a fox", "the dog"], after_reasoning=["</think>"]),
            "thinking_token_budget": 6, "max_tokens": 30,
        }),
    ]  # fmt: skip
    rows += [(name, ids, SamplingParams(**{**sampled, **values})) for name, ids, values in others]
    return [
        Generate(
            request_id=f"{i} {name}", params=params.with_seed(params.seed or i), stream=True,
            token_ids=np.array(ids, "<i4").tobytes(),
        )
        for i, (name, ids, params) in enumerate(rows)
    ]  # fmt: skip


def test_from_any_moment_on_the_rest_of_every_answer_is_the_same(
    served: Served, engine: Pipeline, client: RawClient
) -> None:
    requests = requests_of(served, engine)
    whole = client.run(requests)
    again, cuts = [], {}
    for request in requests:
        items = whole[request.request_id]
        for num_items in sorted({1, len(items) // 3, 2 * len(items) // 3, len(items) - 1} - {0}):
            cut = f"{request.request_id}, {num_items} of {len(items)} items"
            before = received(items[:num_items], request.params.n)
            if all(sample.final for sample in before):
                continue
            cuts[cut] = request, before
            fields = {name: getattr(request, name) for name in ("params", "token_ids", "stream")}
            again.append(Generate(request_id=cut, resume=resume_behind(before), **fields))
    assert len(again) > 2 * len(requests)
    ended = [before for _, before in cuts.values() if any(sample.final for sample in before)]
    assert ended, "no sample had ended at any moment"
    engine.client.clear_cache()
    before_resumed = engine.client.stats()["scheduler"]
    rest = client.run(again)
    after = engine.client.stats()["scheduler"]
    num_whole = num_rest = 0
    for cut, (request, before) in cuts.items():
        expected = received(whole[request.request_id], request.params.n)
        for sample, (has, gets, of_whole) in enumerate(
            zip(before, received(rest[cut], request.params.n), expected, strict=True)
        ):
            if has.final is not None:
                assert gets == Received(), (cut, sample)
                continue
            assert has.text + gets.text == of_whole.text, (cut, sample)
            assert has.token_ids + gets.token_ids == of_whole.token_ids, (cut, sample)
            assert has.logprobs + gets.logprobs == pytest.approx(of_whole.logprobs, abs=1e-4), (cut, sample)
            assert gets.prompt_logprobs == pytest.approx(of_whole.prompt_logprobs, abs=1e-4), (cut, sample)
            assert end_of(gets) == end_of(of_whole), (cut, sample)
            num_whole += len(of_whole.token_ids)
            num_rest += len(gets.token_ids)
        num_open = [item.final.num_open for item in rest[cut] if item.final is not None]
        assert num_open == list(range(sum(sample.final is None for sample in before)))[::-1], cut
    num_sampled = after["num_sampled_tokens"] - before_resumed["num_sampled_tokens"]
    assert num_rest <= num_sampled < num_whole, "tokens that the clients have were sampled again"
    assert after["num_preemptions"] > before_resumed["num_preemptions"], "the limits were meant to force preemption"


def end_of(sample: Received) -> tuple[Any, ...]:
    final = sample.final
    assert final is not None
    counts = final.num_prompt_tokens, final.num_completion_tokens
    return final.finish_reason, counts, final.error_code, final.stop_string


def test_a_client_that_claims_tokens_that_the_grammar_or_the_model_does_not_have_gets_an_error(
    served: Served, client: RawClient
) -> None:
    spec = StructuredOutputs(choice=["the dog"])
    has = [Received(token_ids=served.tokenizer.encode("cat", add_special_tokens=False).ids), Received()]
    outside = [Received(token_ids=[served.tokenizer.get_vocab_size() + MAX_TOKENS])]
    params = SamplingParams(max_tokens=MAX_TOKENS, seed=MAX_SEED, structured_outputs=spec, n=2)
    ids = np.array([5, 6, 7], "<i4").tobytes()
    wrong = Generate(request_id="w", params=params, token_ids=ids, stream=True, resume=resume_behind(has))
    plain = SamplingParams(max_tokens=MAX_TOKENS, seed=1)
    unknown = Generate(request_id="u", params=plain, token_ids=ids, stream=True, resume=resume_behind(outside))
    items = client.run([wrong, unknown])
    failed, other = received(items["w"], 2)
    assert failed.final is not None
    assert (failed.final.finish_reason, failed.final.error_code) == ("error", "request_failed")
    assert "does not fit the grammar" in failed.final.error_message
    assert (other.text, other.final.finish_reason if other.final else "") == ("the dog", "stop")
    [failed] = received(items["u"], 1)
    assert failed.final is not None
    assert failed.final.error_code == "invalid_request"
    assert "resume.samples[0].token_ids holds" in failed.final.error_message
