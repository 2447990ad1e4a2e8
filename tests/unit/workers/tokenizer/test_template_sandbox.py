"""Templates that try to harm the engine end with an error of their own request, in bounded time and memory."""

from __future__ import annotations

import gc
import signal
import time

import pytest

from ipc.errors import InvalidRequest
from tests.unit.workers.text.tools import encoded_chat, user_chat
from workers.tokenizer.chat_template import ChatTemplates
from workers.tokenizer.render_limits import RenderLimits, _resident_bytes

TIMEOUT_S = 0.1
MEMORY_SLACK_BYTES = 400 << 20  # 256 MiB and one operation


def repeated(step: str, start: str = "'ab'") -> str:
    """A template that takes a step 100 times."""
    return (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range(100) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
        "{{ ns.x }}"
    )


LONG = "{% set x = 'a' * 10000000 %}"
HUGE: dict[str, str] = {
    "a repeated text": "{{ 'a' * 10**10 }}",
    "a text repeated from the left": "{{ 10**10 * 'a' }}",
    "a repeated list": "{{ [0] * 10**10 }}",
    "a range": "{% for i in range(10**12) %}x{% endfor %}",
    "a power": "{{ 2 ** (10**10) }}",
    "squares": repeated("ns.x * ns.x", "3"),
    "a doubled text": repeated("ns.x + ns.x"),
    "a doubled concatenation": repeated("ns.x ~ ns.x"),
    "a long concatenation": LONG + "{{ x" + " ~ x" * 100 + " }}",
    "a doubled list": repeated("ns.x + ns.x", "[1]"),
    "lists of lists": repeated("[ns.x, ns.x]"),
    "tuples of tuples": repeated("(ns.x, ns.x)"),
    "repeated lists of lists": repeated("[ns.x] * 2"),
    "dictionaries of dictionaries": repeated("{'a': ns.x, 'b': ns.x}"),
    "calls of dict": repeated("dict(a=ns.x, b=ns.x)"),
    "calls of fromkeys": repeated("{}.fromkeys([1, 2], ns.x)"),
    "a block": LONG + "{% set y %}{% for i in range(99999) %}{{ x }}{% endfor %}{% endset %}{{ y }}",
    "a doubling macro": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}" + repeated("m(ns.x)"),
    "a centred text": "{{ 'a'.center(10**10) }}",
    "a padded text": "{{ 'a'.zfill(10**10) }}",
    "the filter center": "{{ 'a' | center(10**10) }}",
    "the filter block center": "{% filter center(10**10) %}x{% endfilter %}",
    "tabs": "{{ '\t'.expandtabs(tabsize=10**10) }}",
    "replaced characters": LONG + "{{ x.replace('a', x) }}",
    "replaced nothing": LONG + "{{ x | replace('', x) }}",
    "a joined list": LONG + "{{ x.join(['a'] * 100000) }}",
    "a joined range": LONG + "{{ range(99999) | join(x) }}",
    "a format": "{{ '{:>10000000000}'.format(1) }}",
    "a nested format": "{{ '{:>{}}'.format(1, 10**10) }}",
    "a repeated format": LONG + "{{ ('{0}' * 10000).format(x) }}",
    "a format of a map": "{{ '{a:>10000000000}'.format_map({'a': 1}) }}",
    "a format with %": "{{ '%10000000000d' % 1 }}",
    "a format with a computed width": "{{ '%*d' % (10**10, 1) }}",
    "the filter format": "{{ '%.10000000000f' | format(1) }}",
    "a map format with %": LONG + "{{ ('%(a)s' * 10000) % {'a': x} }}",
    "an indentation": "{{ 'a\nb' | indent(10**10) }}",
    "an indentation with a text": LONG + "{{ ('a\n' * 100000) | indent(x) }}",
    "a batch": "{{ [1] | batch(10**10, 'x') | list }}",
    "a sum of lists": "{% set x = [0] * 100000 %}{{ [x, x, x, x, x, x] | sum(start=[]) }}",
    "digits": "{{ 1.5 | round(10**9, 'ceil') }}",
    "indented JSON": "{{ [1] | tojson(indent=10**10) }}",
    "separators of JSON": LONG + "{{ [1, 2] | tojson(separators=(x, x)) }}",
    "a list of letters": LONG + "{{ x | list }}",
    "bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "a translation": LONG + "{{ x.translate({97: x}) }}",
    "stripped letters": LONG + "{{ x.strip(x ~ 'b') }}",
    "a date": "{{ strftime_now('%Y' * 1000) }}",
    "output": LONG + "{% for i in range(99999) %}{{ x }}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "brackets": "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
    "terms": "{{ " + "1+" * 3_000 + "1 }}",
}  # fmt: skip
SLOW: dict[str, str] = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros that call twice": "{% macro m(n) %}{% if n %}{{ m(n-1) ~ m(n-1) }}{% endif %}{% endmacro %}{{ m(100) }}",
    "slices": "{{ [1] | slice(10**10) | list }}",
}
LARGE: dict[str, str] = {
    "many long texts": repeated("ns.x + [i | string * 4000000]", "[]"),
    "pieces": "{% set x = 'ab ' * 5000000 %}{{ (x.split(' '), x.split(' ')) | length }}",
}
ESCAPES: dict[str, str] = {
    "a class": "{{ ''.__class__.__mro__ }}",
    "a class as item": "{{ ''['__class__'].x }}",
    "a class by filter": "{{ (''|attr('__class__')).x }}",
    "a class by map": "{{ (['']|map(attribute='__class__')|first).x }}",
    "a class by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "a class by a format of a map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
    "a class by a stored format": "{% set f = ['{0.__class__.x}'.format] %}{{ f[0]('') }}",
    "globals of a function": "{{ raise_exception.__globals__.x }}",
    "globals of a method": "{{ cycler.__init__.__globals__.x }}",
    "the template itself": "{{ self.__init__.x }}",
    "its context": "{{ self._TemplateReference__context.x }}",
    "a namespace of names": "{% set ns = namespace(__class__=1) %}",
    "a name of a namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "the type of dictionaries": "{{ dict.mro() }}",
    "a change of a list": "{{ messages.append(1) }}",
    "a change of a message": "{{ messages[0].update({}) }}",
    "a file": "{% include '/etc/passwd' %}",
    "another template": "{% extends 'x' %}",
}


