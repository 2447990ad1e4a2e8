"""Configuration of the queues: the keys of [scheduler] that the gateway reads as well."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ipc.scheduling_params import MAX_WAIT_S


class PolicyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How requests wait: the part of [scheduler] that the gateway needs as well."""

    queue_timeout_s: (
        Annotated[
            float,
            Meta(
                gt=0,
                le=MAX_WAIT_S,
                description="How long a request may wait until it is admitted: for a tokenizer and for the scheduler "
                "together. Then it ends with finish reason `queue_timeout`. `queue_timeout_s` of a request overrides "
                "it. Not set: no time-out.",
            ),
        ]
        | None
    ) = None
    policy: Annotated[
        Literal["fifo", "priority", "fair"],
        Meta(
            description="Which waiting request is tokenized and admitted next. `fifo`: in order of arrival. "
            "`priority`: the highest priority; waiting raises it. `fair`: tenants take turns, each worth the same "
            "number of tokens."
        ),
    ] = "fifo"
    priority_aging_s: Annotated[
        float,
        Meta(
            ge=0.001,
            le=86_400,
            description='With `policy = "priority"`: this many seconds of waiting raise the priority by one.',
        ),
    ] = 10.0
    fair_quantum: Annotated[
        int, Meta(ge=1, le=16_777_216, description='With `policy = "fair"`: tokens of one turn of a tenant.')
    ] = 1024
