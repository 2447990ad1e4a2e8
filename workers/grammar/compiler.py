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
from llguidance import LLMatcher, LLParserLimits, regex_to_lark

from ipc.errors import InvalidRequest
from ipc.structured_outputs import StructuredOutputs
from workers.grammar.grammar_text import joined, lark_of, listed, quoted
from workers.grammar.json_schemas import json_options, prepared_schema
from workers.grammar.origin import Origin, field_of
from workers.grammar.reasoning import behind_reasoning
from workers.grammar.structural_tags import structural_tag_grammar
from workers.grammar.vocabulary import Vocabulary

MAX_TOKEN_S: Final = 0.05  # of computing time for one token and its mask
LIMITS: Final = LLParserLimits(
    max_items_in_row=4_000,  # 4 for each optional property of an object
    max_grammar_size=15_000,  # symbols; the time to compile a schema grows with the square of its properties
    initial_lexer_fuel=1_000_000,  # 50 ms of building automata
    step_lexer_fuel=200_000,  # 15 ms for one mask
    step_max_items=50_000,  # 20 ms or more for one mask
    max_lexer_states=20_000,  # of one sequence: 1 to 2 KiB each
    verbose_errors=False,
)
ANY_OBJECT: Final = '{"type":"object"}'
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
_POSITION: Final = re.compile(r"^at \d+\(\d+\): ")  # in a Lark grammar, which only `grammar` takes from the user
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
        grammar, origin = self._grammar(spec)
        matcher = self._tried_out(spec, grammar, origin)
        if spec.after_reasoning:  # random tokens would not get behind the reasoning, so the answer is tried out alone
            grammar = behind_reasoning(grammar, spec, self._vocabulary)
            matcher = self._tried_out(spec, grammar, Origin(origin.whole))
        return Prototype(matcher)

    def _tried_out(self, spec: StructuredOutputs, grammar: str, origin: Origin) -> LLMatcher:
        matcher = LLMatcher(self._vocabulary.tokens, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise refusal(spec, matcher.get_error(), origin)
        if warnings := matcher.get_grammar_warnings():
            raise refusal(spec, warnings[0], origin)
        try_out(spec, matcher, self._vocabulary.tokens.vocab_size, origin)
        return matcher

    def _grammar(self, spec: StructuredOutputs) -> tuple[str, Origin]:
        """The constraint as llguidance takes it, and the fields that it came from."""
        if spec.structural_tag is not None:
            return structural_tag_grammar(spec, self._vocabulary)
        origin = Origin(field_of(spec))
        if spec.json is None and not spec.json_object:
            return joined(self._lark(spec)), origin
        schema = ANY_OBJECT if spec.json is None else prepared_schema(str(spec.json), spec)
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=json_options(spec))  # type: ignore[arg-type]
        except ValueError as error:
            raise refusal(spec, str(error), origin) from None
        return joined("start: @json_schema", listed(grammar)), origin

    def _lark(self, spec: StructuredOutputs) -> str:
        if spec.regex is not None:
            return f"start: /{regex_to_lark(spec.regex, '')}/"
        if spec.grammar is not None:
            return lark_of(spec.grammar, "grammar")
        # One terminal, because a choice may begin another one.
        return "start: CHOICE\nCHOICE: " + " | ".join(map(quoted, spec.choice or ()))


def refusal(spec: StructuredOutputs, problem: str, origin: Origin) -> InvalidRequest:
    """The error for a constraint that llguidance refuses, in one line."""
    lines = [line.strip() for line in problem.splitlines() if line.strip() and not line.startswith("<")]
    line = " ".join([*lines[:1], *(each for each in lines[1:] if each.startswith("error:"))]) or "it is too complex"
    for theirs, ours in _IN_OUR_WORDS:
        line = line.replace(theirs, ours)
    if spec.grammar is None:
        line = _POSITION.sub("", line)
    if len(line) > _MAX_PROBLEM_CHARS:  # the cause is at the end, after a copy of the pattern or name
        half = _MAX_PROBLEM_CHARS // 2
        line = f"{line[:half]} ... {line[-half:]}"
    if _TOO_MUCH.search(line):
        line += "; simplify it"
    return InvalidRequest(f"{origin.of(problem)} cannot be used: {line}")


def try_out(spec: StructuredOutputs, matcher: LLMatcher, vocab_size: int, origin: Origin) -> None:
    """Compute the first mask, so that copies have it at once, and follow a few texts on copies: one of the tokens with
    the lowest ids, which are short in most vocabularies, and random ones.

    Raises InvalidRequest if no token is allowed at the beginning, if a token takes longer than MAX_TOKEN_S, or if a
    text comes to a limit.
    """
    mask = np.zeros(-(-vocab_size // 32), np.int32)
    draw = random.Random(vocab_size)
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    if matcher.is_error() or not (mask.any() or matcher.is_accepting()):
        raise refusal(spec, _dead_end(matcher), origin)
    for trial in range(_TRIALS):
        copy = matcher.deep_copy()
        for _ in range(_TRIAL_TOKENS):
            started = time.thread_time()
            copy.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            token_ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            if copy.is_stopped() or not len(token_ids):
                break
            copy.consume_token(int(draw.choice(token_ids) if trial else token_ids[0]))
            if (took_s := time.thread_time() - started) > MAX_TOKEN_S:
                problem = f"one token takes {took_s:.2f} s, more than {MAX_TOKEN_S} s: simplify it"
                raise refusal(spec, problem, origin)
        if copy.is_error():
            raise refusal(spec, _dead_end(copy), origin)


def _dead_end(matcher: LLMatcher) -> str:
    error = matcher.get_error() if matcher.is_error() else ""
    return "no text satisfies it" if not error or "NoExtension" in error else error
