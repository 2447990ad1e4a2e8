"""Sends requests with shared beginnings, with the prefix cache on and off. Measures prompt tokens computed, and time to
first token.

All requests are sent at once, as streams of one client. Each prompt is one of a few shared beginnings, in turn,
followed by an unshared end. Ids are random, so nothing else is shared. The number of computed prompt tokens comes from
the scheduler's counters, without recomputation after a preemption.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table

from ipc.errors import ConfigError
from pipeline import AsyncClient, Pipeline, SamplingParams
from pipeline.engine.small_model import CONFIG

TAIL_TOKENS: Final = 32
VOCAB: Final = range(5, 1_000)  # ids that any model has


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help="the engine")
    parser.add_argument("--num-requests", type=int, default=64, help="sent at once")
    parser.add_argument("--num-prefixes", type=int, default=4, help="different beginnings")
    parser.add_argument("--prefix-tokens", type=int, default=512, help="length of a beginning")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens that each request generates")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")


def run(arguments: argparse.Namespace) -> None:
    prompts = make_prompts(arguments.num_requests, arguments.num_prefixes, arguments.prefix_tokens)
    title = (
        f"{len(prompts)} requests over {arguments.num_prefixes} prefixes of {arguments.prefix_tokens} tokens, "
        f"{os.cpu_count()} cores"
    )
    columns = ("cache", "prompt tokens", "computed", "first token p50 ms", "p95 ms", "all done s")
    table = Table(*columns, title=title)
    for is_on in (True, False):
        figures = measure(arguments.config, prompts, arguments.max_tokens, is_on)
        if arguments.json:
            print(json.dumps({"prefix_caching": is_on, **figures}), flush=True)
        else:
            table.add_row("on" if is_on else "off", *(f"{value:,g}" for value in figures.values()))
    if not arguments.json:
        Console().print(table)


def make_prompts(num_requests: int, num_prefixes: int, prefix_tokens: int) -> list[list[int]]:
    """Return prompts of token ids. Request i begins with prefix i modulo `num_prefixes`, and continues with ids that no
    other has."""
    if min(num_requests, num_prefixes, prefix_tokens) < 1:
        raise ConfigError(
            f"--num-requests ({num_requests}), --num-prefixes ({num_prefixes}) and --prefix-tokens ({prefix_tokens}) "
            "must be at least 1"
        )
    draw = random.Random(0)
    prefixes = [draw.choices(VOCAB, k=prefix_tokens) for _ in range(num_prefixes)]
    return [prefixes[i % num_prefixes] + draw.choices(VOCAB, k=TAIL_TOKENS) for i in range(num_requests)]


def measure(config: Path, prompts: list[list[int]], max_tokens: int, prefix_caching: bool) -> dict[str, float]:
    """Return figures by name, measured on a new engine that one other request has warmed up."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    with Pipeline(config, {"cache.prefix_caching": prefix_caching}) as pipeline:
        return asyncio.run(_stream_all(pipeline.endpoint, prompts, params))


async def _stream_all(endpoint: str, prompts: list[list[int]], params: SamplingParams) -> dict[str, float]:
    first_s: list[float] = []

    async def stream(client: AsyncClient, prompt: list[int]) -> None:
        is_first = True
        async for _ in client.generate(prompt, params, stream=True):
            if is_first:
                first_s.append(time.perf_counter() - started)
            is_first = False

    async with AsyncClient(endpoint) as client:
        await client.generate([VOCAB[0]] * len(prompts[0]), params)
        before = (await client.stats())["scheduler"]
        started = time.perf_counter()
        await asyncio.gather(*(stream(client, prompt) for prompt in prompts))
        seconds = time.perf_counter() - started
        after = (await client.stats())["scheduler"]
    num_tokens, num_cached = (after[name] - before[name] for name in ("num_prompt_tokens", "num_cached_tokens"))
    p50, p95 = np.percentile(first_s, (50, 95)).tolist()
    return {
        "num_prompt_tokens": num_tokens,
        "num_computed_prompt_tokens": num_tokens - num_cached,
        "first_token_p50_ms": round(p50 * 1e3, 1),
        "first_token_p95_ms": round(p95 * 1e3, 1),
        "all_done_s": round(seconds, 2),
    }
