"""Types of body fields that hold JSON objects, with schemas for the OpenAPI document.

The schemas describe. They check nothing: the code that reads an object checks it, and its errors name the place.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from msgspec import Meta

_NULLABLE_STRING: Final = {"type": ["string", "null"]}
_NULLABLE_OBJECT: Final = {"type": ["object", "null"], "description": "A JSON schema."}
_TEXT_PART: Final = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_BLOCK_TYPES: Final = ["text", "thinking", "redacted_thinking", "tool_use", "tool_result"]
_BLOCK: Final = {"type": "object", "properties": {"type": {"enum": _BLOCK_TYPES}}, "required": ["type"]}


def _with(properties: dict[str, Any], required: list[str]) -> Meta:
    return Meta(extra_json_schema={"properties": properties, "required": required})


_ChatMessage = Annotated[
    dict[str, Any],
    _with(
        {
            "role": {"type": "string", "examples": ["system", "user", "assistant", "tool"]},
            "content": {"anyOf": [_NULLABLE_STRING, {"type": "array", "items": _TEXT_PART}]},
            "tool_calls": {"type": ["array", "null"], "items": {"type": "object"}},
            "tool_call_id": _NULLABLE_STRING,
        },
        ["role"],
    ),
]
_FunctionTool = Annotated[
    dict[str, Any],
    _with(
        {
            "type": {"const": "function"},
            "function": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "description": _NULLABLE_STRING,
                    "parameters": _NULLABLE_OBJECT,
                    "strict": {"type": ["boolean", "null"]},
                },
                "required": ["name"],
            },
        },
        ["type", "function"],
    ),
]
_AnthropicMessage = Annotated[
    dict[str, Any],
    _with(
        {
            "role": {"enum": ["user", "assistant", "system"]},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _BLOCK}]},
        },
        ["role", "content"],
    ),
]
_AnthropicTool = Annotated[
    dict[str, Any],
    _with(
        {
            "name": {"type": "string"},
            "description": _NULLABLE_STRING,
            "input_schema": {"type": "object", "description": "A JSON schema."},
        },
        ["name", "input_schema"],
    ),
]

ChatMessages = Annotated[list[_ChatMessage], Meta(description="The chat so far.")]
FunctionTools = Annotated[list[_FunctionTool], Meta(description="Functions that the model may call.")]
AnthropicMessages = Annotated[list[_AnthropicMessage], Meta(description="The chat so far.")]
AnthropicTools = Annotated[list[_AnthropicTool], Meta(description="Tools that the model may call.")]
ResponseFormat = Annotated[
    dict[str, Any],
    Meta(
        description="The form of the answer: `text`, `json_object`, or `json_schema` with the schema.",
        extra_json_schema={
            "properties": {
                "type": {"type": "string", "examples": ["text", "json_object", "json_schema"]},
                "json_schema": {
                    "type": ["object", "null"],
                    "properties": {"name": {"type": "string"}, "schema": _NULLABLE_OBJECT},
                },
            },
            "required": ["type"],
        },
    ),
]
Prompts = Annotated[
    list[Any],
    Meta(
        description="Texts, the token ids of one text, or those of several.",
        extra_json_schema={
            "anyOf": [
                {"items": {"type": "string"}},
                {"items": {"type": "integer"}},
                {"items": {"type": "array", "items": {"type": "integer"}}},
            ]
        },
    ),
]
