"""Rendered chats: the same text as transformers gives, and the forms of vLLM's API where transformers has none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ipc.errors import ConfigError, InvalidRequest
from tests.unit.workers.text.tools import byte_level_tokenizer, encoded_chat
from tests.unit.workers.tokenizer.template_families import CHATML, FAMILIES, GEMMA, LLAMA, MISTRAL, ONLY_PARTS, PARTS
from workers.tokenizer.chat_template import ChatTemplates

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
REFERENCE = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), **NAMES)
OURS = {name: ChatTemplates({"default": source}, NAMES) for name, source in FAMILIES.items()}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "What's it like <there>?",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
HI = {"role": "user", "content": "hi"}


def render(source: str, messages: Any, *, trust_requests: bool = False, **fields: Any) -> str:
    templates = ChatTemplates({"default": source}, NAMES, trust_requests=trust_requests)
    return templates.render(encoded_chat(messages, **fields))


def refusal(source: str, messages: Any, **fields: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        render(source, messages, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def expected(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """transformers' own text. It takes the arguments of calls as objects."""
    options = {"add_generation_prompt": not options.get("continue_final_message", False), **options}
    text: str = REFERENCE.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
    return text


# Texts are the same as transformers'

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["", " x ", "{{ 1 }}", "{% if %}", "<|im_end|>", "a\n\n b\n", '"quoted" & <b>', "<tool_response>"]
)
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.just("call12345"), "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {
                    "name": st.sampled_from(["weather", "f"]),
                    "arguments": st.dictionaries(TEXTS, JSON_VALUES, max_size=3),
                }
            ),
        }
    ),
    min_size=1, max_size=2,
)  # fmt: skip


@st.composite
def chats(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A conversation: a system message or none, then turns, some with calls and their results."""
    messages = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXTS)})
        if draw(st.booleans()):
            messages.append({"role": "assistant", "content": draw(TEXTS), "tool_calls": draw(CALLS)})
            messages += [{"role": "tool", "content": draw(TEXTS), "tool_call_id": "call12345"}] * draw(
                st.integers(1, 2)
            )
        if draw(st.booleans()):
            messages.append({"role": "assistant", "content": draw(TEXTS)})
            if draw(st.booleans()):
                messages[-1]["reasoning_content"] = draw(TEXTS)
    return messages


def as_openai_writes(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages with the arguments of calls as JSON in a string, and null for what is not there."""
    return [
        {"refusal": None, **message}
        if "tool_calls" not in message
        else {
            **message,
            "tool_calls": [
                {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ],
        }
        for message in messages
    ]


def outcome(make: Callable[[], str]) -> str | None:
    try:
        return make()
    except Exception:
        return None


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(messages=chats(), tools=st.sampled_from([None, TOOLS]), begins=st.booleans())
def test_any_chat_is_rendered_as_transformers_does(
    family: str, messages: list[dict[str, Any]], tools: Any, begins: bool
) -> None:
    want = outcome(lambda: expected(FAMILIES[family], messages, tools=tools, add_generation_prompt=begins))
    chat = encoded_chat(as_openai_writes(messages), tools=tools, add_generation_prompt=begins)
    assert outcome(lambda: OURS[family].render(chat)) == want


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(messages=chats())
def test_a_continued_chat_ends_where_transformers_ends_it(family: str, messages: list[dict[str, Any]]) -> None:
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    want = outcome(lambda: expected(FAMILIES[family], messages, **options))
    assert outcome(lambda: OURS[family].render(encoded_chat(messages, **options))) == want


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}, {"enable_thinking": True}, {"bos_token": "!"}])
def test_variables_of_the_request_reach_the_template(kwargs: dict[str, Any]) -> None:
    for source in (CHATML, LLAMA):
        assert render(source, [HI], template_kwargs=kwargs) == expected(source, [HI], **kwargs)
    assert ("</think>" in render(CHATML, [HI], template_kwargs=kwargs)) == (kwargs.get("enable_thinking") is False)


