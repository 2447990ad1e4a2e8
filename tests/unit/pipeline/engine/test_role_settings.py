"""The settings of a role that come from another section of the configuration than its own."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.engine import role_settings
from pipeline.engine.config import config_from_dict
from tests.unit.pipeline.engine.test_topology import facts
from workers.bootstrap import WorkerBootstrap

PARSERS = {"tool_parser": "hermes", "reasoning_parser": "none"}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"http": {"served_model_names": ["a"], **PARSERS}}, {"served_model_names": ["a"], **PARSERS}),
        ({}, {"served_model_names": [], "tool_parser": "auto", "reasoning_parser": "auto"}),
    ],
    ids=["with http", "without"],
)
def test_the_gateway_knows_the_http_servers_names_and_parsers(
    sections: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = config_from_dict({"model": {"path": "/m"}, **sections})
    worker = WorkerBootstrap(role="gateway", doorbell_fd=-1, stats=None, launcher_pid=1)  # type: ignore[arg-type]
    gateway = role_settings.gateway(facts(config=config), worker)
    assert {name: getattr(gateway, name) for name in expected} == expected
