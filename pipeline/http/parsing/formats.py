"""How the text of one model is read: OutputFormat makes the parser of each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from pipeline.http.generation.events import Content, Event
from pipeline.http.parsing import json_families
from pipeline.http.parsing.families import ALWAYS_REASON, CALL_SCRIPTS, HARMONY
from pipeline.http.parsing.harmony import harmony
from pipeline.http.parsing.native_forms import NATIVE_FORMS
from pipeline.http.parsing.reasoning import with_reasoning
from pipeline.http.parsing.response_template import TemplateParser
from pipeline.http.parsing.scanner import Scanner, Script, ScriptParser, Steps, Tool

CallForm = Literal["none", "native", "json_list", "json_arguments"]


class OutputParser(Protocol):
    """Reads the text of one sample."""

    def push(self, text: str) -> list[Event]:
        """Read more text of the sample, cut anywhere."""

    def finish(self) -> list[Event]:
        """End the text. Returns the events of the text that was held back."""


class PlainText:
    """The parser of text that holds neither calls nor reasoning. It runs for each token of most streams."""

    def push(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        return []


def _text(s: Scanner) -> Steps[None]:
    """Reads no calls."""
    yield from s.rest(s.out.plain)


_GRAMMAR_SCRIPTS: Final[dict[CallForm, Script]] = {
    "json_list": json_families.json_list,
    "json_arguments": json_families.json_arguments,
}


@dataclass(frozen=True)
class OutputFormat:
    """The families of one model. None: the model has no known family.

    `needs_special_tokens`: the markers are special tokens, so the engine must give their text.
    `reasoning_tags`: the texts that begin and end the reasoning.
    `always_reasons`: the text begins inside the reasoning even where the prompt does not open it. A grammar then holds
    behind the end tag alone. `reasoning_begin_id`, `reasoning_end_id`: the tags as tokens, where each is one token.
    `response_template`: of the model's tokenizer_config.json, where `tool_parser` or `reasoning_parser` is that.
    """

    tool_parser: str | None = None
    reasoning_parser: str | None = None
    needs_special_tokens: bool = False
    reasoning_tags: tuple[str, str] | None = None
    reasoning_begin_id: int | None = None
    reasoning_end_id: int | None = None
    response_template: dict[str, Any] | None = field(default=None, hash=False)

    @property
    def always_reasons(self) -> bool:
        return self.reasoning_parser in ALWAYS_REASON

    def parser(self, *, reads_calls: CallForm, tools: Sequence[Tool], starts_in_reasoning: bool) -> OutputParser:
        """A parser for one sample.

        `reads_calls` "none": text only. "native": calls in the family's own form; without a known family, an answer
        that is a JSON call of one of the tools. "json_list", "json_arguments": the JSON that a grammar made, the
        latter for the only one of `tools`. Raises ValueError if "json_arguments" comes with no
        tool or with several.
        """
        if reads_calls == "json_arguments" and len(tools) != 1:
            raise ValueError(f"reads_calls 'json_arguments' takes exactly one tool, which is called, not {len(tools)}")
        has_reasoning = self.reasoning_parser is not None or self.reasoning_tags is not None
        if reads_calls == "none" and not has_reasoning and self.tool_parser != HARMONY:
            return PlainText()
        if self.response_template is not None and reads_calls in ("none", "native"):
            begin = self.reasoning_tags[0] if self.reasoning_tags and starts_in_reasoning else ""
            return TemplateParser(
                self.response_template,
                tools,
                reads_calls=reads_calls == "native" and self.tool_parser is not None,
                begin_of_reasoning=begin,
            )
        form = NATIVE_FORMS.get(self.tool_parser or "")
        call_id_length = form.call_id_length if form else 0
        return ScriptParser(self._script(reads_calls, starts_in_reasoning), tools, call_id_length)

    def _script(self, reads_calls: CallForm, starts_in_reasoning: bool) -> Script:
        if HARMONY in (self.tool_parser, self.reasoning_parser):
            return harmony(
                _GRAMMAR_SCRIPTS.get(reads_calls),
                starts_inside=starts_in_reasoning,
                reads_calls=reads_calls == "native" and self.tool_parser is not None,
            )
        if reads_calls == "native":
            answer = CALL_SCRIPTS[self.tool_parser] if self.tool_parser else json_families.any_json
        else:
            answer = _GRAMMAR_SCRIPTS.get(reads_calls, _text)
        if self.reasoning_tags is None:
            return answer
        form = NATIVE_FORMS.get(self.tool_parser or "")
        return with_reasoning(
            answer,
            self.reasoning_tags,
            starts_inside=starts_in_reasoning or self.always_reasons,
            also_ends_at=form.trigger if form and form.ends_reasoning and reads_calls == "native" else "",
        )
