"""Measures what the HTTP server costs: its CPU time for each streamed token and each request, and the time it adds.

Every stream is a chat completion on a connection of its own. The device's time per step is simulated
(`model.null_step_ms`), and tokens are made up. "us/event" is the CPU time of the HTTP processes, user and kernel, by
event that they wrote; an event carries one token unless the client or the server fell behind ("tokens/event"). "us/
request" is that time for a request with one token, asked for as a whole. "added TTFT" is the time to the first event
of one request, above the time to the first output of the same request by ringfeed's own client, asked in turn.
"held back" is the time between events of one stream above the time of a step, at the 99th percentile. With `--bare`,
a second table shows a server of the same libraries that streams fixed bytes at the same pace: the least possible.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from pipeline import AsyncClient, Pipeline, SamplingParams
from pipeline.bench.arguments import add_engine, comma_separated, positive
from pipeline.bench.engine import STARTUP_TIMEOUT_S
from pipeline.bench.http_streams import Stream, Target, steady_http_streams

WARM_UP_S: Final = 1.5
NUM_PROBES: Final = 60  # requests by each way for the time to the first token
_CHAT: Final = "/v1/chat/completions"
_MESSAGES: Final = [{"role": "user", "content": "What is the for statement?"}]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine(parser)
    parser.add_argument("--streams", type=comma_separated(int), default=[1, 32, 256], help="comma-separated")
    parser.add_argument(
        "--step-ms", type=comma_separated(float), default=[4.0, 10.0], help="device time of a step, comma-separated"
    )
    parser.add_argument("--seconds", type=positive, default=5.0, help="length of each measurement")
    parser.add_argument("--bare", action="store_true", help="measure a server that streams fixed bytes too")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")


@dataclass(frozen=True)
class Measurement:
    """Of one engine or server."""

    server: str
    num_streams: int
    step_ms: float
    events_per_s: float
    tokens_per_event: float
    us_per_event: float
    held_back_p99_ms: float
    us_per_request: float | None = None
    added_ttft_p50_ms: float | None = None


def run(arguments: argparse.Namespace) -> None:
    rows = []
    for num_streams, step_ms in itertools.product(arguments.streams, arguments.step_ms):
        rows.append(measure(arguments.config, arguments.overrides, num_streams, step_ms, arguments.seconds))
        if arguments.bare:
            rows.append(asyncio.run(measure_bare(num_streams, step_ms, arguments.seconds)))
    if arguments.json:
        for row in rows:
            print(json.dumps(asdict(row)))
        return
    table = Table(title=f"HTTP benchmark, {os.cpu_count()} cores, client included")
    for name in (
        "server", "streams", "device ms", "events/s", "tokens/event", "us/event", "held back p99 ms", "us/request",
        "added TTFT p50 ms",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(_text(value) for value in asdict(row).values()))
    Console(width=max(Console().width, 120)).print(table)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:,.2f}" if isinstance(value, float) else str(value)


def measure(config: Path, overrides: list[str], num_streams: int, step_ms: float, seconds: float) -> Measurement:
    """Launch an engine, and measure its HTTP server."""
    settings = [
        f"scheduler.max_num_seqs={num_streams + 1}",  # a place for the probes
        f"scheduler.max_num_batched_tokens={max(512, num_streams + 1)}",
        "model.load_format=null",
        f"model.null_step_ms={step_ms}",
        *overrides,
    ]
    with Pipeline(config, settings, startup_timeout_s=STARTUP_TIMEOUT_S) as pipeline:
        assert pipeline.http_url is not None, "the configuration has the section [http]"
        target = Target(pipeline.http_url, pipeline.client.health().model)
        return asyncio.run(_measure(pipeline.endpoint, target, num_streams, step_ms, seconds))


async def _measure(endpoint: str, target: Target, num_streams: int, step_ms: float, seconds: float) -> Measurement:
    async with AsyncClient(endpoint) as client:
        added_s = await _added_ttft(client, target)
        cpu_before = _http_cpu_ns(await client.stats())
        num_requests = await _ask_often(target, num_streams, seconds / 2)
        us_per_request = (_http_cpu_ns(await client.stats()) - cpu_before) / num_requests / 1e3
        # Made-up tokens are often parts of characters. They have no text, so only their ids make them events.
        body = {"messages": _MESSAGES, "stream": True, "ignore_eos": True, "return_token_ids": True}
        request = target.request(_CHAT, body)
        async with steady_http_streams(target, num_streams, request, WARM_UP_S) as streams:
            before, start = await client.stats(), time.perf_counter()
            intervals = await _watch(streams, seconds)
            after, length = await client.stats(), time.perf_counter() - start
    num_events = _http(after, "num_stream_events") - _http(before, "num_stream_events")
    num_tokens = after["scheduler"]["num_sampled_tokens"] - before["scheduler"]["num_sampled_tokens"]
    return Measurement(
        "ringfeed", num_streams, step_ms,
        events_per_s=num_events / length,
        tokens_per_event=num_tokens / num_events,
        us_per_event=(_http_cpu_ns(after) - _http_cpu_ns(before)) / num_events / 1e3,
        held_back_p99_ms=_percentile_99(intervals) * 1e3 - step_ms,
        us_per_request=us_per_request,
        added_ttft_p50_ms=added_s * 1e3,
    )  # fmt: skip


async def measure_bare(num_streams: int, step_ms: float, seconds: float) -> Measurement:
    """Start `bare_asgi.py`, and measure it in the same way."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pipeline.bench.bare_asgi", str(step_ms), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None, "it is a pipe"
        target = Target((await process.stdout.readline()).decode().strip(), "none")
        request = target.request("/", {})
        clock = (~process.pid << 3) | 2  # what clock_getcpuclockid(3) gives
        async with steady_http_streams(target, num_streams, request, WARM_UP_S) as streams:
            events, cpu_ns = sum(each.num_events for each in streams), time.clock_gettime_ns(clock)
            start = time.perf_counter()
            intervals = await _watch(streams, seconds)
            length, cpu_ns = time.perf_counter() - start, time.clock_gettime_ns(clock) - cpu_ns
            num_events = sum(each.num_events for each in streams) - events
    finally:
        process.kill()
        await process.wait()
    return Measurement(
        "bare ASGI", num_streams, step_ms, num_events / length, 1.0, cpu_ns / num_events / 1e3,
        _percentile_99(intervals) * 1e3 - step_ms,
    )  # fmt: skip


