"""Defines a benchmark's work and measures it as a client: makes prompts and arrivals, sends requests, takes times and
counters.

There are two kinds: all requests at once, which run together to the end; and streams that run all the time while others
arrive. Sequences ignore end-of-sequence tokens, so that every engine computes the same number of tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Final

import numpy as np

from ipc.sampling_params import SamplingParams
from pipeline.client.async_client import AsyncClient
from pipeline.client.streams import OutputStream
from pipeline.metrics.figures import Figures, Roles, Window

POLL_S: Final = 0.02  # between two readings of the engine's counters
STEADY: Final = (0.25, 0.75)  # the window of steady decode, as shares of all output tokens
SETTLE_S: Final = 1.0  # after the last background stream has begun
WARM_UP_SEED: Final = 1  # a seed for prompts other than the measured ones
WARM_UP_OUTPUT_LEN: Final = 2
_FIRST_PROMPT_ID: Final = 10  # lower ids are often special


@dataclass(frozen=True)
class Sampling:
    """The sampling of every request: fields of SamplingParams. The default is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def params(self, max_tokens: int | None) -> SamplingParams:
        """Return parameters for exactly `max_tokens` tokens; None = as many as the model allows."""
        return SamplingParams(ignore_eos=True, max_tokens=max_tokens, **asdict(self))


GREEDY: Final = Sampling()


@dataclass(frozen=True)
class Work:
    """A number of requests of the same lengths, in tokens."""

    num_requests: int
    prompt_len: int
    output_len: int
    sampling: Sampling = GREEDY

    def at_equal_context(self, output_len: int) -> Work:
        """Return the same work with fewer output tokens, and prompts that are longer by half of the difference. So the
        mean length of the sequences in decode stays the same."""
        return replace(self, prompt_len=self.prompt_len + (self.output_len - output_len) // 2, output_len=output_len)


@dataclass
class Times:
    """Latencies as a client sees them, in s. A gap is the time between two arrivals of tokens of one stream."""

    first_token_s: list[float] = field(default_factory=list)
    gap_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """A run of Work, from the first request sent to the last answer.

    `steady` is the part between the shares `STEADY` of the output tokens; None if the run is too short to have it.
    `steady_tokens` are the numbers of tokens generated at its start and end.
    """

    total_s: float
    whole: Figures
    steady: Figures | None
    steady_tokens: tuple[int, int]
    times: Times
    num_preemptions: int


@dataclass(frozen=True)
class MixedRun:
    """A period in which streams run and requests arrive beside them."""

    figures: Figures
    background: Times
    arrivals: Times
    num_arrivals: int
    num_unanswered: int  # arrivals that were unfinished when the period ended


def make_prompts(num: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Return prompts of random token ids. No two prompts begin alike, so that none can use another's KV."""
    low = min(_FIRST_PROMPT_ID, vocab_size - 1)
    ids: list[list[int]] = np.random.default_rng(seed).integers(low, vocab_size, (num, length)).tolist()
    return ids


def poisson_arrivals(rate_per_s: float, seconds: float, seed: int = 0) -> list[float]:
    """Return times in [0, seconds) of a Poisson process: independent arrivals, `rate_per_s` on average."""
    generator = np.random.default_rng(seed)
    moments: list[float] = []
    now = generator.exponential(1 / rate_per_s)
    while now < seconds:
        moments.append(now)
        now += generator.exponential(1 / rate_per_s)
    return moments


def percentiles(values: Iterable[float], *shares: float) -> list[float | None]:
    """Return the percentiles `shares` (50, 99, ...) of values; None for each if there are no values."""
    known = np.array(list(values))
    return [float(np.percentile(known, share)) if known.size else None for share in shares]


async def run_all(
    client: AsyncClient, prompts: list[list[int]], output_len: int, stream: bool, sampling: Sampling = GREEDY
) -> Run:
    """Send all prompts at once and wait for all their tokens. Streaming costs the client time for every token.

    Raises the error of a failed request, and RuntimeError if a request got another number of tokens.
    """
    times = Times()

    async def ask(prompt: list[int]) -> int:
        params = sampling.params(output_len)
        if stream:
            return await read_stream(client.generate(prompt, params, stream=True), times)
        return len((await client.generate(prompt, params)).token_ids)

    before = await client.stats()
    whole = Window(before)
    watch = asyncio.create_task(_watch_steady(client, before, len(prompts) * output_len))
    start = time.perf_counter()
    try:
        counts = await asyncio.gather(*(ask(prompt) for prompt in prompts))
        total_s = time.perf_counter() - start
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
    after = await client.stats()
    if set(counts) != {output_len}:
        raise RuntimeError(f"requests got {min(counts)} to {max(counts)} tokens instead of {output_len} each")
    steady, steady_tokens = (None, (0, 0)) if watch.cancelled() else watch.result()
    preemptions = after["scheduler"]["num_preemptions"] - before["scheduler"]["num_preemptions"]
    return Run(total_s, whole.close(after), steady, steady_tokens, times, int(preemptions))


async def _watch_steady(client: AsyncClient, before: Roles, num_output: int) -> tuple[Figures | None, tuple[int, int]]:
    """Read the counters until the steady window is over."""
    window, opened_at = None, 0
    while True:
        stats = await client.stats()
        done = int(stats["scheduler"]["num_sampled_tokens"] - before["scheduler"]["num_sampled_tokens"])
        if window is None and done >= STEADY[0] * num_output:
            window, opened_at = Window(stats), done
        if window is not None and done >= STEADY[1] * num_output:
            figures = window.close(stats)
            return (figures if figures.num_steps else None), (opened_at, done)
        await asyncio.sleep(POLL_S)


async def run_mixed(
    client: AsyncClient, background: list[list[int]], arriving: list[list[int]], moments: list[float], output_len: int,
    seconds: float, sampling: Sampling = GREEDY,
) -> MixedRun:  # fmt: skip
    """Keep one stream per background prompt running for `seconds`, and send each arriving prompt at its time.

    A background stream that reaches the model's length starts again. All streams are cancelled at the end.
    """
    behind, beside = Times(), Times()

    async def run_on(prompt: list[int]) -> None:
        while True:
            await read_stream(client.generate(prompt, sampling.params(None), stream=True), behind)

    async def arrive(prompt: list[int], moment: float) -> None:
        await asyncio.sleep(moment)
        await read_stream(client.generate(prompt, sampling.params(output_len), stream=True), beside)

    streams = [asyncio.create_task(run_on(prompt)) for prompt in background]
    try:
        while len(behind.first_token_s) < len(background):
            _raise_failed(streams)
            await asyncio.sleep(POLL_S)
        await asyncio.sleep(SETTLE_S)
        behind.gap_s.clear()
        window = Window(await client.stats())
        others = [asyncio.create_task(arrive(p, m)) for p, m in zip(arriving, moments, strict=True)]
        streams += others
        await asyncio.sleep(seconds)
        figures = window.close(await client.stats())
        _raise_failed(streams)
        num_unanswered = sum(not task.done() for task in others)
        return MixedRun(figures, behind, beside, len(others), num_unanswered)
    finally:
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)


async def read_stream(stream: OutputStream, times: Times) -> int:
    """Read a stream that was just sent to its end, and record when its tokens arrived. Returns their number."""
    last_s, count = time.perf_counter(), 0
    async for output in stream:
        if output.token_ids:
            now_s = time.perf_counter()
            (times.gap_s if count else times.first_token_s).append(now_s - last_s)
            last_s, count = now_s, count + len(output.token_ids)
    return count


def _raise_failed(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done():
            task.result()
