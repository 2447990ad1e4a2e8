"""Families whose calls are JSON objects, and the JSON that a grammar made."""

from __future__ import annotations

from typing import Final

from pipeline.http.parsing.json_calls import arguments_value, call_objects
from pipeline.http.parsing.native_forms import NATIVE_FORMS
from pipeline.http.parsing.scanner import Scanner, Script, Steps

*_PYTHON_TAGS, _PYTHON_END = NATIVE_FORMS["llama3_json"].more_markers
_TOOL_CALLS: Final = NATIVE_FORMS["mistral"].begin
(_CALL_ID,) = NATIVE_FORMS["mistral"].more_markers
_ARGS: Final = NATIVE_FORMS["mistral"].middle


def tagged_json(begin: str, end: str = "") -> Script:
    """A call object, or a list of them, between two markers. The end may be missing.

    Hermes and Qwen:  <tool_call>\\n{"name": "f", "arguments": {"a": 1}}\\n</tool_call>
    Nemotron:         <TOOLCALL>[{"name": "f", "arguments": {"a": 1}}]</TOOLCALL>
    Granite:          <|tool_call|>[{"name": "f", "arguments": {"a": 1}}]
    """

    def script(s: Scanner) -> Steps[None]:
        while (yield from s.text_until(s.out.content, begin)):
            s.mark()
            yield from s.skip_space()
            if (yield from call_objects(s)):
                yield from skip_end(s, end)
            else:
                s.rewind()
                s.out.content(begin)

    return script


def skip_end(s: Scanner, end: str) -> Steps[None]:
    """Read the marker that ends a call, if it comes next."""
    s.mark()
    yield from s.skip_space()
    if end and (yield from s.accept_end(end)):
        s.release()
    else:
        s.rewind()


def llama3_json(s: Scanner) -> Steps[None]:
    """Call objects at the start of the answer or behind a tag, with ";" or white space between them.

    The tags are <|python_tag|>, and Llama 4's <|python_start|>, which <|python_end|> follows.

    {"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}
    """
    yield from _bare_objects(s)
    while tag := (yield from s.text_until(s.out.content, *_PYTHON_TAGS)):
        if not (yield from _bare_objects(s)):
            s.out.content(tag)


def _bare_objects(s: Scanner) -> Steps[bool]:
    """Read call objects that follow each other. False: no call comes."""
    num_calls = 0
    while True:
        s.mark()
        yield from s.skip_space()
        if num_calls and (yield from s.accept(";")):
            yield from s.skip_space()
        yield from s.accept(*_PYTHON_TAGS)
        yield from s.skip_space()
        if not (yield from call_objects(s, is_bare=True)):
            s.rewind()
            return num_calls > 0
        yield from skip_end(s, _PYTHON_END)
        num_calls += 1


def mistral(s: Scanner) -> Steps[None]:
    """Both of Mistral's forms. [ARGS] may be missing, and a [CALL_ID] with an id may stand before it.

    Since 2025:  [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}
    Before:      [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]
    """
    while (yield from s.text_until(s.out.content, _TOOL_CALLS)):
        s.mark()
        yield from s.skip_space()
        is_list = (yield from s.peek()) in tuple("[{")
        if not (yield from call_objects(s) if is_list else _named_arguments(s)):
            s.rewind()
            s.out.content(_TOOL_CALLS)


def _named_arguments(s: Scanner) -> Steps[bool]:
    """Read NAME[CALL_ID]ID[ARGS]{...}. False: this is no call."""
    name = yield from s.name()
    yield from s.skip_space()
    call_id = (yield from s.name()) if (yield from s.accept(_CALL_ID)) else None
    yield from s.accept(_ARGS)
    yield from s.skip_space()
    if not name or (yield from s.peek()) != "{":
        return False
    s.release()
    s.out.begin_call(name, call_id or None)
    yield from arguments_value(s, s.out.arguments)
    return True


def any_json(s: Scanner) -> Steps[None]:
    """For models of no known family: an answer that begins with a call object, or a list of them, is a call.

    Each must name a tool of the request.

    {"name": "f", "arguments": {"a": 1}}
    """
    s.mark()
    yield from s.skip_space()
    if not (yield from call_objects(s, is_bare=True, knows_names=True)):
        s.rewind()
    yield from s.rest(s.out.content)


def json_list(s: Scanner) -> Steps[None]:
    """The list of calls that a grammar made.

    [{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {}}]
    """
    s.mark()
    yield from s.skip_space()
    if not (yield from call_objects(s)):
        s.rewind()
    yield from s.rest(s.out.content)


def json_arguments(s: Scanner) -> Steps[None]:
    """The arguments of the one tool of the request, which a grammar made: {"a": 1}"""
    yield from s.skip_space()
    if (yield from s.peek()):
        s.out.begin_call(next(iter(s.tools)))
        yield from s.rest(s.out.arguments)
