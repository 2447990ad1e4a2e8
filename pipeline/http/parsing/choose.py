"""Chooses how the text of a model is read, from the files of its folder. Reads JSON and templates, no tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from ipc.errors import ConfigError, InvalidRequest
from pipeline.http.parsing.families import (
    ALWAYS_REASON,
    HARMONY,
    REASONING_PARSERS,
    REASONING_TAGS,
    RESPONSE_TEMPLATE,
    TOOL_PARSERS,
)
from pipeline.http.parsing.formats import OutputFormat
from pipeline.http.parsing.harmony import TAGS
from pipeline.http.parsing.native_forms import NATIVE_FORMS
from pipeline.http.parsing.response_template import check_template, template_tags
from workers.model_tokenizer.declarations import read_object
from workers.tokenizer.template_files import read_templates

logger = logging.getLogger(__name__)


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _TokenizerFile(msgspec.Struct):
    """The part of tokenizer.json that is read here; the vocabulary is skipped."""

    added_tokens: list[_AddedToken] = []


@dataclass(frozen=True)
class _ModelFiles:
    """The facts about a model that tell its family."""

    template: str  # all its chat templates
    tokens: frozenset[str]  # added tokens
    special: frozenset[str]  # those of them that are special
    ids: dict[str, int]  # of added tokens in tokenizer.json
    model_type: str
    response_template: dict[str, Any] | None

    @classmethod
    def read(cls, folder: Path, template: str | None) -> _ModelFiles:
        config = read_object(folder / "tokenizer_config.json")
        if template is None:
            try:
                template = "\n".join(read_templates(folder).values())
            except InvalidRequest as error:  # the tokenizer refuses chats with the same text
                logger.warning("%s", error)
                template = ""
        added = _added_tokens(folder)
        tokens = {token.content: token.special for token in added}
        declared = config.get("added_tokens_decoder")
        for token in declared.values() if isinstance(declared, dict) else ():
            if isinstance(token, dict) and isinstance(token.get("content"), str):
                tokens.setdefault(token["content"], bool(token.get("special")))
        own = config.get("response_template")
        return cls(
            template=template,
            tokens=frozenset(tokens),
            ids={token.content: token.id for token in added},
            special=frozenset(text for text, is_special in tokens.items() if is_special and text),
            model_type=str(read_object(folder / "config.json").get("model_type") or ""),
            response_template=own if isinstance(own, dict) else None,
        )

    def writes(self, *texts: str) -> bool:
        """Whether the chat template holds all of the texts."""
        return all(text in self.template for text in texts)


def _added_tokens(folder: Path) -> list[_AddedToken]:
    """The added tokens of tokenizer.json."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return []
    try:
        return msgspec.json.decode(file.read_bytes(), type=_TokenizerFile).added_tokens
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None


# The first that holds is the family. A template that renders a family's calls holds its markers.
_FAMILIES: Final[tuple[tuple[str, Callable[[_ModelFiles], bool]], ...]] = (
    (HARMONY, lambda m: m.writes("<|channel|>", "<|message|>") or m.model_type == "gpt_oss"),
    ("deepseek_v3", lambda m: m.writes("<｜tool▁calls▁begin｜>", "```json")),
    ("deepseek_v31", lambda m: m.writes("<｜tool▁calls▁begin｜>")),
    ("kimi_k2", lambda m: m.writes("<|tool_calls_section_begin|>")),
    ("glm47", lambda m: m.writes("<tool_call>", "</arg_key><arg_value>")),
    ("glm45", lambda m: m.writes("<tool_call>", "<arg_key>")),
    ("qwen3_coder", lambda m: m.writes("<tool_call>", "<function=", "<parameter=")),
    ("seed_oss", lambda m: m.writes("<seed:tool_call>")),
    ("minimax_m2", lambda m: m.writes("<minimax:tool_call>")),
    ("mistral", lambda m: m.writes("[TOOL_CALLS]", "[ARGS]")),
    ("mistral_list", lambda m: m.writes("[TOOL_CALLS]")),
    ("lfm2", lambda m: m.writes("<|tool_call_start|>")),
    ("granite", lambda m: m.writes("<|tool_call|>")),
    ("hermes", lambda m: m.writes("<tool_call>")),
    ("nemotron", lambda m: m.writes("<TOOLCALL>")),
    ("pythonic", lambda m: m.writes("func_name1(params_name1")),
    ("llama3_json", lambda m: m.writes("<|python_tag|>") or m.writes('{"name": function name, "parameters"')),
    ("pythonic", lambda m: "<|python_start|>" in m.tokens),
    (RESPONSE_TEMPLATE, lambda m: m.response_template is not None),
)