def test_documents_reach_the_template() -> None:
    source = "{% for d in documents %}[{{ d.title }}]{% endfor %}{{ documents is none }}"
    documents = [{"title": "a"}, {"title": "b"}]
    assert render(source, [HI], documents=documents) == expected(source, [HI], documents=documents) == "[a][b]False"
    assert render(source.replace("d in documents", "d in documents or []"), [HI]) == "True"


def test_filters_with_bounds_write_what_jinja2_writes() -> None:
    source = """{{ 'a\nb'|indent(2) }}{{ 'a\n\nb'|indent('> ', true, true) }}{{ 'x'|center(5) }}
{{ 7|round }}{{ 7.25|round(1) }}
{{ [3, 1]|sort }}{{ [1, 2, 3]|batch(2, 0)|list }}{{ [1, 2, 3]|slice(2)|list }}{{ 'ab'|list }}{{ [1, 2.5]|sum }}
{{ messages|map(attribute='role')|join('-') }}{{ messages|join(',', attribute='content') }}{{ [1, none]|join }}
{{ 'aXa'|replace('a', 'bb', 1) }}{{ '%s-%05.2f' % ('x', 2) }}{{ '%s'|format(4) }}{{ '{:>4}{a[0]}'.format(1, a=[2]) }}
{{ messages|tojson(indent=2) }}{{ {'b': 1, 'a': '<'}|tojson(sort_keys=true) }}{{ ' x'|trim }}{{ 'xax'|trim('x') }}
{{ 1 ~ 'a' ~ none }}{{ (1, 'b') }}{{ [messages[0].role] * 2 }}{{ 2 ** 10 % 7 }}{{ dict(a=1) }}{{ 'a'.join(['b', 'c']) }}
{{ messages|sum(attribute='n', start=1) }}{{ 'a\tb'.expandtabs(4) }}{{ 'b'.rjust(3, '.') }}{{ strftime_now('%%') }}"""
    messages = [{**HI, "n": 2}, {"role": "user", "content": "é<", "n": 3}]
    assert render(source, messages) == expected(source, messages)


# Forms of messages


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("source", "content", "text"),
    [
        (CHATML, parts("a", "b"), "a\nb"),
        (CHATML, ["a", {"text": "b"}], "a\nb"),
        (CHATML, [{"type": "input_text", "text": "a"}, {"type": "refusal", "refusal": "no"}], "a\nno"),
        (CHATML, [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}], "a"),
        (PARTS, parts("a", "b"), "ab"),
        (PARTS, "a", "a"),
        (ONLY_PARTS, parts(" a ", "b"), "a|b|"),
        (ONLY_PARTS, "ab", "ab|"),
    ],
)
def test_a_content_gets_the_form_that_the_template_expects(source: str, content: Any, text: str) -> None:
    rendered = render(source, [{"role": "user", "content": content}], add_generation_prompt=False)
    assert rendered in (f"<|im_start|>user\n{text}<|im_end|>\n", f"<user>{text}</user>\n", f"<user>{text}")


@pytest.mark.parametrize(
    ("loop", "are_parts"),
    [
        ("{% for m in messages %}{% for c in m['content'] %}{{ c }}{% endfor %}{% endfor %}", True),
        (
            "{% for m in messages %}{% set content = m.content %}{% for c in content %}{{ c }}{% endfor %}{% endfor %}",
            True,
        ),
        ("{% for c in messages[0].content | selectattr('type', 'equalto', 'text') %}{{ c }}{% endfor %}", True),
        ("{% for c in (messages[0].content or [])[1:] %}{{ c }}{% endfor %}", True),
        ("{% macro f(x) %}{% for c in x %}{{ c }}{% endfor %}{% endmacro %}{{ f(messages[0].content) }}", True),
        ("{% macro f(x) %}{% for c in x %}{{ c }}{% endfor %}{% endmacro %}{{ f(x=messages[0].content) }}", True),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{% for c in messages[0].content.split('a') %}{{ c }}{% endfor %}", False),
        ("{% for c in messages[0].tool_calls %}{% endfor %}{{ messages[0].content }}", False),
    ],
)
def test_loops_over_a_content_are_recognised(loop: str, are_parts: bool) -> None:
    rendered = render(loop, [{"role": "user", "content": parts("a", "b")}])
    assert ("'type': 'text'" in rendered) == are_parts


