"""What a request asks of the scheduler: one immutable struct, checked where it is made and again at the gateway.

Apart from the sampling parameters because none of it changes which tokens come, only when, and whether at all.
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
    """When one request has its turn, and how long it may take.

    Args:
        priority: higher goes first, from -1,000 to 1,000; other than 0 only with scheduler.policy = "priority".
        tenant: whose share its tokens count to with scheduler.policy = "fair"; "" is a tenant like any other.
        deadline_s: ends it so long after it reached the engine, with what it has got; finish reason "deadline".
        queue_timeout_s: ends it if it still waits for its turn after so long; finish reason "queue_timeout". None: as
            scheduler.queue_timeout_s says.

    Raises InvalidRequest, naming field and value, for anything out of range.
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
