"""The two-minute tour: launch the engine, send it a batch, watch one text stream, look at the figures.

Uses only what any user has: the harness, the client, and `stats()`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline import Output, Pipeline, SamplingParams
from pipeline.measure import Window

CONFIG = Path(__file__).parent.parent / "configs" / "tiny.toml"

PROMPTS = [
    "The for statement",
    "A class definition",
    "An exception is raised when",
    "Return a list of",
    "The with statement is used to",
    "A module is",
    "If the optional argument",
    "Lambda expressions",
]
CHAT = [{"role": "user", "content": "What is the while statement?"}]


@dataclass
class Timing:
    """When one streamed request was sent, first answered and finished, in seconds."""

    sent: float
    first: float = 0.0
    tokens: int = 0
    text: list[str] = field(default_factory=list)

    def take(self, output: Output, now: float) -> None:
        if output.token_ids and not self.first:
            self.first = now
        self.tokens += len(output.token_ids)
        self.text.append(output.text)


def run(config: Path, num_requests: int, max_tokens: int, console: Console) -> None:
    """Launch, measure, print. Raises what the engine raises."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.7, top_p=0.9, seed=1)
    console.print(f"launching [bold]python -m pipeline.launch --config {config.name}[/] ...")
    with Pipeline(config) as pipeline:
        client = pipeline.client
        console.print(f"ready at {pipeline.endpoint}\n\n[bold]One chat, streamed:[/] {CHAT[0]['content']}")
        for output in client.generate(CHAT, SamplingParams(max_tokens=max_tokens), stream=True):
            console.print(output.text, end="", markup=False, highlight=False)
        console.print(f"\n\n[bold]A batch of {num_requests}:[/]")
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(num_requests)]
        window = Window(client.stats())
        outputs = client.generate_batch(prompts, params, progress=True)
        figures = window.close(client.stats())
        for prompt, output in list(zip(prompts, outputs, strict=True))[:3]:
            console.print(f"  [bold]{prompt}[/]{output.text.splitlines()[0]} ...", highlight=False)
        timing = Timing(time.perf_counter())
        for output in client.generate(PROMPTS[0], params, stream=True):
            timing.take(output, time.perf_counter())
    table = Table(title="What the engine did", show_header=False)
    table.add_row("requests", f"{len(outputs)} ({sum(o.error is None for o in outputs)} finished well)")
    table.add_row("tokens/s", f"{figures.tokens_per_s:,.0f}")
    table.add_row("time to first token (one request, idle engine)", f"{(timing.first - timing.sent) * 1e3:.1f} ms")
    table.add_row("steps", f"{figures.num_steps} of {figures.tokens_per_step:.1f} tokens")
    table.add_row("host time per step (scheduler)", f"{figures.host_us_per_step['scheduler']:,.0f} us")
    table.add_row("device time per step", f"{figures.device_us_per_step:,.0f} us")
    table.add_row("share of the time the device waited for the host", f"{figures.device_wait_share:.2%}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    run(arguments.config, arguments.num_requests, arguments.max_tokens, Console())


if __name__ == "__main__":
    main()
