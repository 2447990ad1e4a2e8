"""Families whose calls are Python: [f(a=1, b="x"), g()]. The arguments are written as JSON while they arrive."""

from __future__ import annotations

import json
import re
from typing import Final

from pipeline.http.parsing.json_families import skip_end
from pipeline.http.parsing.scanner import Emit, Scanner, Script, Steps, read_call_list

_WORD: Final = re.compile(r"[\w.+-]*")
_NUMBER: Final = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_HEX: Final = re.compile(r"[0-9a-fA-F]+")
_WORDS: Final = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0", "\n": ""}
_HEX_LENGTHS: Final = {"x": 2, "u": 4, "U": 8}
_QUOTES: Final = ('"""', "'''", '"', "'")
_CLOSING: Final = {"[": "]", "(": ")", "{": "}"}
_MAX_DEPTH: Final = 50


def pythonic(begin: str, end: str, *, needs_begin: bool) -> Script:
    """A list of Python calls with named arguments; at the start of the answer, or behind `begin`.

    Llama 3.2 and 4:  [f(a=1, b="x"), g()]
    LFM2:             <|tool_call_start|>[f(a=1, b="x"), g()]<|tool_call_end|>
    """

    def script(s: Scanner) -> Steps[None]:
        if not needs_begin:
            s.mark()
            yield from s.skip_space()
            yield from s.accept(begin)
            if (yield from _calls(s)):
                yield from skip_end(s, end)
            else:
                s.rewind()
        while (yield from s.text_until(s.out.content, begin)):
            s.mark()
            if (yield from _calls(s)):
                yield from skip_end(s, end)
            else:
                s.rewind()
                s.out.content(begin)

    return script


def _calls(s: Scanner) -> Steps[bool]:
    """Read a list of calls. False: no call comes; the caller rewinds. Text behind the last call is left to read."""
    yield from s.skip_space()
    return bool((yield from s.accept("["))) and (yield from read_call_list(s, _call))


def _call(s: Scanner) -> Steps[bool]:
    """Read one call. False: this is no call. A call is certain at its first `name=`, or at `)`."""
    name = yield from s.name()
    if not name or not (yield from s.accept("(")):
        return False
    num_arguments = 0
    while True:
        yield from s.skip_space()
        if (yield from s.accept(")")):
            break
        if num_arguments:
            if not (yield from s.accept(",")):
                return True  # broken: the rest of the text is content
            yield from s.skip_space()
            if (yield from s.accept(")")):
                break
            s.mark()
        key = yield from s.name()
        yield from s.skip_space()
        if not key or not (yield from s.accept("=")):
            if num_arguments:
                s.rewind()
            return num_arguments > 0
        s.release()
        if not num_arguments:
            s.out.begin_call(name)
        s.out.arguments(("{" if not num_arguments else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
        num_arguments += 1
        if not (yield from _value(s, s.out.arguments, _MAX_DEPTH)):
            return True
    if not num_arguments:
        s.release()
        s.out.begin_call(name)
        s.out.arguments("{")
    s.out.arguments("}")
    return True


def _value(s: Scanner, emit: Emit, depth: int) -> Steps[bool]:
    """Read a Python literal and emit it as JSON. False: the text ended, or it is no literal that JSON can write."""
    yield from s.skip_space()
    if opening := (yield from s.accept(*_CLOSING)):
        return bool(depth) and (yield from _items(s, emit, opening, depth - 1))
    if quote := (yield from s.accept(*_QUOTES)):
        return (yield from _string(s, emit, quote))
    s.mark()
    word = yield from s.run(_WORD)
    text = _WORDS.get(word) or (word if _NUMBER.fullmatch(word) else None)
    if text is None:
        s.rewind()
        return False
    s.release()
    emit(text)
    return True


def _items(s: Scanner, emit: Emit, opening: str, depth: int) -> Steps[bool]:
    """Read the items of a list, a tuple or a dict behind its opening bracket."""
    closing = _CLOSING[opening]
    emit("{" if opening == "{" else "[")
    num_items = 0
    while True:
        yield from s.skip_space()
        if (yield from s.accept(closing)):
            break
        if num_items:
            if not (yield from s.accept(",")):
                return False
            yield from s.skip_space()
            if (yield from s.accept(closing)):
                break
            emit(", ")
        if opening == "{" and not (yield from _key(s, emit)):
            return False
        if not (yield from _value(s, emit, depth)):
            return False
        num_items += 1
    emit("}" if opening == "{" else "]")
    return True


def _key(s: Scanner, emit: Emit) -> Steps[bool]:
    """Read the key of a dict, which is a string, and the colon."""
    quote = yield from s.accept(*_QUOTES)
    if not quote or not (yield from _string(s, emit, quote)):
        return False
    yield from s.skip_space()
    if not (yield from s.accept(":")):
        return False
    emit(": ")
    return True


def _string(s: Scanner, emit: Emit, quote: str) -> Steps[bool]:
    """Read a string behind its opening quote and emit it as a JSON string."""

    def emit_escaped(text: str) -> None:
        emit(json.dumps(text, ensure_ascii=False)[1:-1])

    emit('"')
    while marker := (yield from s.text_until(emit_escaped, quote, "\\")):
        if marker == quote:
            emit('"')
            return True
        char = yield from s.peek()
        s.at += len(char)
        digits = ""
        while char in _HEX_LENGTHS and len(digits) < _HEX_LENGTHS[char] and _HEX.match((yield from s.peek())):
            digits += s.text[s.at]
            s.at += 1
        if char == "u" and len(digits) == 4:
            emit("\\u" + digits)  # JSON has the same escape, and joins the halves of a pair as Python does not
        elif char in _HEX_LENGTHS and len(digits) == _HEX_LENGTHS[char] and int(digits, 16) <= 0x10FFFF:
            emit(json.dumps(chr(int(digits, 16)))[1:-1])
        elif char in _ESCAPES:
            emit_escaped(_ESCAPES[char])
        else:
            emit_escaped((char if char in ("'", '"', "\\") else "\\" + char) + digits)
    return False
