"""A selection of the JSON Schema Test Suite: schemas, each with instances that are valid or not.

json_schemas.json names its source and licence. The selection holds the groups whose schemas the grammar workers accept.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple


class SchemaGroup(NamedTuple):
    """A schema and instances of which some are valid."""

    file: str  # of the suite
    description: str
    schema: dict[str, Any]
    tests: list[dict[str, Any]]  # `data` is an instance, `valid` tells whether the schema accepts it


@cache
def schema_groups() -> list[SchemaGroup]:
    """About 200 groups in the order of the suite."""
    return [SchemaGroup(**group) for group in json.loads(Path(__file__).with_suffix(".json").read_text())["groups"]]