def test_the_result_of_a_tool_is_a_text_for_every_template() -> None:
    messages = [HI, {"role": "tool", "content": parts("a", "b"), "tool_call_id": "1"}]
    assert "<tool>a\nb</tool>" in render(PARTS, messages)
    assert "<tool_response>\na\nb\n</tool_response>" in render(CHATML, messages)


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
        **more,
    }


@pytest.mark.parametrize(
    ("arguments", "written"),
    [('{"a": "ü"}', '{"a": "ü"}'), ({"a": 1}, '{"a": 1}'), ("", "{}"), (" \n", "{}"), (None, "{}"), ("[1]", "[1]")],
)
def test_arguments_of_calls_are_objects_for_the_template(arguments: Any, written: str) -> None:
    rendered = render(CHATML, [HI, call(arguments), {"role": "tool", "content": "ok"}])
    assert f'<tool_call>\n{{"name": "f", "arguments": {written}}}\n</tool_call>' in rendered


def test_a_call_without_the_shell_of_a_function_is_rendered_too() -> None:
    messages = [HI, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]}]
    assert '{"name": "f", "arguments": {}}' in render(CHATML, messages)


def test_an_empty_list_of_calls_is_no_calls() -> None:
    messages = [HI, {"role": "assistant", "content": "x", "tool_calls": []}]
    assert render(LLAMA, messages) == expected(LLAMA, [HI, {"role": "assistant", "content": "x"}])


def test_a_function_alone_is_a_tool() -> None:
    assert render(CHATML, [HI], tools=[TOOLS[0]["function"]]) == render(CHATML, [HI], tools=TOOLS)
    assert render(CHATML, [HI], tools=[]) == render(CHATML, [HI])


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_a_template_under_each_of_its_names(name: str) -> None:
    source = "{% for m in messages %}{{ m.reasoning_content }}{{ m.reasoning }}{{ m.thinking }}{% endfor %}"
    assert render(source, [{"role": "assistant", "content": "x", name: "why"}]) == "whywhywhy"
    assert render(source, [{"role": "assistant", "content": "x", name: {"effort": "low"}}]).count("effort") == 1


def test_a_developer_speaks_as_the_system_where_the_template_knows_no_developer() -> None:
    developer = {"role": "developer", "content": "Be brief.", "tools": TOOLS}
    assert render(CHATML, [developer, HI]) == expected(CHATML, [{"role": "system", "content": "Be brief."}, HI])
    late = [{"role": "system", "content": "S"}, HI, developer, HI]
    assert render(MISTRAL, late) == expected(MISTRAL, [{"role": "system", "content": "S\n\nBe brief."}, HI, HI])
    assert "<system>S\n\nBe brief.|<user>" in render(ONLY_PARTS, late)
    assert "System role not supported" in refusal(GEMMA, [developer, HI])


@pytest.mark.parametrize("test", ["m.role == 'developer'", "m['role'] in ['system', 'developer']"])
def test_a_template_that_knows_developers_sees_them(test: str) -> None:
    source = f"{{% for m in messages %}}{{% if {test} %}}D:{{% endif %}}{{{{ m.role }}}} {{% endfor %}}"
    assert render(source, [HI, {"role": "developer", "content": "x"}]) == "user D:developer "


def test_any_other_role_and_key_reaches_the_template() -> None:
    source = "{% for m in messages %}{{ m.role }} {{ m.name }} {{ m.mood }}{% endfor %}"
    assert render(source, [{"role": "critic", "content": "x", "name": "n", "mood": 3}]) == "critic n 3"


# Continuing the last message


