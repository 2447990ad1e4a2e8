"""Requests of every kind, their answers in one form, and how an answer differs from the expected one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from pipeline import Completion, Output, SamplingParams, StructuredOutputs, TokenLogprob

Verdict = Literal["equal", "lost", "doubled", "changed"]

_TOLERANCE: Final = 1e-3  # of a log-probability: the sums of a step depend on what else it computes
_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "parts": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 5},
        "kind": {"enum": ["module", "class", "function"]},
    },
    "required": ["name", "parts", "kind"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Question:
    """One request. `name` is its kind."""

    name: str
    prompt: Any
    params: SamplingParams


@dataclass
class Sample:
    """One sample of an answer, put together from all that arrived."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | None = None
    logprobs: list[TokenLogprob] | None = None


@dataclass
class Answer:
    """All that a client got of a request."""

    samples: list[Sample]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    usage: tuple[int, int] | None = None  # prompt tokens, completion tokens

    @classmethod
    def empty(cls, num_samples: int) -> Answer:
        return cls([Sample() for _ in range(num_samples)])

    @classmethod
    def whole(cls, output: Output) -> Answer:
        """Of a request without streaming."""
        answer = cls([_sample(each) for each in output.completions], output.prompt_logprobs)
        answer._take_usage(output)
        return answer

    def add(self, output: Output) -> None:
        """Take the next part of a stream."""
        sample = self.samples[output.index]
        sample.token_ids += output.token_ids
        sample.text += output.text
        sample.finish_reason = output.finish_reason or sample.finish_reason
        sample.stop_reason = output.stop_reason or sample.stop_reason
        if output.logprobs is not None:
            sample.logprobs = (sample.logprobs or []) + output.logprobs
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = (self.prompt_logprobs or []) + output.prompt_logprobs
        self._take_usage(output)

    def _take_usage(self, output: Output) -> None:
        if output.usage is not None:
            self.usage = output.usage.prompt_tokens, output.usage.completion_tokens


def _sample(completion: Completion) -> Sample:
    return Sample(
        list(completion.token_ids), completion.text, completion.finish_reason, completion.stop_reason,
        completion.logprobs,
    )  # fmt: skip


def compare(expected: Answer, got: Answer) -> tuple[Verdict, str]:
    """How an answer differs from the undisturbed one, and where."""
    for index, (want, have) in enumerate(zip(expected.samples, got.samples, strict=True)):
        if verdict := _compare_lists(want.token_ids, have.token_ids, f"tokens of sample {index}"):
            return verdict
        if verdict := _compare_lists(want.text, have.text, f"text of sample {index}"):
            return verdict
        ends = (want.finish_reason, want.stop_reason), (have.finish_reason, have.stop_reason)
        if ends[0] != ends[1]:
            return "changed", f"end of sample {index}: {ends[0]} became {ends[1]}"
        if verdict := _compare_logprobs(want.logprobs, have.logprobs, f"logprobs of sample {index}"):
            return verdict
    if verdict := _compare_logprobs(expected.prompt_logprobs, got.prompt_logprobs, "prompt_logprobs"):
        return verdict
    if expected.usage != got.usage:
        return "changed", f"usage: {expected.usage} became {got.usage}"
    return "equal", ""


def _compare_lists(want: Sequence[Any], have: Sequence[Any], what: str) -> tuple[Verdict, str] | None:
    if want == have:
        return None
    at = next((i for i, (a, b) in enumerate(zip(want, have, strict=False)) if a != b), min(len(want), len(have)))
    verdict: Verdict = "changed" if len(want) == len(have) else "lost" if len(have) < len(want) else "doubled"
    near = slice(max(0, at - 3), at + 4)
    return verdict, f"{what} from {at} on: {want[near]!r} of {len(want)} became {have[near]!r} of {len(have)}"


def _compare_logprobs(
    want: Sequence[TokenLogprob | None] | None, have: Sequence[TokenLogprob | None] | None, what: str
) -> tuple[Verdict, str] | None:
    if want is None or have is None:
        return None if want is have else ("changed", f"{what}: one of both has none")
    ids = (
        [None if row is None else row.token_id for row in want],
        [None if row is None else row.token_id for row in have],
    )
    if verdict := _compare_lists(*ids, what):
        return verdict
    for at, (a, b) in enumerate(zip(want, have, strict=True)):
        if a is not None and b is not None and not _alike(a, b):
            return "changed", f"{what}, position {at}: {a} became {b}"
    return None


