"""Tools for chat templates that ignore them, and which templates do."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Final

import pytest

from ipc.chat import EncodedChat
from ipc.errors import InvalidRequest
from pipeline.http.generation.template_tools import template_reads_tools
from pipeline.http.generation.tool_choice import messages_for
from tests.unit.workers.grammar.grammar_tools import TINY
from tests.unit.workers.tokenizer.template_families import CHATML
from workers.tokenizer.chat_template import ChatTemplates

# Knows three roles and wants user and assistant to alternate.
PLAIN: Final = """\
{%- for m in messages %}
{%- if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('unknown role ' ~ m.role) }}{% endif %}
{%- if not loop.first and m.role == messages[loop.index0 - 1].role %}{{ raise_exception('twice') }}{% endif %}
{{- '[' ~ m.role ~ ']' ~ m.content }}
{%- endfor %}{{ '[assistant]' }}"""
TOOL: Final = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Tells it.", "parameters": {"type": "object"}, "strict": True},
}
HISTORY: Final[list[dict[str, Any]]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Rio and Łódź?"},
    {
        "role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rio"}'}},
            {"id": "2", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Łódź"}}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "sun"},
    {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "rain"}]},
    {"role": "user", "content": "Thanks. And now?"},
]  # fmt: skip


def rendered(messages: list[dict[str, Any]]) -> str:
    chat = EncodedChat(messages=json.dumps(messages).encode())
    return ChatTemplates({"default": PLAIN}, {}).render(chat)


def test_a_template_that_ignores_tools_shows_their_descriptions_calls_and_results() -> None:
    before = copy.deepcopy(HISTORY)
    text = rendered(messages_for(HISTORY, [TOOL], False))
    assert before == HISTORY
    assert text.startswith("[system]Be brief.\n\nYou can call functions.")
    assert '{"name": "get_weather", "description": "Tells it.", "parameters": {"type": "object"}}[user]' in text
    assert text.endswith(
        '[assistant]{"name": "get_weather", "parameters": {"city": "Rio"}}\n'
        '{"name": "get_weather", "parameters": {"city": "Łódź"}}'
        "[user]Result of the function get_weather:\nsun\n\nResult of the function get_weather:\nrain\n\n"
        "Thanks. And now?[assistant]"
    )


def test_a_system_message_is_made_if_there_is_none() -> None:
    text = rendered(messages_for([{"role": "user", "content": "Hi"}], [TOOL], False))
    assert text.startswith("[system]You can call functions.")
    assert text.endswith("[user]Hi[assistant]")
    brief = {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]}
    text = rendered(messages_for([brief, {"role": "user", "content": "Hi"}], [TOOL], False))
    assert text.startswith("[system]Be\nbrief.\n\nYou can call functions.")


def test_old_calls_stay_readable_without_tools() -> None:
    text = rendered(messages_for(HISTORY, None, False))
    assert text.startswith("[system]Be brief.[user]")
    assert '"parameters": {"city": "Rio"}' in text


def test_a_template_that_reads_tools_gets_the_messages_as_they_are() -> None:
    assert messages_for(HISTORY, [TOOL], True) is HISTORY


def test_messages_without_tools_do_not_change() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
    assert messages_for(messages, None, False) == messages


def test_tools_that_are_not_well_formed_are_refused() -> None:
    for reads_tools in (False, True):
        with pytest.raises(InvalidRequest, match=r"tools\[0\]\.function\.name \('a b'\)"):
            messages_for(HISTORY, [{"type": "function", "function": {"name": "a b"}}], reads_tools)
    for calls in ([5], [{"function": 5}], [{"function": {"name": 5}}]):
        with pytest.raises(InvalidRequest, match="a function that has a name"):
            messages_for([{"role": "assistant", "tool_calls": calls}], [TOOL], False)


@pytest.mark.parametrize(
    ("templates", "reads"),
    [
        ({"chat_template": CHATML}, True),
        ({"chat_template": PLAIN}, False),
        ({"chat_template": "{# tools #}{% for m in messages %}{{ m.tools }}{% endfor %}"}, False),
        ({"chat_template": "{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}"}, True),
        ({"chat_template": "{% set tools = [] %}{{ tools }}"}, False),
        ({"chat_template": [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": CHATML}]}, True),
        ({"chat_template": "{% if %}{{ tools }}"}, False),
        ({"chat_template": 5}, False),
        ({}, False),
    ],
)
def test_a_template_reads_tools_if_its_source_refers_to_them(tmp_path: Path, templates: Any, reads: bool) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(templates))
    assert template_reads_tools(str(tmp_path)) is reads
    file = tmp_path / "other.jinja"
    file.write_text(PLAIN if reads else CHATML)
    assert template_reads_tools(str(tmp_path), str(file)) is not reads, "a file replaces the folder's templates"
    assert template_reads_tools(str(tmp_path), str(tmp_path / "missing")) is False


def test_the_tiny_model_s_template_is_found() -> None:
    source = json.loads((TINY / "tokenizer_config.json").read_text())["chat_template"]
    assert template_reads_tools(str(TINY)) is ("tools" in source)
