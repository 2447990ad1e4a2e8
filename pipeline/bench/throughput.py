"""Runs the engine on a given work, and compares it with the bounds of memory and matrix units and with other engines.

    python -m pipeline.bench throughput --config configs/8b.toml --model configs/shapes/llama-3.1-8b \
        --num-requests 32 --prompt-len 128 --output-len 8192 --depth 1,2,3 --peers transformers-async

All requests arrive at once, or, with `--arrivals poisson`, beside streams that run all the time. The device's rates are
measured before and after. The bounds (`roofline.py`) are the least time that the model's reads and products take at the
rates before, integrated over the run. A model folder without weights runs with random ones. "Idle" is the engine's live
gauge: the share of the device's time between steps, by the times in the result records.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console

from ipc.errors import ConfigError, InvalidRequest
from pipeline.bench.arguments import add_engine, comma_separated, made_folder, positive
from pipeline.bench.engine import Engine
from pipeline.bench.figures import Row, engine_row, mixed_row, peer_row, profile_figures, rounded
from pipeline.bench.kernel_table import KernelTable, kernel_table
from pipeline.bench.peers import PEERS, PeerSpec, run_peer
from pipeline.bench.report import print_kernels, print_table
from pipeline.bench.roofline import ModelShape, Rates
from pipeline.bench.workload import GREEDY, Sampling, Work
from pipeline.engine.config import Config, load_config
from pipeline.engine.model_files import ServedModel, find_model
from pipeline.environment.module_search import module_command, module_environment
from pipeline.terminal.reporting import print_error
from pipeline.timeline import __main__ as timeline
from workers.gpu.config import ModelConfig

PROFILE_OUTPUT_LEN: Final = 192  # output tokens of a request under the profiler: enough steps for its window
STREAM_UP_TO: Final = 64  # requests; with more, the client's work per token would compete with the engine's
SPARE_ROWS: Final = 32  # for arrivals beside background streams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine(parser, default=None)
    parser.add_argument("--model", type=Path, help="a folder instead of the configuration's; config.json is enough")
    parser.add_argument("--num-requests", type=int, default=32, help="that arrive at once")
    parser.add_argument("--prompt-len", type=int, default=128, help="tokens; longer ones with --output-len 1 = prefill")
    parser.add_argument("--output-len", type=int, default=1024, help="tokens")
    parser.add_argument("--temperature", type=float, default=GREEDY.temperature, help="of every request; 0 = greedy")
    parser.add_argument("--top-k", type=int, default=GREEDY.top_k, help="of every request; 0 = off")
    parser.add_argument("--top-p", type=float, default=GREEDY.top_p, help="of every request; 1 = off")
    parser.add_argument("--min-p", type=float, default=GREEDY.min_p, help="of every request; 0 = off")
    parser.add_argument("--depth", type=comma_separated(int), default=[2], help="ring.depth, comma-separated")
    parser.add_argument(
        "--stream", action=argparse.BooleanOptionalAction,
        help=f"stream the tokens, which times them; default: with up to {STREAM_UP_TO} requests",
    )  # fmt: skip
    parser.add_argument("--arrivals", choices=("at-once", "poisson"), default="at-once", help="of requests")
    parser.add_argument("--rate", type=positive, default=4.0, help="poisson: arrivals per second")
    parser.add_argument("--background", type=int, default=32, help="poisson: streams that run all the time")
    parser.add_argument("--seconds", type=positive, default=30.0, help="poisson: length of the measurement")
    parser.add_argument("--peers", type=_peers, default=[], help=f"comma-separated, of {', '.join(PEERS)}")
    parser.add_argument(
        "--peer-output-len", type=int,
        help="let peers run shorter: their prompts are longer by half of the difference, for an equal mean context",
    )  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="run once more under torch's profiler, peers too")
    parser.add_argument(
        "--kernels", action="store_true",
        help="the same, and print the kernels of a step in the middle of the output, with their share of the read rate",
    )  # fmt: skip
    parser.add_argument(
        "--timeline", type=made_folder, metavar="FOLDER",
        help="write a trace of each depth there, and a picture of them above each other if matplotlib is installed",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="JSON lines as results come; the table goes to stderr")


def run(arguments: argparse.Namespace) -> None:
    """Measure and print. Returns the exit status: 1 if a peer gave no figures, 2 for work that this configuration
    cannot do."""
    try:
        failed = _Benchmark(arguments).run()
    except ConfigError as error:
        print_error(error)
        sys.exit(2)
    sys.exit(1 if failed else 0)


class _Benchmark:
    """One run of the command. Raises ConfigError for work that this configuration cannot do."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p)
        self._work = Work(arguments.num_requests, arguments.prompt_len, arguments.output_len, sampling)
        self._mixed = arguments.arrivals == "poisson"
        if min(arguments.num_requests, arguments.prompt_len, arguments.output_len) < 1:
            raise ConfigError("--num-requests, --prompt-len and --output-len must be at least 1")
        try:
            sampling.params(arguments.output_len)
        except InvalidRequest as error:
            raise ConfigError(str(error)) from None
        if arguments.background < 1:
            raise ConfigError(f"--background ({arguments.background}) must be at least 1")
        self._kernels: dict[str, KernelTable] = {}  # by engine
        self._profiles = arguments.profile or arguments.kernels
        if self._mixed and (arguments.peers or self._profiles):
            raise ConfigError(
                "--peers, --profile and --kernels go with requests that arrive at once, not with --arrivals poisson"
            )
        overrides = self._overrides()
        self._config = load_config(arguments.config, overrides)
        self._facts = find_model(self._config)
        self._engine = Engine(arguments.config, tuple(overrides), self._facts.vocab_size)
        self._check_lengths(self._config, self._facts)

    def run(self) -> bool:
        """Measure engine and peers, and print the rows. Returns whether a peer failed."""
        arguments, work = self._arguments, self._work
        before = self._measure_rates()
        rates = Rates.of(before)
        self._say({"rates": "before", **before})
        rows: list[Row] = []
        for depth in arguments.depth:
            rows.append(self._measure_engine(depth, rates))
            self._say(rows[-1])
        ours = rows[:]
        for name in arguments.peers:
            shorter = arguments.peer_output_len
            done = work if shorter is None else work.at_equal_context(shorter)
            spec = PeerSpec(
                name=name,
                model=self._peer_model(),
                vocab_size=self._facts.vocab_size,
                max_num_batched_tokens=self._config.scheduler.max_num_batched_tokens,
                work=done,
                profile=self._profiled_work() if arguments.profile else None,
            )
            rows.append(peer_row(name, work, done, run_peer(spec), ours))
            self._say(rows[-1])
        after = self._measure_rates()
        self._say({"rates": "after", **after})
        title = (
            f"{self._facts.name} on {before['device']}: reads {before['read_bytes_per_s'] / 1e9:,.0f} GB/s "
            f"(afterwards {after['read_bytes_per_s'] / 1e9:,.0f}), multiplies "
            f"{before['matrix_flops_per_s'] / 1e12:,.3g} TFLOP/s ({after['matrix_flops_per_s'] / 1e12:,.3g})"
        )
        console = Console(stderr=arguments.json)
        print_table(title, rows, Console(width=max(console.width, 60 + 18 * len(rows)), stderr=arguments.json))
        for engine, table in self._kernels.items():
            print_kernels(
                engine, table, rates.read_bytes_per_s, Console(width=max(console.width, 130), stderr=arguments.json)
            )
        if arguments.timeline is not None:
            files = [str(self._timeline(depth)) for depth in arguments.depth]
            timeline.main([*files, "-o", str(arguments.timeline / "depths.svg")])
        return any("error" in row for row in rows)

    def _measure_engine(self, depth: int, rates: Rates) -> Row:
        arguments, work = self._arguments, self._work
        engine = self._engine.with_overrides(f"ring.depth={depth}")
        traced = replace(engine, timeline=self._timeline(depth))
        if self._mixed:
            ready_s, mixed = traced.measure_mixed(work, arguments.background, arguments.rate, arguments.seconds)
            return mixed_row(depth, work, ready_s, arguments.background, mixed)
        stream = work.num_requests <= STREAM_UP_TO if arguments.stream is None else arguments.stream
        shape, note = self._shape()
        ready_s, measured = traced.measure(work, stream)
        max_tokens = self._config.scheduler.max_num_batched_tokens
        row = engine_row(depth, work, ready_s, measured, shape, rates, max_tokens)
        if note:
            row["note"] = note
        if self._profiles:
            profile = engine.profile(self._profiled_work())
            row |= profile_figures(profile)
            if arguments.kernels:
                self._kernels[row["engine"]] = table = kernel_table(profile, shape)
                row["kernels"] = [rounded(asdict(kernel)) for kernel in table.rows]
        return row

    def _timeline(self, depth: int) -> Path | None:
        folder: Path | None = self._arguments.timeline
        if folder is None:
            return None
        return folder / f"depth{depth}.json.gz"

    def _overrides(self) -> list[str]:
        """Return the changes to the configuration. The command line's `--set` come last and override the others."""
        arguments = self._arguments
        num_seqs = arguments.background + SPARE_ROWS if self._mixed else arguments.num_requests
        overrides = [f"scheduler.max_num_seqs={num_seqs}"]
        if arguments.model is not None:
            overrides.append(f"model.path={json.dumps(str(arguments.model.resolve()))}")
            if not any(arguments.model.glob("*.safetensors")):
                overrides.append("model.load_format=dummy")
        return [*overrides, *arguments.overrides]

    def _check_lengths(self, config: Config, facts: ServedModel) -> None:
        longest = self._work.prompt_len + self._work.output_len
        if longest > facts.max_model_len:
            raise ConfigError(
                f"--prompt-len ({self._work.prompt_len}) and --output-len ({self._work.output_len}) make {longest} "
                f"tokens, more than one sequence may have ({facts.max_model_len}): lower one of them, or raise "
                "scheduler.max_model_len where the model can"
            )
        if self._profiles and self._work.output_len < PROFILE_OUTPUT_LEN:
            raise ConfigError(
                f"--profile and --kernels look at {PROFILE_OUTPUT_LEN} steps: --output-len ({self._work.output_len}) "
                "must be at least as much"
            )
        shorter = self._arguments.peer_output_len
        if shorter is not None and not 1 <= shorter <= self._work.output_len:
            raise ConfigError(f"--peer-output-len ({shorter}) must lie in [1, --output-len ({self._work.output_len})]")

    def _shape(self) -> tuple[ModelShape | None, str]:
        """Return the model's sizes for the bounds; or None, and the reason why there are no bounds."""
        plain = json.loads((Path(self._facts.folder) / "config.json").read_text())
        try:
            model = self._config.model
            return ModelShape.from_config(plain, model.dtype, model.quantization, self._config.cache.dtype), ""
        except ConfigError as error:
            return None, str(error)

    def _peer_model(self) -> ModelConfig:
        return msgspec.structs.replace(self._config.model, path=self._facts.folder)

    def _profiled_work(self) -> Work:
        return self._work.at_equal_context(PROFILE_OUTPUT_LEN)

    def _measure_rates(self) -> dict[str, Any]:
        """Measure the device's rates in a separate process, which releases the device's memory when it ends."""
        model = self._config.model
        threads = [] if model.num_threads is None else ["--threads", str(model.num_threads)]
        done = subprocess.run(
            module_command("workers.gpu.profiling.device_rates", "--device", model.device, *threads),
            env=module_environment(), stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        rates: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return rates

    def _say(self, row: dict[str, Any]) -> None:
        if self._arguments.json:
            print(json.dumps(rounded(row)), flush=True)


def _peers(text: str) -> list[str]:
    names: list[str] = text.split(",")
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"there is no peer {unknown[0]!r}: it must be of {', '.join(PEERS)}")
    return names
