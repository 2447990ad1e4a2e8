"""A constraint that holds behind a reasoning, with tags of every kind and at every split into tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ipc.errors import InvalidRequest
from ipc.structured_outputs import StructuredOutputs
from tests.unit.workers.grammar.grammar_tools import END, accepts, allowed, encode, matchers_of
from workers.grammar.compiler import Compiler
from workers.grammar.matchers import Matchers
from workers.grammar.vocabulary import Vocabulary

SCHEMA: Final = {
    "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False,
}  # fmt: skip
TAG: Final = {
    "type": "structural_tag", "structures": [{"begin": "<f=a>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f="],
}  # fmt: skip
# Each kind of constraint, a text that it allows, and one that it does not.
CONSTRAINTS: Final[dict[str, tuple[dict[str, Any], str, str]]] = {
    "json": ({"json": SCHEMA}, '{"a":1}', '{"b":1}'),
    "json_object": ({"json_object": True}, "{}", "[]"),
    "regex": ({"regex": "[a-c]+!"}, "ab!", "ab"),
    "choice": ({"choice": ["yes", "yes!", "no"]}, "yes!", "maybe"),
    "grammar": ({"grammar": 'start: "a" "b"+\n%ignore " "'}, "a bb", "a c"),
    "gbnf": ({"grammar": 'root ::= "(" root ")" | "x"'}, "((x))", "((x)"),
    "structural_tag": ({"structural_tag": json.dumps(TAG)}, 'So: <f=a>{"a":1}</f>', "So: <f=b>"),
}
TAGS: Final = {
    "plain text": ("<think>", "</think>"),
    "special tokens": ("<|user|>", "<|assistant|>"),
    "special tokens and text": ("<|user|>think", "\n<|assistant|>"),
}
THOUGHTS: Final = ("", 'I </thin < {"a": 2} ', "日本語 </f>\n", "a<|system|>b")


def spec_of(constraint: str, *tags: str) -> StructuredOutputs:
    return StructuredOutputs(**CONSTRAINTS[constraint][0], after_reasoning=list(tags))


@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_the_constraint_holds_behind_the_reasoning_only(constraint: str, tags: tuple[str, str]) -> None:
    _, good, bad = CONSTRAINTS[constraint]
    begin, end = tags
    inside, outside = spec_of(constraint, end), spec_of(constraint, begin, end)
    for thought in THOUGHTS:
        reasoning = thought + end
        assert accepts(inside, reasoning + good)
        assert accepts(outside, begin + reasoning + good)
        assert not accepts(inside, reasoning + bad)
        assert not accepts(outside, begin + reasoning + bad)
        assert not accepts(inside, thought + good), "the reasoning has not ended"
        assert not accepts(outside, begin + thought + good)


@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_text_without_reasoning_follows_the_constraint_from_its_first_token(
    constraint: str, tags: tuple[str, str]
) -> None:
    _, good, bad = CONSTRAINTS[constraint]
    assert accepts(spec_of(constraint, *tags), good)
    assert not accepts(spec_of(constraint, *tags), bad)
    assert not accepts(spec_of(constraint, tags[1]), good), "[end] says that the text begins inside the reasoning"


def test_the_begin_tag_begins_a_reasoning_even_where_the_constraint_allows_its_text() -> None:
    spec = StructuredOutputs(regex="(?s)[^!]*", after_reasoning=["<think>", "</think>"])
    assert accepts(spec, "<think>wow!</think>fine")
    assert not accepts(spec, "<think>no end")
    assert accepts(spec, "<thin")


def test_the_first_end_tag_ends_the_reasoning_whether_it_is_a_token_or_spelled_out() -> None:
    spec = StructuredOutputs(choice=["yes"], after_reasoning=["<|assistant|>"])
    assert accepts(spec, "hm<|assistant|>yes", spelled_out=True)
    assert not accepts(spec, "hm<|assistant|>no<|assistant|>yes", spelled_out=True)
    assert not accepts(spec, "hm<|assistant|>no<|assistant|>yes")


def test_the_text_cannot_end_inside_the_reasoning() -> None:
    matchers = matchers_of(StructuredOutputs(choice=["yes"], after_reasoning=["</think>"]))
    for token_id in encode("I think</think>y"):
        assert END not in allowed(matchers)
        matchers.advance(1, token_id)
    assert not matchers.is_complete(1)


@pytest.mark.parametrize(
    ("constraint", "problem"),
    [({"regex": "(?!a)b"}, "regex cannot be used"), ({"json": {"not": {}}}, "json cannot be")],
)
def test_a_constraint_that_cannot_be_used_is_refused_behind_a_reasoning_too(
    constraint: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        matchers_of(StructuredOutputs(**constraint, after_reasoning=["</think>"]))


def test_special_tokens_of_the_answer_are_no_part_of_the_reasoning() -> None:
    tag = {"type": "structural_tag", "format": {"type": "const_string", "value": "<|system|>x"}}
    spec = StructuredOutputs(structural_tag=json.dumps(tag), after_reasoning=["</think>"])
    assert accepts(spec, "hm <|user|></think><|system|>x")
    assert not accepts(spec, "hm <|system|></think><|system|>x")


# ---- at every split into tokens, with a vocabulary whose tokens lie across all borders

PIECES: Final = ("<th", "hm<", "ink", "k>", "</t", 'k>{"', '>{"a', "é<", ">y", "k>yes")


@cache
def small_vocabulary(*added: str, special: bool = False) -> Vocabulary:
    """The bytes, the pieces, an end, and added tokens."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [text for piece in PIECES for text, _ in split.pre_tokenize_str(piece)]
    vocab = {text: i for i, text in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer, made.decoder = split, decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    made.add_tokens([AddedToken(text, special=special) for text in added])
    return Vocabulary(made, made.get_vocab_size(), made.token_to_id("<|end|>"))


def splits(vocabulary: Vocabulary, text: bytes) -> Iterator[list[int]]:
    """Every way to write a text with tokens."""
    if not text:
        yield []
    for token_id in range(vocabulary.size):
        piece = vocabulary.tokens.decode_bytes([token_id])
        if token_id != vocabulary.end_id and piece and text.startswith(piece):
            for rest in splits(vocabulary, text[len(piece) :]):
                yield [token_id, *rest]


def is_allowed(spec: StructuredOutputs, vocabulary: Vocabulary, token_ids: list[int]) -> bool:
    """Whether masks allow each token, and the end behind them."""
    matchers = Matchers(vocabulary)
    matchers.add(1, compiled_with(vocabulary, spec.constraint, tuple(spec.after_reasoning)), [vocabulary.end_id])
    for token_id in token_ids:
        if token_id not in allowed_by(matchers, vocabulary):
            return False
        matchers.advance(1, token_id)
    return vocabulary.end_id in allowed_by(matchers, vocabulary)


@cache
def compiled_with(vocabulary: Vocabulary, constraint: str, tags: tuple[str, ...]) -> Any:
    return Compiler(vocabulary).compile(spec_of(constraint, *tags))


def allowed_by(matchers: Matchers, vocabulary: Vocabulary) -> set[int]:
    mask = np.zeros((1, vocabulary.num_words), np.int32)
    matchers.fill([1], mask)
    return set(map(int, np.flatnonzero(np.unpackbits(mask[0].view(np.uint8), bitorder="little"))))


@pytest.mark.parametrize(
    ("added", "special"),
    [((), False), (("<think>", "</think>"), False), (("<think>", "</think>"), True)],
    ids=["plain text", "added tokens", "special tokens"],
)
@pytest.mark.parametrize(
    ("constraint", "begin", "thought", "answer", "is_good"),
    [
        ("json", "", "é", '{"a":1}', True),
        ("json", "", "hm", '{"b"', False),
        ("choice", "<think>", "", "yes!", True),
        ("choice", "<think>", "é", "yes?", False),
    ],
)
def test_every_split_into_tokens_is_judged_alike(
    added: tuple[str, ...], special: bool, constraint: str, begin: str, thought: str, answer: str, is_good: bool
) -> None:
    vocabulary = small_vocabulary(*added, special=special)
    tags = ("<think>", "</think>") if begin else ("</think>",)
    found = list(splits(vocabulary, f"{begin}{thought}</think>{answer}".encode()))
    assert len(found) > 10
    spec = spec_of(constraint, *tags)
    assert [ids for ids in found if is_allowed(spec, vocabulary, ids) is not is_good] == []


def test_tags_outside_of_ascii_are_found_at_every_split() -> None:
    vocabulary = small_vocabulary()
    spec = StructuredOutputs(choice=["yes"], after_reasoning=["◁é▷"])
    prototype = Compiler(vocabulary).compile(spec)
    found = list(splits(vocabulary, "né◁é▷yes".encode()))
    for token_ids in found:
        matchers = Matchers(vocabulary)
        matchers.add(1, prototype, [vocabulary.end_id])
        for token_id in token_ids:
            assert token_id in allowed_by(matchers, vocabulary)
            matchers.advance(1, token_id)
        assert matchers.is_complete(1)


@pytest.mark.parametrize("tags", [("</think>",), ("<think>", "</think>")])
@pytest.mark.parametrize("special", [False, True])
def test_a_thinking_budget_can_force_the_end_of_the_reasoning_anywhere_even_inside_a_character(
    tags: tuple[str, ...], special: bool
) -> None:
    vocabulary = small_vocabulary("<think>", "</think>", special=special)
    begin, end = (vocabulary.special_ids[tag] for tag in ("<think>", "</think>"))
    start = [begin] if len(tags) == 2 else []
    matchers = Matchers(vocabulary)
    thought = [*next(splits(vocabulary, b"hm ")), *next(splits(vocabulary, "日本".encode()))]
    for num_tokens in range(len(thought) + 1):
        matchers.add(num_tokens + 1, compiled_with(vocabulary, "choice", tags), [vocabulary.end_id])
        for token_id in [*start, *thought[:num_tokens], end]:
            mask = np.zeros((1, vocabulary.num_words), np.int32)
            matchers.fill([num_tokens + 1], mask)
            assert mask[0, token_id // 32] >> token_id % 32 & 1, f"after {num_tokens} tokens of the thought"
            matchers.advance(num_tokens + 1, token_id)
        assert matchers.problem(num_tokens + 1) == ""
