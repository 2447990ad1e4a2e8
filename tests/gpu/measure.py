"""Measures steady decode of a random model through the whole pipeline, beside the floor that the memory sets.

    python -m tests.gpu.measure --config configs/8b.toml --model configs/shapes/llama-3.1-8b --depth 1,2,3

Prints JSON lines. `floor_ms`: the weights that a step reads and the KV of its sequences at the window's mean length,
over the read rate of a reduction over 4 GB in the same run. Idle is by the times in the result records.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline import AsyncClient, Pipeline, SamplingParams
from pipeline.measure import Window

_READ_RATE = """
import torch
x = torch.full((1 << 30,), 1.0, device="cuda")
starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(20)] for _ in range(2))
x.sum()
for a, b in zip(starts, ends):
    a.record(); x.sum(); b.record()
torch.cuda.synchronize()
times = sorted(a.elapsed_time(b) for a, b in zip(starts, ends))
print(torch.cuda.get_device_name(), "|", x.numel() * 4 / times[10] / 1e6)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json")
    parser.add_argument("--depth", type=lambda text: [int(part) for part in text.split(",")], default=[2])
    parser.add_argument("--num-requests", type=int, default=32)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=1024)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    done = subprocess.run([sys.executable, "-c", _READ_RATE], capture_output=True, text=True, check=True)
    device, rate = done.stdout.strip().split(" | ")
    print(json.dumps({"device": device, "read_gb_per_s": round(float(rate), 1)}), flush=True)
    for depth in arguments.depth:
        print(json.dumps(measure(arguments, depth, float(rate) * 1e9)), flush=True)


def measure(arguments: argparse.Namespace, depth: int, read_bytes_per_s: float) -> dict[str, Any]:
    overrides = [
        f"model.path={arguments.model.resolve()}", "model.load_format=dummy", f"ring.depth={depth}",
        f"scheduler.max_num_seqs={arguments.num_requests}", *arguments.overrides,
    ]  # fmt: skip
    start = time.perf_counter()
    with Pipeline(arguments.config, overrides, startup_timeout_s=400) as pipeline:
        ready_s = time.perf_counter() - start
        total_s, figures = asyncio.run(_stream_all(pipeline.endpoint, arguments))
    weights, kv_per_token = _bytes_read(json.loads((arguments.model / "config.json").read_text()))
    # The window is the middle half of the outputs.
    mean_len = arguments.prompt_len + arguments.output_len / 2
    floor_s = (weights + kv_per_token * mean_len * arguments.num_requests) / read_bytes_per_s
    step_s = figures.seconds / max(figures.num_steps, 1)
    return {
        "depth": depth, "ready_s": round(ready_s, 1), "total_s": round(total_s, 2),
        "window_steps": figures.num_steps, "ms_per_step": round(step_s * 1e3, 3),
        "device_ms_per_step": round(figures.device_us_per_step / 1e3, 3),
        "idle_percent": round(100 * (1 - figures.device_us_per_step * 1e-6 / step_s), 2),
        "wait_percent": round(100 * figures.device_wait_share, 2),
        "device_percent": {name: round(100 * share, 2) for name, share in figures.device.shares().items()},
        "floor_ms": round(floor_s * 1e3, 3), "ratio_to_floor": round(step_s / floor_s, 2),
        "tokens_per_s": round(figures.tokens_per_s),
        "host_us": {k: round(v) for k, v in figures.host_us_per_step.items()},
    }  # fmt: skip


async def _stream_all(endpoint: str, arguments: argparse.Namespace) -> tuple[float, Any]:
    params = SamplingParams(ignore_eos=True, max_tokens=arguments.output_len, temperature=0.0)
    counts = [0] * arguments.num_requests

    async def stream(client: AsyncClient, index: int) -> None:
        prompt = [(7919 * index + 31 * i) % 1000 + 1 for i in range(arguments.prompt_len)]
        async for output in client.generate(prompt, params, stream=True):
            counts[index] += len(output.token_ids)

    async def reached(share: float) -> None:
        while min(counts) < share * arguments.output_len:
            if finished := [task for task in tasks if task.done()]:
                for task in finished:
                    task.result()
            await asyncio.sleep(0.002)

    async with AsyncClient(endpoint) as client:
        start = time.perf_counter()
        tasks = [asyncio.create_task(stream(client, i)) for i in range(arguments.num_requests)]
        await reached(0.25)
        window = Window(await client.stats())
        await reached(0.75)
        figures = window.close(await client.stats())
        await asyncio.gather(*tasks)
        total_s = time.perf_counter() - start
    assert counts == [arguments.output_len] * arguments.num_requests, "some request got another number of tokens"
    return total_s, figures


def _bytes_read(config: dict[str, Any]) -> tuple[int, int]:
    """Of a Llama in bfloat16: the weights that a decode step reads, and K and V of one token."""
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    attention = hidden * dim * (2 * heads + 2 * kv_heads)
    weights = layers * (attention + 3 * hidden * inner) + hidden * config["vocab_size"]
    return 2 * weights, 2 * layers * 2 * kv_heads * dim


if __name__ == "__main__":
    main()