def test_a_continued_message_ends_with_its_own_text() -> None:
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    answer = {"role": "assistant", "content": "It is  "}
    assert render(CHATML, [HI, answer], **options).endswith("<|im_start|>assistant\nIt is  ")
    assert render(LLAMA, [HI, answer], **options).endswith("\n\nIt is")
    assert render(CHATML, [HI, {**answer, "content": ""}], **options).endswith("<|im_start|>assistant\n")
    assert render(PARTS, [HI, {**answer, "content": parts("It", " is")}], **options).endswith("<assistant>It is")
    assert render(ONLY_PARTS, [HI, answer], **options).endswith("<assistant>It is")
    assert render(ONLY_PARTS, [HI, {**answer, "content": ""}], **options).endswith("<assistant>")


def test_a_message_that_the_template_leaves_out_cannot_be_continued() -> None:
    text = refusal("{{ messages[0].content }}", [HI, HI], add_generation_prompt=False, continue_final_message=True)
    assert "leaves out the last message" in text
    assert "both set" in refusal(CHATML, [HI], add_generation_prompt=True, continue_final_message=True)


# Choosing a template

NAMED = {"default": "main", "tool_use": "tools", "rag": "rag {{ documents }}"}


@pytest.mark.parametrize(
    ("fields", "text"),
    [({}, "main"), ({"tools": TOOLS}, "tools"), ({"tools": []}, "main"), ({"template": "rag"}, "rag None"),
     ({"template": "default", "tools": TOOLS}, "main")],
)  # fmt: skip
def test_a_template_is_chosen_by_name_or_by_the_tools(fields: dict[str, Any], text: str) -> None:
    assert ChatTemplates(NAMED, NAMES).render(encoded_chat([HI], **fields)) == text


def test_an_unknown_name_is_refused_with_the_names_that_exist() -> None:
    for trusts in (False, True):
        with pytest.raises(InvalidRequest, match="named 'rug': the model has 'default', 'rag', 'tool_use'"):
            ChatTemplates(NAMED, NAMES, trust_requests=trusts).render(encoded_chat([HI], template="rug"))
    with pytest.raises(InvalidRequest, match="the model has no chat template"):
        ChatTemplates({}, NAMES).render(encoded_chat([HI], template="default"))


def test_a_template_of_a_request_needs_trust() -> None:
    source = "{{ bos_token }}{{ messages[0].content }}"
    text = refusal(CHATML, [HI], template=source)
    assert "tokenizer.trust_request_templates = true" in text
    for _ in range(2):
        assert render(CHATML, [HI], template=source, trust_requests=True) == "<s>hi"
    assert ChatTemplates({}, NAMES, trust_requests=True).render(encoded_chat([HI], template=source)) == "<s>hi"
    assert refusal(CHATML, [HI], template="\n{% for %}", trust_requests=True).endswith(
        "end of statement block' (line 2)"
    )
    lines = "this chat template refuses this chat: not like this"
    assert refusal(CHATML, [HI], template="{{ raise_exception('not\\nlike\\n this') }}", trust_requests=True) == lines
    assert "at most 262144" in refusal(CHATML, [HI], template="{{ 1 }}" * 40_000, trust_requests=True)
    assert "this chat template refuses" in refusal(CHATML, [HI], template="{{ 1 // 0 }}", trust_requests=True)


def test_one_broken_template_leaves_the_others_usable() -> None:
    templates = ChatTemplates({**NAMED, "tool_use": "{% for %}"}, NAMES)
    assert templates.render(encoded_chat([HI])) == "main"
    with pytest.raises(InvalidRequest, match="chat template 'tool_use' cannot be compiled"):
        templates.render(encoded_chat([HI], tools=TOOLS))


def test_a_file_of_the_configuration_replaces_the_models_templates(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("of the model")
    file = tmp_path / "mine.jinja"
    file.write_text("mine {{ messages[0].content }} ü", encoding="utf-8")
    templates = ChatTemplates.load(str(tmp_path), NAMES, str(file))
    assert templates.render(encoded_chat([HI], tools=TOOLS)) == "mine hi ü"
    for content, text in ((b"{% for %}", "cannot be compiled"), (b"\xff", "cannot be read")):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"^tokenizer\.chat_template \('{file}'\) {text}"):
            ChatTemplates.load(str(tmp_path), NAMES, str(file))
    file.unlink()
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        ChatTemplates.load(str(tmp_path), NAMES, str(file))


