"""Scheduling parameters: one immutable struct per request, checked where it is made and again at the gateway.

They are separate from the sampling parameters because they do not change the generated tokens. They decide when the
request is scheduled and how long it may take.
"""

from __future__ import annotations

import reprlib
from typing import Final

import msgspec

from ipc.errors import InvalidRequest

MAX_PRIORITY: Final = 1_000
MAX_TENANT_CHARS: Final = 256
MAX_WAIT_S: Final = 1e6


class SchedulingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """When the engine schedules one request, and how long the request may take.

    Args:
        priority: higher is scheduled first, from -1,000 to 1,000; values other than 0 need
            scheduler.policy = "priority".
        tenant: with scheduler.policy = "fair", tenants get equal shares of tokens; "" is a tenant like any other. At
            most 256 characters.
        deadline_s: seconds after which the request ends with what it has generated; finish reason "deadline".
            None = no deadline.
        queue_timeout_s: seconds that the request may wait before it is scheduled; then it ends with finish reason
            "queue_timeout". None = as scheduler.queue_timeout_s says.

    Times count from the request's arrival at the engine and must lie in (0, 1,000,000]. Raises InvalidRequest, naming
    field and value, for anything out of range.
    """

    priority: int = 0
    tenant: str = ""
    deadline_s: float | None = None
    queue_timeout_s: float | None = None

    def __post_init__(self) -> None:
        def check(ok: bool, field: str, rule: str) -> None:
            if not ok:
                raise InvalidRequest(f"{field} ({reprlib.repr(getattr(self, field))}) {rule}")

        def is_wait(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_WAIT_S

        is_int = isinstance(self.priority, int) and not isinstance(self.priority, bool)
        check(is_int and abs(self.priority) <= MAX_PRIORITY, "priority",
              f"must be an integer in [{-MAX_PRIORITY}, {MAX_PRIORITY}]")  # fmt: skip
        check(isinstance(self.tenant, str) and len(self.tenant) <= MAX_TENANT_CHARS, "tenant",
              f"must be a string of at most {MAX_TENANT_CHARS} characters")  # fmt: skip
        for field in ("deadline_s", "queue_timeout_s"):
            value = getattr(self, field)
            rule = f"must be a number of seconds in (0, {MAX_WAIT_S:g}], or None"
            check(value is None or is_wait(value), field, rule)


DEFAULT_SCHEDULING: Final = SchedulingParams()


def no_priority(priority: int) -> str:
    """The message for a priority that the engine's policy would ignore."""
    return (
        f"priority ({priority}) has no effect in this engine: leave it out, or start the engine with "
        'scheduler.policy = "priority"'
    )
