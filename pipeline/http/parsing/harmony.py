"""Harmony, the form of gpt-oss: messages in channels, from the text with its special tokens.

<|channel|>analysis<|message|>REASONING<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json
<|message|>{"a": 1}<|call|>  (without the line break), or at the end <|channel|>final<|message|>ANSWER<|return|>

Source: OpenAI's "harmony response format". The prompt ends with <|start|>assistant.
"""

from __future__ import annotations

import re
from typing import Final

from pipeline.http.generation.events import Content, Event, ToolArguments, ToolCallBegin
from pipeline.http.parsing.scanner import Emit, Scanner, Script, ScriptParser, Steps

TAGS: Final = ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>")

_HEADERS: Final = ("<|start|>", "<|channel|>", " to=")  # the beginnings of a message, behind the prompt
_MESSAGE: Final = "<|message|>"
_ENDS: Final = ("<|end|>", "<|return|>", "<|call|>")
_CHANNEL: Final = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT: Final = re.compile(r"\bto=([^\s<]+)")


def harmony(answer: Script | None, *, starts_inside: bool, reads_calls: bool) -> Script:
    """Reads messages: analysis is reasoning, a message to a function is its call, any other is content.

    `answer` reads the text of the channel "final" where a grammar has made calls there; None: it is content.
    Text outside of messages is content. `starts_inside`: the prompt has opened a message of analysis.
    """

    def script(s: Scanner) -> Steps[None]:
        final = ScriptParser(answer, list(s.tools.values())) if answer else None

        def emit_final(text: str) -> None:
            if final is None:
                s.out.plain(text)
            else:
                _forward(s, final.push(text))

        emit: Emit | None = s.out.reasoning if starts_inside else None
        marker = ""
        while True:
            if emit is None:
                marker = marker or (yield from s.accept(*_HEADERS))
                emit = (yield from _header(s, marker, emit_final, reads_calls)) if marker else emit_final
            marker = yield from s.text_until(emit, *_ENDS, *_HEADERS[:2])
            if not marker:
                break
            if emit == s.out.arguments and s.out.is_call_empty:
                s.out.arguments("{}")
            emit = None
            if marker in _ENDS:
                marker = ""
                yield from s.skip_space()
                if (yield from s.peek()) == "":
                    break
        if final is not None:
            _forward(s, final.finish())

    return script


def _header(s: Scanner, begin: str, emit_final: Emit, reads_calls: bool) -> Steps[Emit]:
    """Read the rest of a message's header. Returns where the text of the message goes."""
    text, marker = yield from s.collect_until(_MESSAGE, *_ENDS)
    header = begin + text
    if marker != _MESSAGE:  # no header, or the text has ended in it
        s.out.plain(header + marker if marker else "")
        return s.out.plain
    channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
    if recipient is not None and reads_calls and recipient[1].startswith("functions."):
        s.out.begin_call(recipient[1].removeprefix("functions."))
        return s.out.arguments
    if channel is not None and channel[1] == "analysis":
        return s.out.reasoning
    return emit_final if channel is not None and channel[1] == "final" else s.out.plain


def _forward(s: Scanner, events: list[Event]) -> None:
    """Pass on the events of the parser of the final channel."""
    for event in events:
        if isinstance(event, ToolCallBegin):
            s.out.begin_call(event.name, event.call_id)
        elif isinstance(event, ToolArguments):
            s.out.arguments(event.text)
        elif isinstance(event, Content):
            s.out.plain(event.text)
