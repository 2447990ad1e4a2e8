"""What the text of a model's answers may hold besides the answer: the interface of all parsers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from pipeline.http.generation.events import Event

Tool = dict[str, Any]
"""The definition of a function: its `name`, and maybe `description`, `parameters` (a JSON schema) and `strict`."""

CallForm = Literal["none", "native", "json_list", "json_arguments"]
"""How the text may hold calls of tools: not at all; as the model's family writes them; as a JSON list that a grammar
made; or as the arguments alone of the one function that the request names."""


class OutputParser(Protocol):
    """Turns the text of one sample into events."""

    def push(self, text: str) -> list[Event]:
        """More text of the sample, cut anywhere. Returns everything that is certain by now."""
        ...

    def finish(self) -> list[Event]:
        """The text has ended. Returns what was held back."""
        ...


class OutputFormat(Protocol):
    tool_parser: str | None
    reasoning_parser: str | None
    needs_special_tokens: bool
    reasoning_tags: tuple[str, str] | None
    reasoning_begin_id: int | None
    reasoning_end_id: int | None

    @property
    def always_reasons(self) -> bool:
        """The text begins inside the reasoning even where the prompt does not open it."""
        ...

    def parser(self, *, reads_calls: CallForm, tools: Sequence[Tool], starts_in_reasoning: bool) -> OutputParser: ...
