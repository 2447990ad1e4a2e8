"""`--timeline` on a whole engine: the file's contents, its cost when it is off, and the file after a kill."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline import Pipeline, SamplingParams
from pipeline.timeline.reader import load_events
from tests.integration.conftest import TINY_CONFIG

NULL = {"model.load_format": "null", "model.null_step_ms": 2.0}
NUM_REQUESTS, NUM_TOKENS = 4, 20
PROCESSES = {"gateway", "tokenizer.0", "scheduler", "gpu", "device", "detokenizer", "grammar.0"}


def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)
    return result


def generate(pipeline: Pipeline) -> None:
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    outputs = pipeline.client.generate_batch(["A module is"] * NUM_REQUESTS, params)
    assert all(output.error is None for output in outputs)


def trace_segments(pids: dict[str, int]) -> set[str]:
    """Names of the trace rings that these processes have mapped."""
    lines = [line for pid in pids.values() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {line.split(":")[-1].split()[0] for line in lines if "ringfeed-trace" in line}


def spans_by_thread(events: list[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Complete events by process and thread, outer ones before those that they hold."""
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    threads: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            threads[names[event["pid"]], event["tid"]].append(event)
    for spans in threads.values():
        spans.sort(key=lambda span: (span["ts"], -span["dur"]))
    return threads


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The events of an engine that served a batch and was then told to end by Ctrl-C."""
    path = tmp_path_factory.mktemp("timeline") / "t.json"
    with Pipeline(TINY_CONFIG, NULL, timeline=path) as pipeline:
        assert len(trace_segments(pipeline.pids)) == len(PROCESSES)  # one has two threads; the device has no ring
        generate(pipeline)
        os.kill(pipeline.pids["launcher"], signal.SIGINT)
        assert pipeline.wait(timeout_s=20) == 0
    events: list[dict[str, Any]] = json.loads(path.read_text())
    return events


def test_every_process_and_the_device_have_spans_of_positive_length(recorded: list[dict[str, Any]]) -> None:
    threads = spans_by_thread(recorded)
    assert {process for process, _ in threads} == PROCESSES
    assert all(span["dur"] > 0 and span["ts"] > 0 for spans in threads.values() for span in spans)


def test_spans_of_a_thread_nest(recorded: list[dict[str, Any]]) -> None:
    for thread, spans in spans_by_thread(recorded).items():
        ends: list[float] = []
        for span in spans:
            end = span["ts"] + span["dur"]
            while ends and ends[-1] <= span["ts"]:
                ends.pop()
            assert not ends or end <= ends[-1] + 1e-3, f"{span} of {thread} ends after the span that holds it"
            ends.append(end)


def test_steps_follow_on_each_other_and_each_was_planned_launched_published_and_applied(
    recorded: list[dict[str, Any]],
) -> None:
    threads = spans_by_thread(recorded)
    (steps,) = [spans for (process, _), spans in threads.items() if process == "device"]
    assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in itertools.pairwise(steps))
    tickets = [step["args"]["ticket"] for step in steps]
    assert tickets == list(range(1, len(steps) + 1))
    assert sum(step["args"]["num_seqs"] for step in steps) == NUM_REQUESTS * NUM_TOKENS
    for name in ("plan", "launch", "publish", "apply"):
        found = [span["args"]["ticket"] for spans in threads.values() for span in spans if span["name"] == name]
        assert sorted(found) == tickets


def test_each_prompt_is_encoded_once_and_the_counters_return_to_zero(recorded: list[dict[str, Any]]) -> None:
    counts = Counter(event["name"] for event in recorded if event["ph"] == "X")
    assert counts["encode"] == counts["hand over"] == NUM_REQUESTS
    last = {event["name"]: event["args"] for event in recorded if event["ph"] == "C"}
    assert last == {
        "step ring": {"in_flight": 0},
        "sequences": {"running": 0, "waiting": 0},
        "prompt ring": {"records": 0},
    }


def test_without_it_no_trace_memory_exists(engine: Pipeline) -> None:
    assert trace_segments(engine.pids) == set()


@pytest.mark.slow
def test_a_killed_launcher_leaves_a_file_that_can_be_read_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "t.json.gz"
    with Pipeline(TINY_CONFIG, NULL, timeline=path) as pipeline:
        generate(pipeline)
        until(lambda: any(event["name"] == "apply" for event in load_events(path)))
        workers = [psutil.Process(pid) for pid in pipeline.pids.values()]
        os.kill(pipeline.pids["launcher"], signal.SIGKILL)
        pipeline.wait(timeout_s=20)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    events = load_events(path)
    assert {process for process, _ in spans_by_thread(events)} == PROCESSES
