"""`ringfeed demo`: launch an engine, stream a chat, run a batch, and show the figures. Uses the public API alone."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline import Client, InvalidRequest, Output, Pipeline, SamplingParams
from pipeline.cli import run_module
from pipeline.engine.small_model import CONFIG
from pipeline.metrics.figures import Figures, Window
from pipeline.terminal.engine_options import add_engine_options, pipeline_arguments

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
_EXAMPLES: Final = """\
examples:
  ringfeed demo
  ringfeed demo --model FOLDER_OR_HUB_ID --num-requests 16
"""


def chat(question: str) -> list[dict[str, str]]:
    """A prompt with one message."""
    return [{"role": "user", "content": question}]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ringfeed demo`."""
    parser.epilog = _EXAMPLES
    parser.set_defaults(run=run)
    add_engine_options(parser, CONFIG)
    parser.add_argument("--num-requests", type=int, default=64, metavar="N", help="requests of the batch")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="most tokens of an answer")


def run(options: argparse.Namespace) -> None:
    """Launch, measure, print. Raises RingfeedError."""
    if options.num_requests < 1:
        raise InvalidRequest(f"--num-requests ({options.num_requests}) must be at least 1")
    params = SamplingParams(max_tokens=options.max_tokens)
    pipeline = Pipeline(**pipeline_arguments(options, CONFIG), startup_timeout_s=None)
    console = Console()
    console.print(f"launching [bold]{_command_of(options)}[/] ...", highlight=False)
    with pipeline:
        client = pipeline.client
        console.print(f"ready at {pipeline.endpoint}\n\n[bold]One chat, streamed:[/] {FIRST_QUESTION}")
        for output in client.generate(chat(FIRST_QUESTION), params, stream=True):
            console.print(output.text, end="", markup=False, highlight=False)
        console.print(f"\n\n[bold]A batch of {options.num_requests}:[/]")
        questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(options.num_requests)]
        window = Window(client.stats())
        outputs = client.generate_batch([chat(question) for question in questions], params, progress=True)
        figures = window.close(client.stats())
        for question, output in list(zip(questions, outputs, strict=True))[:NUM_SHOWN]:
            console.print(f"  [bold]{question}[/]", end=" ")
            console.print(output.text, markup=False, highlight=False)
        first_token_s = _time_first_token(client, params)
    console.print(_table(outputs, figures, first_token_s))
    console.print("Next: `ringfeed chat --model FOLDER_OR_HUB_ID` for your own model, `ringfeed --help` for the rest.")


def _command_of(options: argparse.Namespace) -> str:
    """The command that serves the same engine."""
    source = f"--model {options.model}" if options.model else f"--config {os.path.relpath(options.config or CONFIG)}"
    return escape(" ".join(["ringfeed serve", source, *(f"--set {override}" for override in options.set)]))


def _time_first_token(client: Client, params: SamplingParams) -> float:
    """Seconds from sending one request to an idle engine until its first token."""
    sent = time.perf_counter()
    with client.generate(chat(QUESTIONS[0]), params, stream=True) as stream:
        next(stream)
        return time.perf_counter() - sent


def _table(outputs: list[Output], figures: Figures, first_token_s: float) -> Table:
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
    return table


def main() -> int:
    """`python -m pipeline.demo`. Returns the exit status."""
    return run_module("demo", "python -m pipeline.demo")


if __name__ == "__main__":
    sys.exit(main())
