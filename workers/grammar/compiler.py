"""Compiles structured outputs into prototype matchers, with llguidance. Knows no requests and no threads.

Every compilation is bounded in time and memory, because a schema may be hostile. A grammar that compiles is then tried
on a few random tokens: one that allows no text, or that takes too long for a token, is refused before it can delay the
masks of other requests.
"""

from __future__ import annotations

import random
import re
import time
from typing import Final

import numpy as np
from llguidance import LLMatcher, LLParserLimits

from ipc.errors import InvalidRequest
from ipc.structured_outputs import StructuredOutputs
from workers.grammar.grammar_text import lark_of, quoted
from workers.grammar.json_schemas import json_options, prepared_schema
from workers.grammar.structural_tags import structural_tag_grammar
from workers.grammar.vocabulary import Vocabulary

MAX_TOKEN_S: Final = 0.05  # of computing time for one token and its mask
LIMITS: Final = LLParserLimits(
    max_grammar_size=50_000,  # symbols; the time to compile a schema grows with the square of its properties
    initial_lexer_fuel=1_000_000,  # 50 ms of building automata
    step_lexer_fuel=200_000,  # 15 ms for one mask
    step_max_items=20_000,  # 20 ms or more for one mask, if the grammar is ambiguous
    max_lexer_states=20_000,  # of one sequence: 1 to 2 KiB each
    verbose_errors=False,
)
_MAX_PROBLEM_CHARS: Final = 300
_TRIALS: Final = 3
_TRIAL_TOKENS: Final = 8
_IN_OUR_WORDS: Final = (  # advice of llguidance that a user of the engine cannot follow
    ("oneOf constraints are not supported. Enable 'coerce_one_of' option to approximate oneOf with anyOf",
     "oneOf with alternatives that may overlap is not supported; use anyOf"),
    (" is not present in a registry and retrieving it failed: Default retriever does not fetch resources",
     " is not part of the schema, and remote $refs are not fetched"),
    ("; consider making your grammar left-recursive if it's right-recursive", ""),
    ("Expecting object schema to apply options", "the schema must be a JSON object"),
)  # fmt: skip
_TOO_MUCH: Final = re.compile("too (many|big|large|deep)|exhausted|exceeded|; max is|[Uu]nable to determine")


class Prototype:
    """A compiled grammar at its beginning. Each sequence works on a copy."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher: Final = matcher

    def copy(self) -> LLMatcher:
        return self._matcher.deep_copy()


class Compiler:
    """Compiles for one vocabulary. Threads may share it: most of the work does not hold the interpreter's lock."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary: Final = vocabulary

    def compile(self, spec: StructuredOutputs) -> Prototype:
        """Raises InvalidRequest, in one line.

        The constraint may be malformed, exceed the limits, or allow no text; or llguidance cannot enforce it exactly.
        """
        matcher = LLMatcher(self._vocabulary.tokens, self._grammar(spec), log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise refusal(spec, matcher.get_error())
        if warnings := matcher.get_grammar_warnings():
            raise refusal(spec, warnings[0])
        try_out(spec, matcher, self._vocabulary.tokens.vocab_size)
        return Prototype(matcher)

    def _grammar(self, spec: StructuredOutputs) -> str:
        """The constraint as llguidance takes it."""
        if spec.structural_tag is not None:
            return structural_tag_grammar(spec, self._vocabulary)
        if spec.regex is not None:
            return LLMatcher.grammar_from_regex(spec.regex)
        if spec.grammar is not None:
            return LLMatcher.grammar_from_lark(lark_of(spec.grammar, "grammar"))
        if spec.choice is not None:  # one terminal: a choice may begin another one
            return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(quoted, spec.choice)))
        schema = '{"type":"object"}' if spec.json is None else prepared_schema(str(spec.json), spec)
        try:
            return LLMatcher.grammar_from_json_schema(schema, overrides=json_options(spec))  # type: ignore[arg-type]
        except ValueError as error:
            raise refusal(spec, str(error)) from None


def refusal(spec: StructuredOutputs, problem: str) -> InvalidRequest:
    """The error for a constraint that llguidance refuses, in one line."""
    lines = [line.strip() for line in problem.splitlines() if line.strip() and not line.startswith("<")]
    line = " ".join([*lines[:1], *(each for each in lines[1:] if each.startswith("error:"))]) or "it is too complex"
    for theirs, ours in _IN_OUR_WORDS:
        line = line.replace(theirs, ours)
    if _TOO_MUCH.search(line):
        line += "; simplify it"
    return InvalidRequest(f"structured_outputs.{spec.constraint} cannot be used: {line[:_MAX_PROBLEM_CHARS]}")


def try_out(spec: StructuredOutputs, matcher: LLMatcher, vocab_size: int) -> None:
    """Compute the first mask, so that copies have it at once, and follow a few random texts on copies.

    Raises InvalidRequest if no token is allowed at the beginning, if one token takes longer than MAX_TOKEN_S, or if no
    text gets on.
    """
    mask = np.zeros(-(-vocab_size // 32), np.int32)
    draw = random.Random(vocab_size)
    problems = []
    started = time.thread_time()
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    if matcher.is_error() or not (mask.any() or matcher.is_accepting()):
        raise refusal(spec, _dead_end(matcher))
    for _ in range(_TRIALS):
        copy = matcher.deep_copy()
        for _ in range(_TRIAL_TOKENS):
            copy.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            token_ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            if copy.is_stopped() or not len(token_ids) or not copy.consume_token(int(draw.choice(token_ids))):
                break
            started, before = time.thread_time(), started
            if started - before > MAX_TOKEN_S:
                raise refusal(spec, f"one token takes {started - before:.2f} s, more than {MAX_TOKEN_S} s: simplify it")
        problems.append(_dead_end(copy) if copy.is_error() else "")
    if all(problems):
        raise refusal(spec, problems[0])


def _dead_end(matcher: LLMatcher) -> str:
    error = matcher.get_error() if matcher.is_error() else ""
    return "no text satisfies it" if not error or "NoExtension" in error else error