def refusal(source: str, timeout_s: float = TIMEOUT_S) -> str:
    templates = ChatTemplates({"default": source}, {}, timeout_s=timeout_s)
    with pytest.raises(InvalidRequest) as caught:
        templates.render(user_chat("hi"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_value_is_refused_before_it_is_made(name: str) -> None:
    before, start_s = _resident_bytes(), time.thread_time()
    assert "more than 1 s" not in refusal(HUGE[name], timeout_s=1.0)
    assert time.thread_time() - start_s < 1.0
    assert _resident_bytes() - before < MEMORY_SLACK_BYTES


@pytest.mark.parametrize("name", SLOW)
def test_a_slow_template_is_interrupted(name: str) -> None:
    start_s = time.thread_time()
    assert "takes more than 0.1 s of processor time (tokenizer.template_timeout_s)" in refusal(SLOW[name])
    assert time.thread_time() - start_s < 10 * TIMEOUT_S


@pytest.mark.parametrize("name", LARGE)
def test_a_template_that_takes_much_memory_is_interrupted(name: str) -> None:
    before = _resident_bytes()
    assert "takes more than 256 MiB of memory" in refusal(LARGE[name], timeout_s=5.0)
    assert _resident_bytes() - before < MEMORY_SLACK_BYTES


@pytest.mark.parametrize("name", ESCAPES)
def test_python_behind_the_values_is_out_of_reach(name: str) -> None:
    assert "refuses this chat" in refusal(ESCAPES[name])


def test_the_output_is_bounded_by_what_the_engine_can_take() -> None:
    templates = ChatTemplates({"default": "{% for i in range(100) %}{{ messages[0].content }}{% endfor %}"}, {})
    assert len(templates.render(user_chat("x" * 10), 1_000)) == 1_000
    with pytest.raises(InvalidRequest, match="the rendered chat has more than 999 characters"):
        templates.render(user_chat("x" * 10), 999)


def test_hostile_input_of_an_honest_template_is_bounded_too() -> None:
    templates = ChatTemplates({"default": "{{ messages[0].content }}{{ messages[0].x | tojson(indent=4) }}"}, {})
    for depth, text in ((900, "has more than 1000000 characters"), (5_000, "messages is nested too deeply")):
        deep = '{"a":' * depth + "1" + "}" * depth
        chat = encoded_chat(f'[{{"role": "user", "content": "x", "x": {deep}}}]'.encode())
        with pytest.raises(InvalidRequest, match=text):
            templates.render(chat, 1_000_000)
    wide = encoded_chat([{"role": "user", "content": "x", "x": list(range(100_000))}])
    assert len(templates.render(wide)) > 100_000


def test_a_template_of_a_request_is_compiled_within_the_limits() -> None:
    templates = ChatTemplates({}, {}, trust_requests=True, timeout_s=TIMEOUT_S)
    with pytest.raises(InvalidRequest, match=r"takes more than 0\.1 s"):
        templates.render(encoded_chat([{"role": "user", "content": "x"}], template="{{ a.b[c] }}" * 21_000))


def test_limits_leave_no_timer_behind_and_a_late_signal_does_nothing() -> None:
    limits = RenderLimits(0.05)

    def forever() -> None:
        while True:
            pass

    for _ in range(2):
        with pytest.raises(InvalidRequest, match=r"more than 0\.05 s"):
            limits.run(forever)
        signal.raise_signal(signal.SIGPROF)
        assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
        assert gc.isenabled()
    assert limits.run(lambda: 5) == 5
    assert limits.run(gc.isenabled) is False
    with pytest.raises(ZeroDivisionError):
        limits.run(lambda: 1 // 0)
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
