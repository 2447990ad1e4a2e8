"""Reads text that arrives in pieces, cut anywhere. Gives events as soon as they are certain.

A parser is a script: a generator that reads from a Scanner, from the start of the text to its end, and pauses at
`yield` while it needs more text. Scripts are made of the reading steps below, called with `yield from`.

A step holds back only what it cannot judge yet. Text before a marker leaves at once, except for the longest tail that
can be the beginning of the marker.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, TypeVar

from pipeline.http.generation.events import Content, Event, Reasoning, ToolArguments, ToolCallBegin

T = TypeVar("T")
Steps = Generator[None, None, T]  # pauses for more text; returns a T
Tool = Mapping[str, Any]  # the definition of a function: name, description, parameters, strict
Emit = Callable[[str], object]

_ID_CHARACTERS: Final = string.ascii_letters + string.digits
_SPACE: Final = re.compile(r"\s*")
_NAME: Final = re.compile(r"[\w.:/-]*")  # of functions; also ids of calls


class Output:
    """The events of one sample that are not taken yet.

    White space between the start of the answer or a call and the next call is part of no event. So white space waits
    there until other text arrives.

    `call_id_length`: the number of letters and digits in the ids of calls that have none; 0: the API draws those ids.
    """

    def __init__(self, call_id_length: int = 0) -> None:
        self._call_id_length = call_id_length
        self._events: list[Event] = []
        self._space: str | None = ""  # white space that waits; None: text came before
        self.num_calls = 0
        self.is_call_empty = False  # the call that began last has no arguments yet

    def content(self, text: str) -> None:
        if self._space is not None:
            text = self._space + text
            if not text or text.isspace():
                self._space = text
                return
            self._space = None
        self._add(Content(text))

    def plain(self, text: str) -> None:
        """Content in which no call is looked for: its white space leaves at once."""
        self._add(Content(text))

    def reasoning(self, text: str) -> None:
        self._add(Reasoning(text))

    def begin_call(self, name: str, call_id: str | None = None) -> None:
        self._space = ""
        self.num_calls += 1
        self.is_call_empty = True
        if call_id is None and self._call_id_length:
            call_id = "".join(secrets.choice(_ID_CHARACTERS) for _ in range(self._call_id_length))
        self._events.append(ToolCallBegin(name, call_id))

    def arguments(self, text: str) -> None:
        self.is_call_empty = self.is_call_empty and not text
        self._add(ToolArguments(text))

    def finish(self) -> None:
        """The text has ended. White space of an answer without calls is content."""
        if self._space and not self.num_calls:
            self._events.append(Content(self._space))
        self._space = None

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _add(self, event: Content | Reasoning | ToolArguments) -> None:
        if not event.text:
            return
        last = self._events[-1] if self._events else None
        if type(last) is type(event):
            self._events[-1] = type(event)(last.text + event.text)
        else:
            self._events.append(event)


class Markers:
    """Texts that a script waits for."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = sorted(texts, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self.texts)))
        self._first = re.compile("[" + "".join(re.escape(text[0]) for text in self.texts) + "]")
        self._longest = len(self.texts[0])

    def find(self, text: str, start: int) -> re.Match[str] | None:
        return self._pattern.search(text, start)

    def tail(self, text: str, start: int) -> int:
        """Where the longest tail begins that can be the beginning of a marker; the text's length without one."""
        for match in self._first.finditer(text, max(start, len(text) - self._longest + 1)):
            rest = text[match.start() :]
            if any(marker.startswith(rest) for marker in self.texts):
                return match.start()
        return len(text)


@lru_cache(maxsize=256)
def markers_of(texts: tuple[str, ...]) -> Markers:
    return Markers(texts)


