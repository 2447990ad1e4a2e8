"""Families that write each argument between tags, without JSON: GLM, Qwen3-Coder and their like.

The tool's schema says which values are texts. A text streams as it arrives; any other value once it has ended.
"""

from __future__ import annotations

import ast
import json
from typing import Any, Final

from pipeline.http.parsing.json_families import skip_end
from pipeline.http.parsing.native_forms import NATIVE_FORMS, NativeForm, XmlArguments
from pipeline.http.parsing.scanner import Scanner, Script, Steps, Tool
from pipeline.http.parsing.schema_types import type_of, types_of

_WORDS: Final = {"True": True, "False": False, "None": None}


def xml_calls(family: str, *, untyped_is_text: bool) -> Script:
    """The calls of a family whose form has `xml` arguments.

    `untyped_is_text`: a value that the schema says nothing of is a text. Otherwise it is JSON if it can be.

    GLM 4.7:      <tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>
    GLM 4.5:      <tool_call>f\\n<arg_key>a</arg_key>\\n<arg_value>1</arg_value>\\n</tool_call>
    MiniMax M2:   <minimax:tool_call>\\n<invoke name="f">\\n<parameter name="a">1</parameter>\\n</invoke>\\n
                  </minimax:tool_call>  (without the line break)
    Qwen3-Coder:  <tool_call>\\n<function=f>\\n<parameter=a>\\n1\\n</parameter>\\n</function>\\n</tool_call>
    """
    form = NATIVE_FORMS[family]
    begin = form.trigger
    inner = form.begin.removeprefix(begin).strip()  # between the trigger and the name

    def script(s: Scanner) -> Steps[None]:
        triggers = (
            (begin, inner) if inner else (begin,)
        )  # the trigger is left out at times, and before a section's later calls
        while marker := (yield from s.text_until(s.out.content, *triggers)):
            s.mark()
            if marker == begin:
                yield from s.skip_space()
            opens = marker == inner or not inner or (yield from s.accept(inner))
            if not opens or not (yield from _call(s, form, untyped_is_text)):
                s.rewind()
                s.out.content(marker)

    return script


def _call(s: Scanner, form: NativeForm, untyped_is_text: bool) -> Steps[bool]:
    """Read a call from its name on. False: this is no call, and the caller rewinds."""
    assert form.xml is not None, "the form writes arguments between tags"
    name = yield from s.name()
    middle, (close, *more_ends) = form.middle.strip(), form.end.split("\n")
    if not name or (middle and not (yield from s.accept(middle))):
        return False
    tool = s.tools.get(name)
    has_begun = False
    while True:
        yield from s.skip_space()
        tag = yield from s.accept(form.xml.key_begin, close)
        if not tag and not has_begun:
            return False
        if not has_begun:
            s.release()
            s.out.begin_call(name)
            s.out.arguments("{")
        if tag != form.xml.key_begin:
            break
        key, is_closed = yield from s.collect_until(form.xml.key_end)
        if not is_closed:
            return True
        s.out.arguments((", " if has_begun else "") + json.dumps(key.strip(), ensure_ascii=False) + ": ")
        has_begun = True
        types = _argument_types(tool, key.strip()) or ({"string"} if untyped_is_text else set())
        if not (yield from _value(s, form.xml, types)):
            return True
    if tag or not (yield from s.accept_end(form.xml.key_begin, close)):
        is_cut = not tag and s.has_ended and s.at == len(s.text)
        s.out.arguments("" if is_cut else "}")  # as in JSON, the arguments of a text that was cut off stay open
    for end in (*more_ends, form.section_end):
        yield from skip_end(s, end)
    return True


def _value(s: Scanner, xml: XmlArguments, types: set[str]) -> Steps[bool]:
    """Read a value and emit it as JSON. False: the text ended in it."""
    opening = xml.value_begin.strip()
    if opening:
        yield from s.skip_space()
    if xml.value_begin:
        yield from s.accept(opening or xml.value_begin)
    ends = (xml.value_end.rstrip(), xml.value_end.strip())
    if types == {"string", "null"}:
        if (yield from s.accept(*(null + end for null in ("null", "None") for end in ends))):
            s.out.arguments("null")
            return True
        types = {"string"}
    if types == {"string"}:
        s.out.arguments('"')
        end = yield from s.text_until(lambda text: s.out.arguments(_escaped(text)), *ends)
        s.out.arguments('"' if end else "")
    else:
        text, end = yield from s.collect_until(*ends)
        s.out.arguments(json.dumps(_typed(text, types), ensure_ascii=False) if end else "")
    return bool(end)


def _escaped(text: str) -> str:
    """The text as it stands within a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _typed(text: str, types: set[str]) -> Any:
    """The value that a text means if the schema allows these types. No types: any. A text that fits none stays text."""
    plain = text.strip()
    value: Any
    try:
        value = json.loads(plain, parse_constant=_refuse)
    except (ValueError, RecursionError):
        value = _WORDS.get(plain, text)
        if isinstance(value, str) and not types & {"string"} and plain[:1] in tuple("{[("):
            value = _python_value(plain, text)
    if isinstance(value, float) and value.is_integer() and "integer" in types and "number" not in types:
        value = int(value)
    if isinstance(value, str) and "string" in types:
        return text
    return value if not types or type_of(value) & types else text


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _python_value(plain: str, text: str) -> Any:
    """The value of a Python literal, such as {'a': True}; `text` if it is none that JSON can write."""
    try:
        value = ast.literal_eval(plain)
        json.dumps(value)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text
    return list(value) if isinstance(value, tuple) else value


def _argument_types(tool: Tool | None, key: str) -> set[str]:
    """The types that a tool's schema allows for one argument; empty if it does not say."""
    parameters = tool.get("parameters") if tool else None
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return types_of(properties.get(key), parameters) if isinstance(properties, dict) else set()


def typed_arguments(tool: Tool | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with the values that the tool's schema asks for in the place of texts."""
    return {
        key: _typed(value, types) if isinstance(value, str) and (types := _argument_types(tool, key)) else value
        for key, value in arguments.items()
    }
