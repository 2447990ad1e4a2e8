"""The two-minute tour: launch the engine, send it a batch, watch one text stream, look at the figures.

Uses only what any user has: the harness, the client, and `stats()`.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline import Pipeline, SamplingParams
from pipeline.engine.small_model import CONFIG
from pipeline.metrics.figures import Window
from pipeline.terminal.reporting import run_command

FIRST_QUESTION = "What is the while statement?"
QUESTIONS = [
    "What is the for statement?",
    "What does the try statement do?",
    "What does str.join do?",
    "What is the json module?",
    "Explain operator precedence.",
    "Explain list displays.",
    "Who are you?",
    "What does the pass statement do?",
]
NUM_SHOWN = 3


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def run(config: Path, num_requests: int, max_tokens: int, console: Console) -> None:
    """Launch, measure, print. Raises what the engine raises."""
    params = SamplingParams(max_tokens=max_tokens)
    console.print(f"launching [bold]python -m pipeline.launch --config {os.path.relpath(config)}[/] ...")
    with Pipeline(config) as pipeline:
        client = pipeline.client
        console.print(f"ready at {pipeline.endpoint}\n\n[bold]One chat, streamed:[/] {FIRST_QUESTION}")
        for output in client.generate(chat(FIRST_QUESTION), params, stream=True):
            console.print(output.text, end="", markup=False, highlight=False)
        console.print(f"\n\n[bold]A batch of {num_requests}:[/]")
        questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(num_requests)]
        window = Window(client.stats())
        outputs = client.generate_batch([chat(question) for question in questions], params, progress=True)
        figures = window.close(client.stats())
        for question, output in list(zip(questions, outputs, strict=True))[:NUM_SHOWN]:
            console.print(f"  [bold]{question}[/] {output.text}", highlight=False)
        sent = time.perf_counter()
        stream = client.generate(chat(QUESTIONS[0]), params, stream=True)
        next(stream)
        first_token_s = time.perf_counter() - sent
        stream.close()
    table = Table(title="What the engine did", show_header=False)
    table.add_row("requests", f"{len(outputs)} ({sum(o.error is None for o in outputs)} finished well)")
    table.add_row("tokens/s", f"{figures.tokens_per_s:,.0f}")
    table.add_row("time to first token (one request, idle engine)", f"{first_token_s * 1e3:.1f} ms")
    table.add_row("steps", f"{figures.num_steps} of {figures.tokens_per_step:.1f} tokens")
    host = {role: us for role, us in figures.host_us_per_step.items() if role != "gpu"}
    by_role = ", ".join(f"{role} {us:,.0f}" for role, us in host.items())
    table.add_row("host time per step, beside the device's", f"{sum(host.values()):,.0f} us ({by_role})")
    table.add_row("device time per step", f"{figures.device_us_per_step:,.0f} us")
    shares = figures.device.shares()
    table.add_row("the device's time", ", ".join(f"{name} {share:.2%}" for name, share in shares.items()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    run(arguments.config, arguments.num_requests, arguments.max_tokens, Console())


if __name__ == "__main__":
    run_command(main)