def _alike(a: TokenLogprob, b: TokenLogprob) -> bool:
    """The same but for rounding. Two tokens that are equally likely may change places at the end of the list."""
    values = [(a.logprob, b.logprob), *zip(a.top.values(), b.top.values(), strict=False)]
    values += [(value, b.requested.get(key, math.inf)) for key, value in a.requested.items()]
    return len(a.top) == len(b.top) and all(math.isclose(x, y, abs_tol=_TOLERANCE) for x, y in values)


def _seeded(seed: int, **values: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 40, "temperature": 0.9, "seed": seed, **values})


def _schema(schema: dict[str, Any], **values: Any) -> SamplingParams:
    constraint = StructuredOutputs(json=schema, disable_any_whitespace=True)
    return SamplingParams(**{"max_tokens": 60, "structured_outputs": constraint, **values})


def questions() -> list[Question]:
    """Every kind of request that an interruption may hurt in its own way."""
    text, long_text = "A module is", "The interpreter reads a file, and then it runs what it has read. " * 12
    chat = [{"role": "user", "content": "What is a class?"}]
    ids = [(7 * i * i + 11 * i) % 4_000 + 20 for i in range(150)]
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.6}
    regex = StructuredOutputs(regex="[a-z]{4,9}(, [a-z]{2,9}){3}")
    choice = StructuredOutputs(choice=["a module", "a modulator"])
    rows: list[tuple[str, Any, SamplingParams]] = [
        ("greedy", text, SamplingParams(max_tokens=48)),
        ("greedy, long prompt", long_text, SamplingParams(max_tokens=24)),
        ("greedy, token ids", ids, SamplingParams(max_tokens=32, ignore_eos=True)),
        ("greedy, chat", chat, SamplingParams(max_tokens=40)),
        ("seeded", text, _seeded(1)),
        ("seeded, filters", chat, _seeded(2, top_k=30, top_p=0.9, min_p=0.01)),
        ("seeded, long answer", ids[:20], _seeded(3, max_tokens=120, ignore_eos=True)),
        ("n", text, _seeded(4, n=3)),
        ("n, unequal lengths", text, _seeded(5, n=3, max_tokens=60, stop=["e", "."], min_tokens=2)),
        ("stop", text, SamplingParams(max_tokens=60, stop=["ion of", "ing the"], min_tokens=3)),
        ("stop, included", chat, _seeded(6, max_tokens=60, stop=["ther", " in a"], include_stop_str_in_output=True)),
        ("stop tokens", ids[:9], _seeded(7, stop_token_ids=list(range(40, 56)), max_tokens=60)),
        ("logprobs", text, SamplingParams(max_tokens=32, logprobs=4)),
        ("logprobs, seeded", chat, _seeded(8, logprobs=2, logprobs_mode="processed_logprobs", top_k=50)),
        ("logprobs, named tokens", text, _seeded(9, logprob_token_ids=[30, 40, 50], n=2)),
        ("prompt_logprobs", long_text, SamplingParams(max_tokens=16, prompt_logprobs=1)),
        ("prompt_logprobs, n", ids, _seeded(10, prompt_logprobs=2, logprobs=1, n=2, max_tokens=20)),
        ("penalties", text, SamplingParams(max_tokens=48, **penalties)),
        ("penalties, seeded", ids[:40], _seeded(11, min_tokens=20, logit_bias={40: 3.0, 41: -5.0}, **penalties)),
        ("bad words", text, _seeded(12, bad_words=[" the", " a", "is"])),
        ("grammar, schema", chat, _schema(_SCHEMA)),
        ("grammar, schema, seeded", text, _schema(_SCHEMA, temperature=0.8, seed=13)),
        ("grammar, schema, n", chat, _schema(_SCHEMA, temperature=1.0, seed=14, n=2, logprobs=1)),
        ("grammar, regex", text, _seeded(15, structured_outputs=regex)),
        ("grammar, choice", chat, _seeded(16, structured_outputs=choice)),
    ]  # fmt: skip
    return [Question(*row) for row in rows]