async def _added_ttft(client: AsyncClient, target: Target) -> float:
    """The difference of the medians, in seconds. The two ways take turns."""
    request = target.request(_CHAT, {"messages": _MESSAGES, "stream": True, "max_tokens": 1, "ignore_eos": True})
    params = SamplingParams(max_tokens=1, ignore_eos=True, temperature=1.0)
    by_http, by_client = [], []
    stream = await target.connect()
    for _ in range(NUM_PROBES):
        start = time.perf_counter()
        stream.send(request)
        await stream.ended.wait()
        stream.check()
        by_http.append(stream.first_event_at - start)
        start = time.perf_counter()
        async for _ in client.generate(_MESSAGES, params, stream=True):
            by_client.append(time.perf_counter() - start)
            break
    stream.transport.abort()
    return statistics.median(by_http) - statistics.median(by_client)


async def _ask_often(target: Target, concurrency: int, seconds: float) -> int:
    """Ask for single tokens, whole, for a while. Returns the number of answers."""
    request = target.request(_CHAT, {"messages": _MESSAGES, "max_tokens": 1})
    num_answers = 0
    deadline = time.perf_counter() + seconds

    async def keep_asking() -> None:
        nonlocal num_answers
        stream = await target.connect(_Whole)
        while time.perf_counter() < deadline:
            stream.send(request)
            await stream.ended.wait()
            stream.check()
            num_answers += 1
        stream.transport.abort()

    await asyncio.gather(*(keep_asking() for _ in range(concurrency)))
    return num_answers


class _Whole(Stream):
    """A connection whose answers are JSON objects."""

    def data_received(self, data: bytes) -> None:
        self.answer += data
        if self.answer.endswith(b"}"):
            self.ended.set()


async def _watch(streams: list[Stream], seconds: float) -> list[float]:
    """Wait, and return the times between events of one of the streams."""
    moments: list[float] = []
    streams[0].on_event = moments.append
    await asyncio.sleep(seconds)
    streams[0].on_event = None
    return [later - earlier for earlier, later in itertools.pairwise(moments)]


def _percentile_99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)] if values else 0.0


def _http(stats: dict[str, dict[str, float]], name: str) -> float:
    return sum(values[name] for role, values in stats.items() if role.startswith("http"))


def _http_cpu_ns(stats: dict[str, dict[str, float]]) -> float:
    return _http(stats, "cpu_ns")
