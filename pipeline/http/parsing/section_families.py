"""Families that write a section of calls, each between special tokens: DeepSeek and Kimi."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from pipeline.http.parsing.json_calls import arguments_value
from pipeline.http.parsing.json_families import skip_end
from pipeline.http.parsing.native_forms import NATIVE_FORMS
from pipeline.http.parsing.scanner import Scanner, Script, Steps

_SEPARATOR: Final = NATIVE_FORMS["deepseek_v31"].middle
_ARGUMENT_BEGIN: Final = "<|tool_call_argument_begin|>"
_LINE: Final = re.compile(r"[^\n<{]*")
_INDEX: Final = re.compile(r":\d+$")


def section(begin: str, call_begin: str, end: str, read_call: Callable[[Scanner], Steps[bool]]) -> Script:
    """Calls that each begin with `call_begin`, between `begin` and `end`. Both may be missing.

    `read_call` reads a call behind `call_begin`. It returns False if no call comes, and the script rewinds.
    """

    def script(s: Scanner) -> Steps[None]:
        while marker := (yield from s.text_until(s.out.content, begin, call_begin)):
            s.mark()
            if marker == begin:
                yield from s.skip_space()
            if (marker == begin and not (yield from s.accept(call_begin))) or not (yield from read_call(s)):
                s.rewind()
                s.out.content(marker)
                continue
            while True:
                s.mark()
                yield from s.skip_space()
                if (yield from s.accept(call_begin)) and (yield from read_call(s)):
                    continue
                s.rewind()
                break
            yield from skip_end(s, end)

    return script


def _deepseek_call(s: Scanner) -> Steps[bool]:
    name = yield from s.run(_LINE)
    if not (yield from s.accept(_SEPARATOR)):
        return False
    yield from s.skip_space()
    if (yield from s.peek()) != "{":  # before V3.1, the type of the tool stands here
        name = yield from s.run(_LINE)
        yield from s.skip_space()
        yield from s.accept("```json")
        yield from s.skip_space()
    if not name.strip() or (yield from s.peek()) != "{":
        return False
    s.release()
    s.out.begin_call(name.strip())
    yield from arguments_value(s, s.out.arguments)
    yield from skip_end(s, "```")
    yield from skip_end(s, NATIVE_FORMS["deepseek_v31"].end)
    return True


def _kimi_call(s: Scanner) -> Steps[bool]:
    yield from s.skip_space()
    call_id = yield from s.name()
    yield from s.skip_space()
    if not call_id or not (yield from s.accept(_ARGUMENT_BEGIN)):
        return False
    yield from s.skip_space()
    if (yield from s.peek()) != "{":
        return False
    s.release()
    s.out.begin_call(_INDEX.sub("", call_id.removeprefix("functions.")), call_id)
    yield from arguments_value(s, s.out.arguments)
    yield from skip_end(s, NATIVE_FORMS["kimi_k2"].end)
    return True


def deepseek() -> Script:
    """DeepSeek's forms; with ``` as in V3 and R1, or without it as in V3.1.

    V3, R1:  <｜tool▁call▁begin｜>function<｜tool▁sep｜>f\\n```json\\n{"a": 1}\\n```<｜tool▁call▁end｜>
    V3.1:    <｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>
    """
    form = NATIVE_FORMS["deepseek_v31"]
    return section(form.section_begin, form.begin, form.section_end, _deepseek_call)


def kimi_k2() -> Script:
    """Kimi K2's form. The id of a call holds its name and is kept.

    <|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>
    """
    form = NATIVE_FORMS["kimi_k2"]
    return section(form.section_begin, "<|tool_call_begin|>", form.section_end, _kimi_call)
