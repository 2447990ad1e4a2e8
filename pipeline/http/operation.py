"""What the table of routes says about an endpoint besides its handler. The OpenAPI document is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec


class QueryParameter(NamedTuple):
    """A parameter of the URL's query. `schema` is a JSON schema."""

    name: str
    schema: dict[str, Any]
    description: str


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One method of one path.

    Args:
        body: the struct that the handler reads the request's body into; None = it reads no body.
        query: the parameters that it reads from the URL's query.
        content_type: of a whole answer.
        generates: it holds a place in the engine, so a drain waits for it.
        needs_key: it needs a key if the server has keys.
        other_statuses: statuses besides 200 and those of errors whose answer is a whole one too.
    """

    body: type[msgspec.Struct] | None = None
    query: Sequence[QueryParameter] = ()
    content_type: str = "application/json"
    generates: bool = False
    needs_key: bool = False
    other_statuses: Sequence[int] = ()

    @property
    def streams(self) -> bool:
        """A request can ask for server-sent events."""
        return self.body is not None and self.generates
