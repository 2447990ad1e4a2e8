"""Translates structural tags into Lark: free text that switches to a schema inside tags, as tool calls need.

Two forms are known: vLLM's `structures` and `triggers`, and xgrammar's `format`, a tree of formats. A format that
cannot be expressed is refused. lark_parts.py writes literals, free text and subgrammars.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from ipc.errors import InvalidRequest
from ipc.structured_outputs import StructuredOutputs
from workers.grammar.json_schemas import parsed_json
from workers.grammar.lark_parts import LarkParts, Literal
from workers.grammar.origin import SOURCE, Origin, field_of, source_of
from workers.grammar.vocabulary import Vocabulary

_MAX_DEPTH: Final = 32
_MAX_REPEATS: Final = 1_000

# What follows a format: () = the end of the text; literals = one of them; None = something that free text cannot find.
Ends = tuple[Literal, ...] | None


def structural_tag_grammar(spec: StructuredOutputs, vocabulary: Vocabulary) -> tuple[str, Origin]:
    """llguidance's grammar for the structural tag of a request, and the fields that it came from.

    Any format in the tag, and the tag itself, may name its field as `source`. Raises InvalidRequest for a tag that is
    not understood, or that cannot be honoured.
    """
    tag = parsed_json(spec.structural_tag or "", "structural_tag")
    if not isinstance(tag, dict) or tag.get("type") != "structural_tag":
        raise InvalidRequest('structural_tag must be a JSON object with "type": "structural_tag"')
    parts = LarkParts(spec, vocabulary)
    root = tag["format"] if "format" in tag else _of_structures(tag)
    try:
        grammar = parts.grammar(_Formats(parts).expression(root, (), 0))
    except InvalidRequest as error:
        if (source := source_of(tag)) is None:
            raise
        raise InvalidRequest(f"{source} cannot be used: {error}") from None
    return grammar, Origin(field_of(spec), parts.sources)


def _of_structures(tag: dict[str, Any]) -> dict[str, Any]:
    """vLLM's form as xgrammar's: text with tags anywhere."""
    structures, triggers = _field(tag, "structures", list), _field(tag, "triggers", list)
    tags = []
    for each in structures:
        if not isinstance(each, dict):
            raise InvalidRequest("structural_tag.structures must be a list of objects")
        schema = each.get("schema")
        if isinstance(schema, str):
            schema = parsed_json(schema, "structural_tag.structures.schema")
        content = {"type": "json_schema", "json_schema": schema}
        tags.append({"type": "tag", "begin": each.get("begin"), "content": content, "end": each.get("end")})
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}


class _Formats:
    """Translates a tree of formats into Lark expressions. Each expression also matches the format's end."""

    def __init__(self, parts: LarkParts) -> None:
        self._parts: Final = parts
        self._translate: Final[dict[str, Callable[[dict[str, Any], Ends, int], str]]] = {
            "const_string": self._const_string, "json_schema": self._json_schema, "any_text": self._any_text,
            "regex": self._regex, "grammar": self._grammar, "token": self._token, "or": self._or, "tag": self._tag,
            "sequence": self._sequence, "optional": self._repeated, "star": self._repeated, "plus": self._repeated,
            "repeat": self._repeated, "triggered_tags": self._triggered_tags,
            "tags_with_separator": self._tags_with_separator,
        }  # fmt: skip

    def expression(self, node: Any, ends: Ends, depth: int) -> str:
        kind = node.get("type") if isinstance(node, dict) else None
        translate = self._translate.get(kind) if isinstance(kind, str) else None
        if translate is None:
            raise InvalidRequest(
                f"structural_tag has the format {str(kind if kind is not None else node)[:100]!r}: known formats are "
                f"{', '.join(self._translate)}"
            )
        if depth > _MAX_DEPTH:
            raise InvalidRequest(f"structural_tag has more than {_MAX_DEPTH} formats inside each other")
        with self._parts.made_from(source_of(node)):
            return translate(node, ends, depth + 1)

    def _const_string(self, node: dict[str, Any], ends: Ends, depth: int) -> str:
        _only(node, "value")
        return self._closed(self._parts.literal(_text(node, "value")), ends)

    def _json_schema(self, node: dict[str, Any], ends: Ends, depth: int) -> str:
        _only(node, "json_schema", style="json", any_order=False, max_whitespace_cnt=None, excludes=[])
        return self._closed(self._parts.json(node.get("json_schema")), ends)

    def _regex(self, node: dict[str, Any], ends: Ends, depth: int) -> str:
        _only(node, "pattern", excludes=[])
        pattern = _text(node, "pattern")
        return _one_of([self._parts.regex_until(pattern, end) for end in ends]) if ends else self._parts.regex(pattern)

    def _grammar(self, node: dict[str, Any], ends: Ends, depth: int) -> str:
        _only(node, "grammar")
        return self._closed(self._parts.subgrammar(_text(node, "grammar")), ends)

    def _token(self, node: dict[str, Any], ends: Ends, depth: int) -> str:
        return self._closed(self._parts.literal(self._literal(node, "token")), ends)

    def _any_text(self, node: dict[str, Any], ends: Ends, depth: int) -> str:
        _only(node, excludes=[], max_tokens=None, max_chars=None)
        return self._free_text(ends, "any_text")

    def _or(self, node: dict[str, Any], ends: Ends, depth: int) -> str:
        _only(node, "elements")
        return _one_of([self.expression(each, ends, depth) for each in _field(node, "elements", list)])

    def _sequence(self, node: dict[str, Any], ends: Ends, depth: int) -> str:
        _only(node, "elements")
        elements = _field(node, "elements", list)
        expressions = []
        while elements:
            element, *elements = elements
            value = elements[0].get("value") if elements and isinstance(elements[0], dict) else None
            if not elements:
                expression = self.expression(element, ends, depth)
            elif isinstance(value, str) and value and elements[0].get("type") == "const_string":
                # Free text ends at the fixed text that follows it, so one expression matches both.
                expression = self.expression(element, (value,), depth)
                elements = elements[1:]
                expression = expression if elements else self._closed(expression, ends)
            else:
                expression = self.expression(element, None, depth)
            expressions.append(expression)
        return " ".join(expressions)

    def _repeated(self, node: dict[str, Any], ends: Ends, depth: int) -> str:
        times = {"optional": "?", "star": "*", "plus": "+"}.get(node["type"])
        if times is None:
            _only(node, "content", "min", "max")
            low, high = _field(node, "min", int), _field(node, "max", int)
            if not (0 <= low <= _MAX_REPEATS and (high == -1 or low <= high <= _MAX_REPEATS)):
                raise InvalidRequest(
                    f"structural_tag.repeat has min {low} and max {high}: they must lie in [0, {_MAX_REPEATS}], or max "
                    "must be -1"
                )
            times = f"{{{low},{'' if high == -1 else high}}}"
        else:
            _only(node, "content")
        return self._closed(f"({self.expression(node.get('content'), None, depth)}){times}", ends)

    def _tag(self, node: dict[str, Any], ends: Ends, depth: int) -> str:
        begin = self._parts.literal(self._literal(node, "begin"))
        return f"{begin} {self._tag_rest(node, ends, depth)}"

    def _tag_rest(self, node: dict[str, Any], ends: Ends, depth: int) -> str:
        """The content and the end of a tag."""
        with self._parts.made_from(source_of(node)):
            return self._tag_rest_inside(node, ends, depth)

    def _tag_rest_inside(self, node: dict[str, Any], ends: Ends, depth: int) -> str:
        _only(node, "begin", "content", "end")
        given = node.get("end")
        tag_ends = [self._literal({"end": each}, "end") for each in (given if isinstance(given, list) else [given])]
        if "" in tag_ends:  # the content ends where the tag's surroundings end
            if len(tag_ends) > 1:
                raise InvalidRequest("structural_tag.tag has an empty end among others: give it alone")
            return self.expression(node.get("content"), ends, depth)
        return self._closed(self.expression(node.get("content"), tuple(tag_ends), depth), ends)

    def _tags_with_separator(self, node: dict[str, Any], ends: Ends, depth: int) -> str:
        _only(node, "tags", "separator", at_least_one=..., stop_after_first=...)
        tag = _one_of([self._tag(each, None, depth) for each in _tags(node)])
        separator = self._parts.literal(_text(node, "separator"))
        tags = tag if _flag(node, "stop_after_first") else f"{tag} ({separator} {tag})*"
        return self._closed(f"({tags})" if _flag(node, "at_least_one") else f"({tags})?", ends)

    def _triggered_tags(self, node: dict[str, Any], ends: Ends, depth: int) -> str:
        _only(node, "triggers", "tags", at_least_one=..., stop_after_first=..., excludes=[])
        tags = _tags(node)
        dispatch = self._parts.rule(_one_of(self._dispatches(node, tags, depth)))
        text = self._free_text(ends, "triggered_tags")
        if _flag(node, "at_least_one"):  # as in xgrammar, the text then begins with a tag
            first = _one_of([self._tag(each, None, depth) for each in tags])
            return self._closed(first, ends) if _flag(node, "stop_after_first") else f"{first} {dispatch}* {text}"
        if _flag(node, "stop_after_first"):
            return _one_of([self._closed(dispatch, ends), text])
        return f"{dispatch}* {text}"

    def _dispatches(self, node: dict[str, Any], tags: list[dict[str, Any]], depth: int) -> list[str]:
        """Free text up to a trigger, and the rest of a tag that the trigger begins: one expression for each trigger."""
        triggers = _field(node, "triggers", list)
        if not triggers or not all(isinstance(each, str) and each for each in triggers):
            raise InvalidRequest("structural_tag.triggers must be a list of at least one string that is not empty")
        begins = [_text(tag, "begin") for tag in tags]
        if orphans := [each for each in begins if not each.startswith(tuple(triggers))]:
            raise InvalidRequest(f"structural_tag has a tag that begins with {orphans[0]!r}, and no trigger begins it")
        expressions = []
        for trigger in dict.fromkeys(triggers):
            started = [tag for tag, begin in zip(tags, begins, strict=True) if begin.startswith(trigger)]
            if not started:
                raise InvalidRequest(f"structural_tag has the trigger {trigger!r}, and no tag begins with it")
            for head, rests in self._parts.triggered(trigger, [_text(tag, "begin") for tag in started]):
                tails = [
                    f"{self._parts.literal(rest)} {self._tag_rest(tag, None, depth)}"
                    for tag, rest in zip(started, rests, strict=True)
                    if rest is not None
                ]
                expressions.append(f"{head} {_one_of(tails)}")
        return expressions

    def _free_text(self, ends: Ends, kind: str) -> str:
        if ends is None:
            raise InvalidRequest(
                f"structural_tag has {kind} before something else than a fixed text: put it at the end, into a tag, or "
                "before a const_string"
            )
        return _one_of([self._parts.text_until(end) for end in ends]) if ends else self._parts.text()

    def _closed(self, expression: str, ends: Ends) -> str:
        return f"{expression} {_one_of([self._parts.literal(end) for end in ends])}" if ends else expression

    def _literal(self, node: dict[str, Any], field: str) -> Literal:
        value = node.get(field)
        if isinstance(value, dict) and value.get("type") == "token":
            _only(value, "token")
            value = value.get("token")
            return self._parts.token(value)
        if field == "token":
            return self._parts.token(value)
        return _text(node, field)


