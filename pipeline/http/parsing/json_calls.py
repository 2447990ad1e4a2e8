"""Calls that are JSON objects: {"name": "f", "arguments": {...}}. The text of the arguments streams as it arrives.

Arguments are not checked: if they are broken JSON, the client gets them as the model wrote them. An "id" in the object
is not used: models write the same one again in the next answer.
"""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Final

from pipeline.http.parsing.scanner import Emit, Scanner, Steps, read_call_list

_OUTSIDE: Final = re.compile(r'["{}\[\]<]')  # outside of strings
_INSIDE: Final = re.compile(r'["\\]')
_SCALAR: Final = re.compile(r"[\w.+-]*")
_STRING_TEXT: Final = re.compile(r'[^"\\]*')

_ARGUMENTS: Final = ("arguments", "parameters")
_CALL_KEYS: Final = ("name", *_ARGUMENTS, "type", "id")


def json_value(s: Scanner, emit: Emit) -> Steps[bool]:
    """Read one JSON value and emit its text as it arrives. False: the text ended or cannot be JSON any longer.

    "<" outside of a string is no JSON: it begins the marker of an unfinished call.
    """
    first = yield from s.peek()
    if first not in tuple('{["'):
        scalar = yield from s.run(_SCALAR)
        emit(scalar)
        return bool(scalar)
    depth, in_string = 0, False
    while True:
        at, is_complete = s.at, False
        while not is_complete and (match := (_INSIDE if in_string else _OUTSIDE).search(s.text, at)):
            char, at = match.group(), match.end()
            if char == "\\":
                if at == len(s.text) and not s.has_ended:
                    at -= 1
                    break  # the escaped character is still to come
                at += 1
            elif char == '"':
                in_string = not in_string
            elif char == "<":
                emit(s.text[s.at : at - 1])
                s.at = at - 1
                return False
            else:
                depth += 1 if char in "{[" else -1
            is_complete = depth == 0 and not in_string
        else:
            at = at if is_complete else len(s.text)
        emit(s.text[s.at : at])
        s.at = min(at, len(s.text))
        if is_complete:
            return True
        if not (yield from s.more()):
            return False


def json_string(s: Scanner) -> Steps[str | None]:
    """Read a string and return its value. None: no string comes, or it does not end, or it is broken."""
    parts: list[str] = []
    if (yield from s.peek()) != '"' or not (yield from json_value(s, parts.append)):
        return None
    try:
        return str(json.loads("".join(parts), strict=False))
    except ValueError:
        return None


def arguments_value(s: Scanner, emit: Emit) -> Steps[bool]:
    """Read the value of the arguments and emit its text as it arrives. False: the text ended in the value.

    A string is taken for JSON in JSON, as in OpenAI's API: its value is emitted once it has ended. null is no
    arguments.
    """
    first = yield from s.peek()
    if first in tuple("{["):
        return (yield from json_value(s, emit))
    parts: list[str] = []
    is_complete = yield from json_value(s, parts.append)
    text = "".join(parts)
    if first == '"' and is_complete:
        try:
            text = json.loads(text, strict=False)
        except ValueError:
            pass
    emit("{}" if is_complete and text in ("null", "") else text)
    return is_complete


def _plain_name(s: Scanner) -> Steps[str | None]:
    """Read a string that can name a function. None at the first character that shows that it does not."""
    if not (yield from s.accept('"')):
        return None
    name = yield from s.name()
    return name if (yield from s.accept('"')) else None


class _CallReader:
    """Reads one call object. `is_bare`: no marker stands before it, so an object with other keys is no call."""

    def __init__(self, s: Scanner, is_bare: bool, knows_names: bool) -> None:
        self._s, self._is_bare, self._knows_names = s, is_bare, knows_names
        self._name: str | None = None
        self._early: list[str] | None = None  # arguments that stand before the name
        self.has_begun = False

    def read(self) -> Steps[bool]:
        """False: this is no call, and the caller rewinds. A call that has begun is never taken back."""
        s = self._s
        yield from s.accept("{")
        while True:
            yield from s.skip_space()
            if (yield from s.accept("}")):
                break
            if (yield from s.accept(",")):
                continue
            key = yield from json_string(s)
            yield from s.skip_space()
            if key is None or not (yield from s.accept(":")) or (self._is_bare and key not in _CALL_KEYS):
                return self.has_begun
            yield from s.skip_space()
            if not (yield from self._value(key)):
                return self.has_begun
        if not self.has_begun and self._name is not None and (self._early is not None or not self._is_bare):
            self._begin(self._name)
            s.out.arguments("".join(self._early or ["{}"]))
        return self.has_begun

    def _value(self, key: str) -> Steps[bool]:
        """Read the value of one key. False: the object cannot be read further."""
        s = self._s
        if key in _ARGUMENTS and not self.has_begun:
            if self._name is not None:
                self._begin(self._name)
                return (yield from arguments_value(s, s.out.arguments))
            self._early = []
            return (yield from arguments_value(s, self._early.append))
        if key == "name" and self._name is None:
            self._name = yield from (_plain_name(s) if self._is_bare else json_string(s))
            return bool(self._name) and (not self._knows_names or self._name in s.tools)
        return (yield from json_value(s, lambda text: None))

    def _begin(self, name: str) -> None:
        self.has_begun = True
        self._s.release()
        self._s.out.begin_call(name)


def call_object(s: Scanner, *, is_bare: bool = False, knows_names: bool = False) -> Steps[bool]:
    """Read one call object, which begins here. False: this is no call; the caller has set a mark and rewinds.

    `knows_names`: only an object that names one of the request's tools is a call.
    """
    if (yield from s.peek()) != "{":
        return False
    return (yield from _CallReader(s, is_bare, knows_names).read())


def call_objects(s: Scanner, *, is_bare: bool = False, knows_names: bool = False) -> Steps[bool]:
    """Read one call object or a list of them. False: no call comes; the caller has set a mark and rewinds.

    In a list, text behind the last call that is no call is left to read.
    """
    read_one = partial(call_object, is_bare=is_bare, knows_names=knows_names)
    return (yield from read_call_list(s, read_one) if (yield from s.accept("[")) else read_one(s))
