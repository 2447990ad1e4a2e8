"""What the page polls, from a log of steps as the scheduler writes it."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from starlette.datastructures import Headers

from pipeline.client.outputs import EngineStats
from pipeline.http.config import HttpConfig
from pipeline.http.engine_api.live import MAX_STEPS, live, steps_after
from pipeline.http.errors import HttpError
from pipeline.http.live_reading import LiveReading, read_engine
from pipeline.http.transport import Call
from workers.scheduler.config import COUNTERS, RECENT_STEP_FIELDS, RECENT_STEPS

NUM_ROWS = 8
SHIFT_NS = 5_000_000_000  # the machine has been up for a while


def log_of(*tickets: int, num_rows: int = NUM_ROWS) -> Any:
    """Steps of 1 ms, one after the other."""
    log = np.zeros((num_rows, len(RECENT_STEP_FIELDS)), np.int64)
    for ticket in tickets:
        start = SHIFT_NS + ticket * 1_000_000
        log[ticket % num_rows] = (
            ticket, start - 900_000, start - 800_000, start - 700_000, start - 600_000, start, start + 1_000_000, 0, 0,
            start + 1_100_000, start + 1_200_000, 3, 30 + ticket,
        )  # fmt: skip
    return log


def steps(log: Any, after: int = 0) -> list[dict[str, int]]:
    """The steps with their times counted from the machine's start again, in us."""
    answer = steps_after(log, after)
    rows = [dict(zip(answer["fields"], row, strict=True)) for row in answer["rows"]]
    return [
        {name: value + answer["base_us"] if name.endswith("_us") else value for name, value in row.items()}
        for row in rows
    ]


def tickets(log: Any, after: int = 0) -> list[int]:
    return [step["ticket"] for step in steps(log, after)]


def test_steps_come_in_order_whatever_row_they_are_in_and_only_new_ones() -> None:
    log = log_of(*range(5, 13))
    assert tickets(log) == list(range(5, 13))
    assert tickets(log, after=10) == [11, 12]
    assert tickets(log, after=12) == []


def test_times_are_microseconds_and_a_step_without_masks_has_an_empty_pause_at_its_end() -> None:
    (step,) = steps(log_of(7))
    assert step == {
        "ticket": 7, "work_since_us": 5_006_100, "plan_us": 5_006_200, "planned_us": 5_006_300,
        "received_us": 5_006_400, "start_us": 5_007_000, "end_us": 5_008_000, "pause_us": 5_008_000,
        "resume_us": 5_008_000, "apply_us": 5_008_100, "applied_us": 5_008_200, "num_seqs": 3, "num_tokens": 37,
    }  # fmt: skip


def test_a_pause_for_masks_is_shown_where_it_was() -> None:
    log = log_of(7)
    log[7, 7:9] = SHIFT_NS + 7_200_000, SHIFT_NS + 7_300_000
    (step,) = steps(log)
    assert (step["pause_us"], step["resume_us"]) == (5_007_200, 5_007_300)


def test_an_empty_log_has_no_steps() -> None:
    assert steps_after(log_of(), 0)["rows"] == []


def test_a_row_that_was_being_written_is_left_out() -> None:
    log = log_of(5, 6, 7, 8)
    log[1] = log_of(1)[1]
    log[1, 0] = 9  # the new ticket, with the times of step 1
    assert tickets(log) == [5, 6, 7, 8]


def test_a_new_engine_counts_from_one_again() -> None:
    assert tickets(log_of(1, 2), after=5_000) == [1, 2]


def test_an_answer_has_the_newest_steps_and_a_bound() -> None:
    log = log_of(*range(1, 2_049), num_rows=2_048)
    assert tickets(log) == list(range(2_049 - MAX_STEPS, 2_049))


class FakeClient:
    async def health(self) -> Any:
        return SimpleNamespace(state="ready", detail="", max_model_len=64)

    async def stats_with_arrays(self, names: list[str]) -> EngineStats:
        assert names == [RECENT_STEPS]
        roles = {"scheduler": {**dict.fromkeys(COUNTERS, 2.0), "cpu_ns": 5.0}, "http.0": {"cpu_ns": 7.0}}
        return EngineStats(roles, {"scheduler": {RECENT_STEPS: memoryview(log_of(3, 4))}})


class FakeReading:
    async def get(self) -> LiveReading:
        return await read_engine(FakeClient())  # type: ignore[arg-type]


def ask(query: bytes, **settings: Any) -> dict[str, Any]:
    service: Any = SimpleNamespace(live=FakeReading(), model_names=("m",), config=HttpConfig(**settings))
    call = Call(
        service=service, method="GET", path_params={}, headers=Headers({}), body=b"", request_id="r",
        scope={"query_string": query},
    )  # fmt: skip
    return dict(json.loads(msgspec.json.encode(asyncio.run(live(call)).value)))  # type: ignore[union-attr]


def test_the_answer_has_the_state_the_figures_and_the_steps() -> None:
    answer = ask(b"after=3")
    assert (answer["state"], answer["model"], answer["max_model_len"]) == ("ready", "m", 64)
    assert answer["counters"]["num_sampled_tokens"] == answer["gauges"]["num_running"] == 2
    assert answer["device_ns"] == dict.fromkeys(("busy", "no work", "scheduler", "copies", "masks"), 2)
    assert answer["cpu_ns"] == {"scheduler": 5, "http.0": 7}
    assert [row[0] for row in answer["steps"]["rows"]] == [4]
    assert (answer["needs_key"], ask(b"", api_key_file="keys")["needs_key"]) == (False, True)


@pytest.mark.parametrize("query", [b"after=x", b"after=-1", b"after=%C2%B2", b"after=9999999999999999999"])
def test_a_ticket_that_is_no_number_is_refused(query: bytes) -> None:
    with pytest.raises(HttpError, match=r"after \(.*\) must be the ticket of a step"):
        ask(query)