def _one_of(expressions: list[str]) -> str:
    distinct = list(dict.fromkeys(expressions))
    if not distinct:
        raise InvalidRequest("structural_tag has an empty list of elements or tags: give at least one")
    return distinct[0] if len(distinct) == 1 else f"({' | '.join(distinct)})"


def _tags(node: dict[str, Any]) -> list[dict[str, Any]]:
    tags: list[dict[str, Any]] = _field(node, "tags", list)
    if not tags or not all(isinstance(tag, dict) for tag in tags):
        raise InvalidRequest(f"structural_tag.{node['type']}.tags must be a list of at least one tag")
    return tags


def _only(node: dict[str, Any], *fields: str, **others: Any) -> None:
    """Refuse an option that would be ignored. `others` maps an option to the one value that it may have."""
    for name, value in node.items():
        if name not in ("type", SOURCE) and name not in fields and others.get(name, others) not in (..., value):
            raise InvalidRequest(
                f"structural_tag.{node.get('type', 'structures')} has {name} = {str(value)[:100]}, which cannot be "
                "honoured: leave it out"
            )


def _flag(node: dict[str, Any], field: str) -> bool:
    value = node.get(field, False)
    if not isinstance(value, bool):
        raise InvalidRequest(f"structural_tag.{field} ({value!r}) must be true or false")
    return value


def _text(node: dict[str, Any], field: str) -> str:
    text: str = _field(node, field, str)
    return text


def _field(node: dict[str, Any], field: str, kind: type) -> Any:
    value = node.get(field)
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = {list: "a list", str: "a string", int: "an integer"}[kind]
        raise InvalidRequest(f"structural_tag.{field} ({str(value)[:100]}) must be {wanted}")
    return value
