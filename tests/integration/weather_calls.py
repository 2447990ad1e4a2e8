"""What the tests of the official clients share: a tool, and an engine whose answers a test writes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from tests.unit.pipeline.http.application import app_of, use_client
from tests.unit.pipeline.http.fake_engine import THINKING, FakeEngine

ClientT = TypeVar("ClientT")
T = TypeVar("T")

MESSAGES: Any = [{"role": "user", "content": "What is the weather in Rio?"}]
WEATHER_NAME = {"name": "get_weather", "description": "The weather of a city."}
WEATHER_SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 9},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
CALL_RIO = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rio", "days": 2}}\n</tool_call>'


def use_written_engine(make: Callable[..., ClientT], engine: FakeEngine, use: Callable[[ClientT], Awaitable[T]]) -> T:
    """The result of `use` with a client, made by `make`, in front of an engine with Qwen's calls and reasoning."""
    return use_client(app_of(engine, THINKING, keys=["k"]), make, use)
