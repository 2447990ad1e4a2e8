"""Reads the tools of a request, and which of them the model may or must call. Forms: OpenAI's chat completions.

https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from ipc.errors import InvalidRequest
from pipeline.http.parsing.scanner import Tool

_NAME: Final = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
_NAME_RULE: Final = "1 to 128 letters, digits, underscores, dots or hyphens"
_MODES: Final[tuple[Literal["auto", "none", "required"], ...]] = ("auto", "none", "required")
_MAPS_OF_SCHEMAS: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_DATA: Final = ("const", "enum", "required")
_ANNOTATIONS: Final = ("title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly")
NO_PARAMETERS: Final[dict[str, Any]] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """The tools of a request, and its choice among them.

    Args:
        mode: the model may call tools, must not, must call at least one, or must call the one in `tools`.
        tools: the tools that it may call.
        is_limited: the request has more tools than those.
    """

    mode: Literal["auto", "none", "required", "named"]
    tools: list[Tool] = field(default_factory=list)
    is_limited: bool = False


def read_tools(tools: Any) -> list[Tool]:
    """The definitions of functions in a request's tools; None = no tools. Raises InvalidRequest, naming the field."""
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise InvalidRequest(f"tools ({reprlib.repr(tools)}) must be a list of tools")
    definitions = [_definition(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    first: dict[str, int] = {}
    for i, definition in enumerate(definitions):
        if first.setdefault(name := definition["name"], i) != i:
            raise InvalidRequest(
                f"tools[{i}].function.name ({name!r}) is the name of tools[{first[name]}] too: give each its own"
            )
    return definitions


def read_tool_use(tools: Any, tool_choice: Any) -> ToolUse:
    """The tools and the choice of a request; a choice of None is "auto". Raises InvalidRequest, naming the field."""
    definitions = read_tools(tools)
    choice = "auto" if tool_choice is None else tool_choice
    if isinstance(choice, dict):
        use = _of_object(choice, {each["name"]: each for each in definitions})
    elif (mode := next((each for each in _MODES if each == choice), None)) is not None:
        use = ToolUse(mode=mode, tools=definitions)
    else:
        raise InvalidRequest(
            f"tool_choice ({reprlib.repr(choice)}) must be {', '.join(map(repr, _MODES))}, or an object that names a "
            "function"
        )
    if use.mode == "none":
        return ToolUse(mode="none")
    if not definitions:
        if use.mode == "required":
            raise InvalidRequest("tool_choice ('required') needs a tool that the model can call: give tools")
        return ToolUse(mode="none")
    return use


def parameters_of(tool: Tool) -> dict[str, Any]:
    """The JSON schema of a function's arguments, which are an object. A function without a schema takes no arguments.

    The schema has no descriptions: a grammar does not need them, and its size is limited.
    """
    parameters = tool.get("parameters")
    if parameters is None:
        return NO_PARAMETERS
    bare: dict[str, Any] = _bare(parameters)
    return bare if "type" in bare or "$ref" in bare else {"type": "object", **bare}


def _bare(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_bare(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    bare = {}
    for key, value in schema.items():
        if key in _MAPS_OF_SCHEMAS and isinstance(value, dict):
            bare[key] = {name: _bare(each) for name, each in value.items()}
        elif key in _DATA:
            bare[key] = value
        elif key not in _ANNOTATIONS:
            bare[key] = _bare(value)
    return bare


def checked_name(name: Any, where: str) -> str:
    """Raises InvalidRequest for anything but a name as OpenAI's API allows it."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(f"{where} ({reprlib.repr(name)}) must be {_NAME_RULE}")
    return name


def _definition(tool: Any, where: str) -> Tool:
    if not isinstance(tool, dict):
        raise InvalidRequest(f"{where} ({reprlib.repr(tool)}) must be an object")
    if (kind := tool.get("type")) != "function":
        raise InvalidRequest(f"{where}.type ({reprlib.repr(kind)}) must be 'function': other tools are not known here")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise InvalidRequest(f"{where}.function ({reprlib.repr(function)}) must be an object with a name")
    checked_name(function.get("name"), f"{where}.function.name")
    kinds = (
        ("description", str, "a string"), ("parameters", dict, "an object with a JSON schema"),
        ("strict", bool, "true or false"),
    )  # fmt: skip
    for key, wanted, in_words in kinds:
        if not isinstance(value := function.get(key), wanted | None):
            raise InvalidRequest(f"{where}.function.{key} ({reprlib.repr(value)}) must be {in_words}")
    parameters = function.get("parameters") or {}
    if (schema_type := parameters.get("type", "object")) != "object":
        raise InvalidRequest(
            f"{where}.function.parameters.type ({reprlib.repr(schema_type)}) must be 'object': arguments have names"
        )
    return function


def _of_object(choice: dict[str, Any], known: dict[str, Tool]) -> ToolUse:
    kind = choice.get("type")
    if kind == "function":
        return ToolUse(mode="named", tools=[_named(choice, known, "tool_choice")], is_limited=len(known) > 1)
    if kind != "allowed_tools":
        raise InvalidRequest(f"tool_choice.type ({reprlib.repr(kind)}) must be 'function' or 'allowed_tools'")
    inner = choice.get("allowed_tools", choice)  # the API of responses has no inner object
    inner = inner if isinstance(inner, dict) else {}
    mode, tools = inner.get("mode"), inner.get("tools")
    if mode != "auto" and mode != "required":
        raise InvalidRequest(f"tool_choice.allowed_tools.mode ({reprlib.repr(mode)}) must be 'auto' or 'required'")
    if not isinstance(tools, list) or not tools:
        raise InvalidRequest(
            f"tool_choice.allowed_tools.tools ({reprlib.repr(tools)}) must be a list of at least one function"
        )
    where = "tool_choice.allowed_tools.tools"
    allowed = {(tool := _named(each, known, f"{where}[{i}]"))["name"]: tool for i, each in enumerate(tools)}
    return ToolUse(mode=mode, tools=list(allowed.values()), is_limited=len(allowed) < len(known))


def _named(choice: Any, known: dict[str, Tool], where: str) -> Tool:
    """The tool that {"type": "function", "function": {"name": ...}} names, or the same without the inner object."""
    if not isinstance(choice, dict) or choice.get("type") != "function":
        raise InvalidRequest(f"{where} ({reprlib.repr(choice)}) must be an object of type 'function'")
    inner = choice.get("function", choice)
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str) or name not in known:
        listed = f"the tools are {', '.join(map(repr, known))[:200]}" if known else "the request has no tools"
        raise InvalidRequest(f"{where}.function.name ({reprlib.repr(name)}) must name one of the tools: {listed}")
    return known[name]
