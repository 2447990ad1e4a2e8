"""Turns tools and tool_choice of Anthropic's API into those of OpenAI's API."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from pipeline.http.bodies import convert
from pipeline.http.errors import HttpError

_HARMLESS: Final = ("cache_control", "eager_input_streaming", "input_examples")
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {"defer_loading": (False,), "allowed_callers": (["direct"],)}


class ToolBody(msgspec.Struct, kw_only=True):
    """A tool that the client runs."""

    name: str
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    description: str | None = None
    strict: bool | None = None


class ToolChoiceBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How the model uses the tools. `name` belongs to the type "tool"."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @property
    def value(self) -> str | dict[str, Any]:
        """The same as `tool_choice` of OpenAI's API. Raises HttpError 400."""
        if self.type != "tool":
            return "required" if self.type == "any" else self.type
        if self.name is None:
            raise HttpError(400, "tool_choice.name is missing: the type tool needs the name of a tool", param="name")
        return {"type": "function", "function": {"name": self.name}}


def function_tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Tools of the type "function". Raises HttpError 400 for a tool that Anthropic's servers run or define."""
    return [_function(tool, f"tools[{i}]") for i, tool in enumerate(tools or [])]


def _function(tool: dict[str, Any], where: str) -> dict[str, Any]:
    kind = tool.get("type")
    if isinstance(kind, str) and kind != "custom":
        raise HttpError(
            400,
            f"{where} has the type {kind[:100]}, which only Anthropic's servers know: give a custom tool with an "
            "input_schema",
            param=where,
        )
    try:
        body = convert(tool, ToolBody, harmless=_HARMLESS, neutral=_NEUTRAL)
    except HttpError as error:
        raise HttpError(400, f"{where}: {error.message.removeprefix('the body: ')}", param=where) from None
    function: dict[str, Any] = {"name": body.name, "parameters": body.input_schema}
    if body.description is not None:
        function["description"] = body.description
    if body.strict is not None:
        function["strict"] = body.strict
    return {"type": "function", "function": function}