# Errors say where

REFUSALS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no JSON": (b"[{", {}, "messages is not JSON: "),
    "no UTF-8": (b'["\xff"]', {}, "messages is not JSON: "),
    "a lone surrogate": (b'[{"role": "user", "content": "\\ud800"}]', {}, "messages is not JSON: "),
    "no list": ({"role": "user"}, {}, "messages must be a list, not an object"),
    "no messages": ([], {}, "messages is empty"),
    "a text as message": ([HI, "x"], {}, "messages[1] must be an object, not a text"),
    "no role": ([{"content": "x"}], {}, "messages[0].role is missing"),
    "a number as role": ([{"role": 5, "content": "x"}], {}, "messages[0].role must be a text, not a number"),
    "no content": ([{"role": "user"}], {}, "messages[0].content is missing: give a text"),
    "a number as content": (
        [{**HI, "content": 5}], {},
        "messages[0].content must be a text or a list of text parts, not a number",
    ),
    "an image": (
        [HI, {**HI, "content": [*parts("x"), {"type": "image_url", "image_url": {"url": "x"}}]}],
        {},
        'messages[1].content[1]: type "image_url" is not supported: this engine serves text',
    ),
    "a list as type": ([{**HI, "content": [{"type": []}]}], {}, "messages[0].content[0]: type [] is not supported"),
    "a part without text": ([{**HI, "content": [{"type": "text"}]}], {}, "messages[0].content[0].text is missing"),
    "a part of numbers": ([{**HI, "content": [5]}], {}, "messages[0].content[0] must be an object, not a number"),
    "a number as name": ([{**HI, "name": 5}], {}, "messages[0].name must be a text, not a number"),
    "no call list": ([{**HI, "tool_calls": {}}], {}, "messages[0].tool_calls must be a list, not an object"),
    "a call of nothing": ([{**HI, "tool_calls": [{}]}], {}, "messages[0].tool_calls[0].name is missing"),
    "a call of a text": (
        [{**HI, "tool_calls": [{"function": "f"}]}], {},
        "messages[0].tool_calls[0].function must be an object",
    ),
    "arguments that are not JSON": (
        [HI, call('{"a": ')],
        {},
        "messages[1].tool_calls[0].function.arguments is not JSON: ",
    ),
    "arguments that are a number": (
        [HI, call("5")], {},
        "messages[1].tool_calls[0].function.arguments must be an object",
    ),
    "deep messages": (b"[" * 100_000, {}, "messages is nested too deeply"),
    "deep arguments": (
        [HI, call("[" * 100_000)], {},
        "messages[1].tool_calls[0].function.arguments is nested too deeply",
    ),
    "many values": (b"[" + b"{}," * 600_000 + b"{}]", {}, "messages holds more than 1000000 values"),
    "many messages": ([HI] * 16_385, {}, "messages has 16385 items; at most 16384 are allowed"),
    "tools that are an object": ([HI], {"tools": {}}, "tools must be a list, not an object"),
    "a tool of another type": (
        [HI], {"tools": [{"type": "web_search"}]},
        'tools[0]: type "web_search" is not supported',
    ),
    "a tool without a function": (
        [HI], {"tools": [{"type": "function"}]},
        "tools[0].function must be an object, not null",
    ),
    "a tool without a name": (
        [HI], {"tools": [{"type": "function", "function": {}}]},
        "tools[0].function.name is missing",
    ),
    "documents of texts": ([HI], {"documents": ["x"]}, "documents[0] must be an object, not a text"),
    "a list as variables": ([HI], {"template_kwargs": []}, "chat_template_kwargs must be an object, not a list"),
    "a variable with a field": ([HI], {"template_kwargs": {"tools": []}}, "chat_template_kwargs must not hold 'tools'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_malformed_chat_is_refused_with_the_place(name: str) -> None:
    messages, fields, text = REFUSALS[name]
    assert refusal(CHATML, messages, **fields).startswith(text)