def read_chat_template(file: str | None) -> str | None:
    """The text of a file that replaces the model's own chat templates; None if there is none. Raises ConfigError."""
    if file is None:
        return None
    try:
        return Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"tokenizer.chat_template ({file!r}) cannot be read: {error}") from None


_READ_BOTH: Final = (HARMONY, RESPONSE_TEMPLATE)  # calls and reasoning in one


def choose_format(
    folder: str | Path,
    tool_parser: str = "auto",
    reasoning_parser: str = "auto",
    *,
    template: str | None = None,
) -> OutputFormat:
    """How to read the text of the model in `folder`.

    "auto" finds the family in the model's files, "none" reads none, any other name is that family. `template` is the
    text of a chat template that replaces the model's own. Raises ConfigError for a name that does not exist, or that
    does not fit the model or the other name.
    """
    _check_name("http.tool_parser", tool_parser, TOOL_PARSERS)
    _check_name("http.reasoning_parser", reasoning_parser, REASONING_PARSERS)
    model = _ModelFiles.read(Path(folder), template)
    tools: str | None = tool_parser
    reasoning: str | None = reasoning_parser
    found = next((name for name, holds in _FAMILIES if holds(model)), None)
    if tools == "auto":
        tools = reasoning if reasoning in _READ_BOTH else found
    if reasoning == "auto":
        reads_both = found in _READ_BOTH and tools in (found, "none")
        reasoning = tools if tools in _READ_BOTH else found if reads_both else _find_reasoning(model)
    tools, reasoning = (None if name == "none" else name for name in (tools, reasoning))
    _check_pair(tools, reasoning)
    tags = _tags(reasoning, model)
    begin_id, end_id = (model.ids.get(tag) for tag in tags) if tags else (None, None)
    chosen = OutputFormat(tools, reasoning, reasoning_tags=tags, reasoning_begin_id=begin_id, reasoning_end_id=end_id)
    if RESPONSE_TEMPLATE in (tools, reasoning):
        chosen = replace(chosen, response_template=_checked_template(Path(folder), model))
    return replace(chosen, needs_special_tokens=_needs_special_tokens(chosen, model))


def _check_name(key: str, name: str, known: tuple[str, ...]) -> None:
    if name not in ("auto", "none", *known):
        raise ConfigError(f"{key} {name!r} does not exist: use auto, none, {', '.join(known)}")


def _check_pair(tools: str | None, reasoning: str | None) -> None:
    """Raise ConfigError if one parser reads calls and reasoning together, and the other is a different one.

    Only calls can be left unread.
    """
    for name in _READ_BOTH:
        if (tools == name and reasoning != name) or (reasoning == name and tools not in (name, None)):
            raise ConfigError(
                f"http.tool_parser is {tools or 'none'!r} and http.reasoning_parser is {reasoning or 'none'!r}: "
                f"{name!r} reads calls and reasoning together, so set both to {name!r} or to auto"
            )


def _find_reasoning(model: _ModelFiles) -> str | None:
    """The first parser whose tags are both tokens of the model, or both in its template.

    A parser that takes untagged text for reasoning is never found: only the user can know that.
    """
    for name, tags in REASONING_TAGS.items():
        if name not in ALWAYS_REASON and (model.tokens.issuperset(tags) or model.writes(*tags)):
            return name
    return None


def _tags(reasoning: str | None, model: _ModelFiles) -> tuple[str, str] | None:
    if reasoning == HARMONY:
        return TAGS
    if reasoning == RESPONSE_TEMPLATE:
        return template_tags(model.response_template or {})
    return REASONING_TAGS.get(reasoning or "")


def _checked_template(folder: Path, model: _ModelFiles) -> dict[str, Any]:
    if model.response_template is None:
        raise ConfigError(
            f"http.tool_parser is {RESPONSE_TEMPLATE!r}, and {folder / 'tokenizer_config.json'} has no "
            "response_template: use auto"
        )
    try:
        check_template(model.response_template)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"the response_template in {folder / 'tokenizer_config.json'} cannot be read ({error}): "
            "set http.tool_parser and http.reasoning_parser to none, or to other parsers"
        ) from None
    return model.response_template


def _needs_special_tokens(chosen: OutputFormat, model: _ModelFiles) -> bool:
    """Whether a special token is part of a marker that the parsers wait for."""
    form = NATIVE_FORMS.get(chosen.tool_parser or "")
    markers = [*(form.markers if form else ()), *(chosen.reasoning_tags or ())]
    if chosen.response_template is not None:
        fields = chosen.response_template["fields"].values()
        markers += [
            str(each.get(key, "")) for each in fields for key in ("open", "close", "open_pattern", "close_pattern")
        ]
    text = "\n".join(markers)
    return any(token in text for token in model.special)
