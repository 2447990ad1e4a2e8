"""The names that users may rely on: which ones there are, what they load, and that each is documented."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import ipc.errors
import pipeline
from ipc.messages import Health as HealthMessage
from pipeline.environment.module_search import module_environment

PUBLIC = [
    "AsyncClient", "Chat", "Client", "Completion", "Config", "ConfigError", "EngineStats", "EngineUnavailable",
    "Health", "Interrupted", "InvalidRequest", "LogitsNotFinite", "ModelUnsupported", "Output", "OutputStream",
    "Pipeline", "ProtocolError", "QueueFull", "RequestFailed", "RequestTimes", "RingfeedError", "SamplingParams",
    "SchedulingParams", "Stream", "StructuredOutputs", "TokenLogprob", "TokenizedPrompt", "TokensExcluded", "Usage",
]  # fmt: skip


def documented_members(kind: type) -> dict[str, Any]:
    """Public methods, class methods and properties that our classes define. Fields are not among them."""
    members = {}
    for base in reversed(kind.__mro__):
        if base.__module__.split(".")[0] in ("ipc", "pipeline", "workers"):
            for name, value in vars(base).items():
                if not name.startswith("_") and isinstance(value, FunctionType | classmethod | property):
                    members[name] = value
    return members


def test_the_public_names_are_these() -> None:
    assert pipeline.__all__ == sorted(PUBLIC) == PUBLIC
    assert set(PUBLIC) <= set(dir(pipeline))
    for name in PUBLIC:
        assert inspect.isclass(getattr(pipeline, name)), name


def test_every_error_that_a_message_can_carry_is_public() -> None:
    for error in (ipc.errors.RingfeedError, *ipc.errors._BY_CODE.values()):
        assert getattr(pipeline, error.__name__) is error
        assert issubclass(error, pipeline.RingfeedError)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Pipelin"):
        pipeline.__getattr__("Pipelin")


def test_importing_the_public_api_does_not_load_the_configuration_of_engines() -> None:
    script = (
        "import sys, pipeline\n"
        "pipeline.Client, pipeline.Health\n"
        "heavy = {'torch', 'transformers', 'workers', 'pipeline.engine.config'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "pipeline.Config, pipeline.Pipeline\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], env=module_environment(), check=True, timeout=60)


def test_a_type_checker_sees_every_public_name() -> None:
    """A checker reads the module's text: a name that only `__getattr__` gives would have no type."""
    module = Path(pipeline.__file__)
    imported = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(PUBLIC) <= imported
    assert all((module.parent.parent / package / "py.typed").exists() for package in ("ipc", "pipeline", "workers"))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_class_its_methods_and_its_arguments_are_documented(name: str) -> None:
    kind = getattr(pipeline, name)
    text = vars(kind).get("__doc__") or ""
    assert text.strip(), f"{name} has no docstring"
    for member, value in documented_members(kind).items():
        assert (value.__doc__ or "").strip(), f"{name}.{member} has no docstring"
    is_made_by_users = not issubclass(kind, Exception) and not name.endswith("Stream")
    for argument in inspect.signature(kind).parameters if is_made_by_users else ():
        assert f"{argument}:" in text or f"`{argument}`" in text, f"{name}: no word about {argument}"


def test_the_health_that_a_client_returns_is_the_engines_without_the_query() -> None:
    assert set(pipeline.Health.__struct_fields__) == set(HealthMessage.__struct_fields__) - {"query_id"}
