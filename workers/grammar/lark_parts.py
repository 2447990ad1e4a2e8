"""Writes the parts of a Lark grammar: literals that may name special tokens, free text, schemas and subgrammars."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any, Final

from llguidance import regex_to_lark

from ipc.errors import InvalidRequest
from ipc.structured_outputs import StructuredOutputs
from workers.grammar.grammar_text import joined, lark_of, quoted
from workers.grammar.json_schemas import json_options, prepare_schema
from workers.grammar.vocabulary import Vocabulary

Literal = str | int  # fixed text, or one token's id


class LarkParts:
    """One grammar under construction. Each method returns an expression for use in a rule."""

    def __init__(self, spec: StructuredOutputs, vocabulary: Vocabulary) -> None:
        self._spec: Final = spec
        self._vocabulary: Final = vocabulary
        self._lines: Final = ["TEXT: /(?s:.*)/"]
        self._sources: Final[dict[int, str]] = {}  # index in `_lines` -> the field that the line was made from
        self._source: str | None = None
        self._subgrammars: Final[list[str]] = []
        self._schemas: Final[dict[str, str]] = {}  # expression -> its rule
        longest_first = sorted(vocabulary.special_ids, key=len, reverse=True)
        self._special: Final = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def grammar(self, start: str, *named: str) -> str:
        """The whole grammar, as llguidance takes it. `named` are the texts of further grammars that `start` names."""
        return joined("\n".join([f"start: {start}", *self._lines]), *self._subgrammars, *named)

    @property
    def sources(self) -> dict[int, str]:
        """The fields of a request that lines of `grammar` were made from, by line number."""
        return {index + 2: source for index, source in self._sources.items()}  # the first line is the start

    @contextlib.contextmanager
    def made_from(self, source: str | None) -> Iterator[None]:
        """Note this field as the source of all lines that are written meanwhile; None = leave it as it is."""
        before, self._source = self._source, source or self._source
        try:
            yield
        finally:
            self._source = before

    def rule(self, expression: str, options: str = "") -> str:
        return self._line(f"r{len(self._lines)}", options, expression)

    def text(self) -> str:
        """Free text, which special tokens are not."""
        return "TEXT"

    def literal(self, literal: Literal) -> str:
        """Fixed text. Where it names special tokens it may be those tokens, or be spelled out."""
        spellings = [_joined(*each) for each in self._spellings(literal)]
        return spellings[0] if len(spellings) == 1 else f"({' | '.join(spellings)})"

    def at_once(self, literal: Literal) -> str:
        """Fixed text that ends as soon as it is complete, even if something longer that begins with it is allowed."""
        found = [
            self.rule(_quoted(first), "[lazy]") if isinstance(first, str) and not rest else _joined(first, *rest)
            for first, *rest in self._spellings(literal)
        ]
        return found[0] if len(found) == 1 else f"({' | '.join(found)})"

    def text_until(self, literal: Literal) -> str:
        """Free text up to the first occurrence of a fixed text, which it includes."""
        return self._until("TEXT", literal)

    def regex_until(self, pattern: str, literal: Literal) -> str:
        """Text that a regular expression matches, up to the first fixed text that may follow it, which it includes."""
        return self._until(f"/{regex_to_lark(pattern, '')}/", literal)

    def _until(self, content: str, literal: Literal) -> str:
        found = []
        for first, *rest in self._spellings(literal):
            if isinstance(first, int):
                found.append(f"{content} {_joined(first, *rest)}")
            elif not rest:
                found.append(self.rule(f"{content} {_quoted(first)}", "[lazy]"))
            else:  # the special token in `rest` ends the text, not the first occurrence of `first`
                found.append(f"{self._terminal(f'{content} {_quoted(first)}')} {_joined(*rest)}")
        return found[0] if len(found) == 1 else f"({' | '.join(found)})"

    def first_token(self, literal: Literal) -> int | None:
        """The first special token in fixed text that is spelled with special tokens; None: it has none."""
        return next((part for part in self._spellings(literal)[-1] if isinstance(part, int)), None)

    def triggered(self, trigger: str, begins: list[str]) -> list[tuple[str, list[str | None]]]:
        """Free text up to a trigger that begins all of `begins`: expressions, and what each leaves of the beginnings.

        A beginning that an expression does not fit is None there. A special token at its start triggers, too.
        """
        tokens = {begin: found[0] for begin in begins if (found := self._special.match(begin))}
        if self._special.search(trigger, 1) and not tokens:
            raise InvalidRequest(
                f"structural_tag has the trigger {trigger!r} with a special token in it: begin it with that token"
            )
        rests: list[str | None] = [begin[len(trigger) :] for begin in begins]
        heads = [(self.rule(f"TEXT {_quoted(trigger)}", "[lazy]"), rests)]
        for token in dict.fromkeys(tokens.values()):
            rests = [begin[len(token) :] if tokens.get(begin) == token else None for begin in begins]
            heads.append((f"TEXT {_quoted(self._vocabulary.special_ids[token])}", rests))
        return heads

    def token(self, token: Any) -> int:
        """The id of a token that is given by id, or by the text of a special token."""
        token_id = self._vocabulary.special_ids.get(token) if isinstance(token, str) else token
        if not isinstance(token_id, int) or isinstance(token, bool) or not 0 <= token_id < self._vocabulary.size:
            raise InvalidRequest(
                f"structural_tag has the token {token!r}: it must be an id below {self._vocabulary.size}, or the text "
                "of a special token"
            )
        return token_id

    def regex(self, pattern: str) -> str:
        return self._terminal(f"/{regex_to_lark(pattern, '')}/")

    def json(self, schema: Any) -> str:
        """JSON that a schema describes; true = any JSON."""
        schema = {} if schema is True else schema
        if not isinstance(schema, dict):
            raise InvalidRequest(
                f"structural_tag has the schema {str(schema)[:100]}: it must be a JSON object, or true"
            )
        prepare_schema(schema, self._spec)
        expression = f"%json {json.dumps({**schema, 'x-guidance': json_options(self._spec)})}"
        if expression not in self._schemas:  # in most grammars of calls, each schema occurs several times
            self._schemas[expression] = self.rule(expression)
        return self._schemas[expression]

    def subgrammar(self, text: str) -> str:
        name = f"g{len(self._subgrammars)}"
        self._subgrammars.append(json.dumps({"name": name, "lark_grammar": lark_of(text, "structural_tag.grammar")}))
        return f"@{name}"

    def _terminal(self, expression: str) -> str:
        return self._line(f"R{len(self._lines)}", "", expression)

    def _line(self, name: str, options: str, expression: str) -> str:
        if self._source is not None:
            self._sources[len(self._lines)] = self._source
        self._lines.append(f"{name}{options}: {expression}")
        return name

    def _spellings(self, literal: Literal) -> list[tuple[Literal, ...]]:
        if isinstance(literal, int):
            return [(literal,)]
        parts: list[Literal] = []
        end = 0
        for found in self._special.finditer(literal):
            parts += [literal[end : found.start()], self._vocabulary.special_ids[found[0]]]
            end = found.end()
        parts.append(literal[end:])
        spelled: tuple[Literal, ...] = (literal,)
        return [spelled] if len(parts) == 1 else [spelled, tuple(part for part in parts if part != "")]


def _quoted(part: Literal) -> str:
    """A part of a literal as Lark writes it."""
    return quoted(part) if isinstance(part, str) else f"<[{part}]>"


def _joined(*parts: Literal) -> str:
    return " ".join(map(_quoted, parts))
