"""How a model's text is read follows from the files of its folder, and names override that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ipc.errors import ConfigError
from pipeline.http.generation.events import Content
from pipeline.http.parsing.choose import choose_format
from pipeline.http.parsing.families import TOOL_PARSERS
from pipeline.http.parsing.formats import OutputFormat
from tests.unit.pipeline.http.parsing.test_response_template import ACTIONS

ROOT = Path(__file__).parents[5]


def model(folder: Path, template: str = "", special: tuple[str, ...] = (), **config: Any) -> Path:
    """A folder with the files that tell a model's family."""
    (folder / "config.json").write_text(json.dumps({"model_type": config.pop("model_type", "llama")}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = [{"id": at, "content": text, "special": True} for at, text in enumerate(special)]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens, "model": {"vocab": {"a": 0}}}))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("{{ messages }}", None, None),
        ("<tool_call>\n</tool_call>", "hermes", None),
        ("<think>{{ x }}</think><tool_call>\n</tool_call>", "hermes", "think"),
        ("<tool_call>\n<function={{ name }}>\n<parameter={{ key }}>", "qwen3_coder", None),
        ("<think></think><tool_call>{{ name }}\n<arg_key>{{ k }}</arg_key>", "glm45", "think"),
        ('Respond in the format {"name": function name, "parameters": dictionary', "llama3_json", None),
        ("{{ '<|python_tag|>' }}", "llama3_json", None),
        ("[func_name1(params_name1=params_value1)]", "pythonic", None),
        ("<tool_call>{{ name }}<arg_key>{{ k }}</arg_key><arg_value>", "glm47", None),
        ("<TOOLCALL>[", "nemotron", None),
        ("[TOOL_CALLS] [", "mistral_list", None),
        ("[TOOL_CALLS]{{ name }}[ARGS][THINK][/THINK]", "mistral", "mistral"),
        ("<｜tool▁calls▁begin｜><｜tool▁sep｜>{{ name }}\n```json", "deepseek_v3", None),
        ("<think></think><｜tool▁calls▁begin｜>{{ name }}<｜tool▁sep｜>", "deepseek_v31", "think"),
        ("<|tool_calls_section_begin|>", "kimi_k2", None),
        ("<|start|>{{ role }}<|channel|>final<|message|>", "harmony", "harmony"),
        ("<|tool_call|>", "granite", None),
    ],
)
def test_a_template_tells_the_family(tmp_path: Path, template: str, tools: str | None, reasoning: str | None) -> None:
    chosen = choose_format(model(tmp_path, template))
    assert (chosen.tool_parser, chosen.reasoning_parser) == (tools, reasoning)


def test_the_small_model_of_the_repository_has_no_family() -> None:
    assert choose_format(ROOT / "configs" / "tiny-model") == OutputFormat()


def test_names_override_what_the_files_tell(tmp_path: Path) -> None:
    folder = model(tmp_path, "<think></think><tool_call>")
    assert choose_format(folder, "none", "none") == OutputFormat()
    chosen = choose_format(folder, "mistral", "deepseek_r1")
    assert (chosen.tool_parser, chosen.reasoning_parser) == ("mistral", "deepseek_r1")
    assert chosen.always_reasons
    assert choose_format(folder, template="[TOOL_CALLS]").tool_parser == "mistral_list"


def test_tags_that_are_tokens_tell_the_reasoning(tmp_path: Path) -> None:
    chosen = choose_format(model(tmp_path, "{{ x }}", ("[THINK]", "[/THINK]")))
    assert chosen.reasoning_tags == ("[THINK]", "[/THINK]")
    assert chosen.needs_special_tokens


def test_only_markers_that_are_special_tokens_need_their_text(tmp_path: Path) -> None:
    assert not choose_format(model(tmp_path, "<tool_call>", ("<|im_end|>",))).needs_special_tokens
    assert choose_format(model(tmp_path, "<|python_tag|>", ("<|python_tag|>",))).needs_special_tokens


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"http.tool_parser 'hermess' .*auto, none, {', '.join(TOOL_PARSERS)}"):
        choose_format(model(tmp_path), "hermess")
    with pytest.raises(ValueError, match=r"http\.reasoning_parser 'cot' does not exist"):
        choose_format(model(tmp_path), reasoning_parser="cot")


def test_a_parser_of_calls_and_reasoning_cannot_be_half_of_a_pair(tmp_path: Path) -> None:
    folder = model(tmp_path, "<think></think><tool_call>")
    assert choose_format(folder, "harmony").reasoning_parser == "harmony"
    assert choose_format(folder, reasoning_parser="harmony").tool_parser == "harmony"
    with pytest.raises(ConfigError, match="set both to 'harmony'"):
        choose_format(folder, "harmony", "think")


def test_calls_of_a_model_with_channels_can_be_left_unread(tmp_path: Path) -> None:
    chosen = choose_format(model(tmp_path, "<|channel|><|message|>"), "none")
    assert (chosen.tool_parser, chosen.reasoning_parser) == (None, "harmony")
    reader = chosen.parser(reads_calls="native", tools=[], starts_in_reasoning=False)
    assert reader.push("<|channel|>commentary to=functions.f<|message|>{}") == [Content("{}")]


def test_a_model_of_no_known_family_is_read_by_its_response_template(tmp_path: Path) -> None:
    chosen = choose_format(model(tmp_path, "{{ x }}", ("<|START_ACTION|>",), response_template=ACTIONS))
    assert chosen.tool_parser == chosen.reasoning_parser == "response_template"
    assert chosen.needs_special_tokens
    assert chosen.reasoning_tags == ("<|START_THINKING|>", "<|END_THINKING|>")


def test_a_response_template_that_cannot_be_read_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"response_template in .* cannot be read .*must define 'start_anchor'"):
        choose_format(model(tmp_path, response_template={"fields": {"content": {}}}))
    with pytest.raises(ConfigError, match="has no response_template"):
        choose_format(model(tmp_path), "response_template")