class Scanner:
    """The text of one sample that has arrived and is not read yet."""

    def __init__(self, tools: Sequence[Tool] = (), call_id_length: int = 0) -> None:
        self.tools = {str(tool.get("name")): tool for tool in tools}
        self.out = Output(call_id_length)
        self.text = ""
        self.at = 0  # the next character to read
        self.has_ended = False
        self._mark: int | None = None

    def feed(self, text: str) -> None:
        start = self.at if self._mark is None else self._mark
        self.text = self.text[start:] + text
        self.at -= start
        if self._mark is not None:
            self._mark = 0

    def mark(self) -> None:
        """Keep the text from here on, so that `rewind` can come back. There is one mark; a later one replaces it."""
        self._mark = self.at

    def rewind(self) -> None:
        assert self._mark is not None, "no mark is set"
        self.at, self._mark = self._mark, None

    def release(self) -> None:
        """Forget the mark: the text that was read since then is settled."""
        self._mark = None

    def more(self) -> Steps[bool]:
        """Wait for more text. False: the text has ended."""
        if self.has_ended:
            return False
        yield
        return True

    def peek(self) -> Steps[str]:
        """The next character, not read; "" at the end of the text."""
        while self.at == len(self.text):
            if not (yield from self.more()):
                return ""
        return self.text[self.at]

    def accept(self, *options: str) -> Steps[str]:
        """Read the longest of the options that comes next and return it; "" and nothing is read if none comes."""
        while True:
            rest = len(self.text) - self.at
            for option in markers_of(options).texts:
                if self.text.startswith(option, self.at):
                    self.at += len(option)
                    return option
                if rest < len(option) and option.startswith(self.text[self.at :]) and not self.has_ended:
                    break  # this option may still come
            else:
                return ""
            yield

    def accept_end(self, *ends: str) -> Steps[bool]:
        """Read one of the end markers if it comes next. The start of one is read, too, if the text ends in it."""
        if (yield from self.accept(*ends)):
            return True
        rest = self.text[self.at :]
        if not (self.has_ended and rest and any(end.startswith(rest) for end in ends)):
            return False
        self.at = len(self.text)
        return True

    def run(self, pattern: re.Pattern[str]) -> Steps[str]:
        """Read the longest text that a pattern of the form `[...]*` matches."""
        parts = []
        while True:
            match = pattern.match(self.text, self.at)
            assert match is not None, "the pattern matches the empty text"
            parts.append(match.group())
            self.at = match.end()
            if self.at < len(self.text) or not (yield from self.more()):
                return "".join(parts)

    def skip_space(self) -> Steps[str]:
        return self.run(_SPACE)

    def name(self) -> Steps[str]:
        return self.run(_NAME)

    def text_until(self, emit: Emit, *markers: str) -> Steps[str]:
        """Read up to the first marker, the marker included. Return it; "" if the text ends before one.

        The text before it goes to `emit` as it arrives.
        """
        known = markers_of(markers)
        while True:
            match = known.find(self.text, self.at)
            end = match.start() if match else len(self.text) if self.has_ended else known.tail(self.text, self.at)
            if end > self.at:
                emit(self.text[self.at : end])
            if match:
                self.at = match.end()
                return match.group()
            self.at = end
            if not (yield from self.more()):
                return ""

    def collect_until(self, *markers: str) -> Steps[tuple[str, str]]:
        """The text before the first marker, and that marker; ("...", "") if the text ends before one."""
        parts: list[str] = []
        marker = yield from self.text_until(parts.append, *markers)
        return "".join(parts), marker

    def rest(self, emit: Emit) -> Steps[None]:
        """Read all the rest of the text."""
        while True:
            if self.at < len(self.text):
                emit(self.text[self.at :])
                self.at = len(self.text)
            if not (yield from self.more()):
                return


def read_call_list(s: Scanner, read_call: Callable[[Scanner], Steps[bool]]) -> Steps[bool]:
    """Read calls between brackets, behind the "[". False: no call comes; the caller has set a mark and rewinds.

    Text behind the last call that is no call is left to read.
    """
    num_calls = 0
    while True:
        if num_calls:
            s.mark()
        yield from s.skip_space()
        if num_calls:
            if (yield from s.accept("]")):
                s.release()
                return True
            yield from s.accept(",")
            yield from s.skip_space()
        if not (yield from read_call(s)):
            if num_calls:
                s.rewind()
            return num_calls > 0
        num_calls += 1


Script = Callable[[Scanner], Steps[None]]


class ScriptParser:
    """Runs a script over the text of one sample. An OutputParser."""

    def __init__(self, script: Script, tools: Sequence[Tool] = (), call_id_length: int = 0) -> None:
        self._scanner = Scanner(tools, call_id_length)
        self._steps = script(self._scanner)
        next(self._steps, None)

    def push(self, text: str) -> list[Event]:
        """Read more text of the sample, cut anywhere."""
        self._scanner.feed(text)
        next(self._steps, None)
        return self._scanner.out.take()

    def finish(self) -> list[Event]:
        """End the text. Returns the events of the text that was held back."""
        self._scanner.has_ended = True
        next(self._steps, None)
        self._scanner.out.finish()
        return self._scanner.out.take()
