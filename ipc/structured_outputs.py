"""Structured outputs: the grammar that a request's output follows."""

from __future__ import annotations

import msgspec


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Placeholder until the branch that owns it is merged."""

    json: str | None = None
