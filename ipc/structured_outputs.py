"""Structured outputs: the one constraint that a request's text must satisfy, checked where it is made.

The grammar workers compile it. Only they can tell whether a schema, a regex or a grammar is well-formed.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ipc.codec import BoundedList
from ipc.errors import InvalidRequest
from ipc.parameter_checks import Rule, check_fields

MAX_STRUCTURE_BYTES: Final = 256 * 1024  # of all text of one request's constraint, as UTF-8
MAX_CHOICES: Final = 1024
if TYPE_CHECKING:
    Schema = str | dict[str, Any]
else:
    Schema = str  # in messages, and in every struct after it is made
CONSTRAINTS: Final = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


def _is_text_or_none(value: object) -> bool:
    return value is None or (isinstance(value, str) and value != "")


def _is_choice(value: object) -> bool:
    return value is None or (
        isinstance(value, list) and 1 <= len(value) <= MAX_CHOICES and all(isinstance(each, str) for each in value)
    )


def _is_tags(value: object) -> bool:
    return isinstance(value, list) and len(value) <= 2 and all(isinstance(tag, str) and tag for tag in value)


_TEXT: Final[Rule] = (_is_text_or_none, "must be a string that is not empty, or None")
_FLAG: Final[Rule] = (lambda value: isinstance(value, bool), "must be true or false")
_RULES: Final[dict[str, Rule]] = {
    "json": (_is_text_or_none, "must be a JSON schema (a dict, or its text), or None"),
    "regex": _TEXT,
    "choice": (_is_choice, f"must be a list of 1 to {MAX_CHOICES} strings, or None"),
    "grammar": _TEXT,
    "json_object": (lambda value: value is None or isinstance(value, bool), "must be true, false or None"),
    "structural_tag": _TEXT,
    "disable_any_whitespace": _FLAG,
    "disable_additional_properties": _FLAG,
    "whitespace_pattern": _TEXT,
    "after_reasoning": (_is_tags, "must be a list of at most 2 strings that are not empty: [], [end] or [begin, end]"),
}


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What a request's text must look like. Exactly one of the first six fields is given; the names are vLLM's.

    Args:
        json: a JSON schema, as a dict or as its JSON text. Properties appear in the order of the schema.
        regex: a regular expression (syntax of Rust's `regex`, without look-around) that matches the whole text.
        choice: 1 to 1,024 strings; the text is one of them.
        grammar: a context-free grammar: Lark text with a rule `start`, or GBNF/EBNF text (`::=`) with a rule `root`.
        json_object: true = any JSON object.
        structural_tag: JSON text of free text that switches to a schema inside tags, as tool calls need: vLLM's
            `structures` and `triggers`, or xgrammar's `format`. A format may have a string `source`: errors about it
            name that instead of this field.
        disable_any_whitespace: true = JSON without whitespace. By default JSON may have a space, or a line break and
            an indentation of at most 40 characters, wherever JSON allows whitespace.
        disable_additional_properties: true = objects whose schema lists properties have no others.
        whitespace_pattern: a regular expression of whitespace that replaces that default.
        after_reasoning: the tags of a reasoning that comes first and is free text. [end] = the text begins inside the
            reasoning, and the constraint holds behind `end`. [begin, end] = a text that begins with `begin` has a
            reasoning up to `end`; the constraint holds behind it, and otherwise from the first token. [] = the text has
            no reasoning. A reasoning may hold any token but those that end the sequence, since there would be no answer
            then, and the special tokens that a `structural_tag` names.

    The options of whitespace and of additional properties apply to JSON: with `json`, `json_object` and the schemas of
    `structural_tag`. All text together may have 256 KiB. Raises InvalidRequest, naming field and value, for anything
    else.
    """

    json: Schema | None = None
    regex: str | None = None
    choice: BoundedList[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    after_reasoning: BoundedList[str] = []

    def __post_init__(self) -> None:
        if isinstance(self.json, dict):
            msgspec.structs.force_setattr(self, "json", _schema_text(self.json))
        check_fields(self, _RULES)
        given = [name for name in CONSTRAINTS if getattr(self, name)]
        if len(given) != 1:
            raise InvalidRequest(
                f"structured_outputs must have exactly one of {', '.join(CONSTRAINTS)}, and has "
                f"{' and '.join(given) or 'none of them'}"
            )
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise InvalidRequest(
                f"whitespace_pattern ({self.whitespace_pattern!r}) and disable_any_whitespace (True) contradict each "
                "other: give one of them"
            )
        if (size := self.num_bytes) > MAX_STRUCTURE_BYTES:
            raise InvalidRequest(
                f"{self.constraint} has {size:,} bytes of text, more than the {MAX_STRUCTURE_BYTES:,} that a request "
                "may have: make it smaller"
            )

    @property
    def constraint(self) -> str:
        """The name of the field that is given."""
        return next(name for name in CONSTRAINTS if getattr(self, name))

    @property
    def num_bytes(self) -> int:
        """The size of all text as UTF-8. A lone surrogate counts as 3 bytes; the codec refuses it."""
        texts = (self.json, self.regex, *(self.choice or ()), self.grammar, self.structural_tag)
        given = [text for text in (*texts, self.whitespace_pattern, *self.after_reasoning) if isinstance(text, str)]
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in given)


def _schema_text(schema: dict[str, Any]) -> str:
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"json is a dict that is no JSON schema: {error or 'it is nested too deeply'}") from None
