"""`/live`: the figures that the page at `/` draws, once a second: counters, gauges, and the latest steps.

All come from the engine's statistics, so every server process gives the same. Like `/metrics`, it needs no key: it has
sums over all requests, and no text, no token and no name of any one. Requests within a moment share one reading.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ipc.record_layout import HostArray
from pipeline.http.engine_api.status import version_number
from pipeline.http.errors import HttpError
from pipeline.http.operation import QueryParameter
from pipeline.http.transport import Call, Reply
from workers.scheduler.config import RECENT_STEP_FIELDS, RECENT_STEPS

MAX_STEPS: Final = 1_000  # in one answer
QUERY: Final = (QueryParameter("after", {"type": "integer", "minimum": 0}, "Steps after the one with this ticket."),)
_COUNTERS: Final = (
    "num_steps", "num_prefill_steps", "num_sampled_tokens", "num_prompt_tokens", "num_cached_tokens", "num_admitted",
    "num_finished", "num_cancelled", "num_refused", "num_preemptions",
)  # fmt: skip
_GAUGES: Final = ("num_running", "num_waiting", "num_preempted", "num_blocks", "num_free_blocks", "num_cached_blocks")
_CAUSES: Final = ("busy", "no_work", "scheduler", "copies", "masks")
_TICKET, _END = RECENT_STEP_FIELDS.index("ticket"), RECENT_STEP_FIELDS.index("end_ns")
_PAUSE = [RECENT_STEP_FIELDS.index(name) for name in ("pause_ns", "resume_ns")]
_IS_TIME: Final = np.array([name.endswith("_ns") for name in RECENT_STEP_FIELDS])


async def live(call: Call) -> Reply:
    """Counters, gauges, and the steps whose ticket is above the query's `after` (default 0): at most the newest 1,000.

    Times are microseconds of this machine's CLOCK_MONOTONIC; those of the steps count from `base_us`.
    """
    after = _after(call)
    now_us, health, stats = await call.service.live.get()
    scheduler = stats.roles["scheduler"]
    answer: dict[str, Any] = {
        "model": call.service.model_names[0],
        "max_model_len": health.max_model_len,
        "version": version_number(),
        "state": health.state,
        "detail": health.detail,
        "needs_key": call.service.config.api_key_file is not None,
        "now_us": now_us,
        "counters": {name: scheduler[name] for name in _COUNTERS},
        "gauges": {name: scheduler[name] for name in _GAUGES},
        "device_ns": {cause.replace("_", " "): scheduler[f"device_{cause}_ns"] for cause in _CAUSES},
        "device_last_end_us": int(scheduler["device_last_end_ns"]) // 1_000,
        "cpu_ns": {role: counters["cpu_ns"] for role, counters in stats.roles.items()},
        "steps": steps_after(np.asarray(stats.arrays["scheduler"][RECENT_STEPS]), after),
    }
    return Reply(answer, headers={"cache-control": "no-store"})


def _after(call: Call) -> int:
    given = call.query.get("after", "0")
    if not (given.isascii() and given.isdigit() and len(given) <= 18):
        raise HttpError(400, f"after ({given[:50]!r}) must be the ticket of a step: an integer from 0", param="after")
    return int(given)


def steps_after(log: HostArray, after: int) -> dict[str, Any]:
    """The steps of a log ([num_rows, len(RECENT_STEP_FIELDS)] int64) whose ticket is above `after`, oldest first.

    If the newest ticket is below `after`, the engine has started again, and all steps are new. A row that the scheduler
    was writing at the moment of the copy is left out: its step does not end after the one before it.
    """
    if log[:, _TICKET].max() < after:
        after = 0
    rows = log[log[:, _TICKET] > after]
    rows = rows[np.argsort(rows[:, _TICKET])][-MAX_STEPS:]
    rows = rows[np.diff(rows[:, _END], prepend=0) > 0]
    no_pause = rows[:, _PAUSE[0]] == 0
    rows[np.ix_(no_pause, _PAUSE)] = rows[no_pause, _END][:, None]
    base_us = int(rows[0, _END]) // 1_000 if len(rows) else 0
    rows[:, _IS_TIME] = rows[:, _IS_TIME] // 1_000 - base_us
    fields = [f"{name[:-3]}_us" if name.endswith("_ns") else name for name in RECENT_STEP_FIELDS]
    return {"fields": fields, "base_us": base_us, "rows": rows.tolist()}
