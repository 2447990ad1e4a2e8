"""Runs other engines (peers) on the same work. Owns the peer's input (PeerSpec), its output (PeerResult) and its
process.

A peer is a separate program (`transformers_peer.py`, `vllm_peer.py`), because it loads torch and must release the
device's memory. It reads a PeerSpec from a file and writes a PeerResult to another file, because its libraries write to
standard output.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from pipeline.bench.workload import STEADY, Work, percentiles
from pipeline.environment.module_search import module_command, module_environment
from workers.gpu.config import ModelConfig

PEERS: Final = {
    "transformers-sync": "pipeline.bench.transformers_peer",
    "transformers-async": "pipeline.bench.transformers_peer",
    "vllm": "pipeline.bench.vllm_peer",
}
_LAST_LINES: Final = 60


class PeerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The work of one peer.

    Args:
        model: what the engine runs; `path` is a folder.
        vocab_size: for the prompts, which are the engine's if the lengths are.
        max_num_batched_tokens: in one step.
        profile: work for a second run, under the profiler; None = no such run.
    """

    name: str
    model: ModelConfig
    vocab_size: int
    max_num_batched_tokens: int
    work: Work
    profile: Work | None = None


class PeerResult(msgspec.Struct, kw_only=True):
    """The figures that a peer measured. Steps in ms. `steady_*` cover the same shares of the run as the engine's
    window, or the whole run if the peer reports no times of steps.

    `note` says what a reader must know to compare; `error` why there is no figure.
    """

    ready_s: float = 0.0
    total_s: float = 0.0
    num_tokens: int = 0
    num_steps: int | None = None
    steady_ms_per_step: float | None = None
    step_p50_ms: float | None = None
    step_p99_ms: float | None = None
    note: str = ""
    error: str = ""
    profile: dict[str, Any] | None = None


def run_peer(spec: PeerSpec) -> PeerResult:
    """Run a peer to its end. If it fails, the result has `error` set and no figures."""
    with tempfile.TemporaryDirectory(prefix="ringfeed-peer-") as folder:
        spec_path, result_path = Path(folder) / "spec.json", Path(folder) / "result.json"
        spec_path.write_bytes(msgspec.json.encode(spec))
        threads = {} if spec.model.num_threads is None else {"OMP_NUM_THREADS": str(spec.model.num_threads)}
        done = subprocess.run(
            module_command(PEERS[spec.name], str(spec_path), str(result_path)),
            env=module_environment() | threads, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
        )  # fmt: skip
        last_lines = "\n".join(done.stdout.splitlines()[-_LAST_LINES:])
        if not result_path.exists():
            return PeerResult(error=f"ended with status {done.returncode} and without an answer:\n{last_lines}")
        result = msgspec.json.decode(result_path.read_bytes(), type=PeerResult)
        if result.error:  # an engine of several processes names the cause only in its output
            result.error += f"\n{last_lines}"
        return result


def answer(measure: Callable[[PeerSpec], PeerResult]) -> None:
    """A peer program's main: read the spec, measure, write the result or the error."""
    spec_path, result_path = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        result = measure(msgspec.json.decode(spec_path.read_bytes(), type=PeerSpec))
    except Exception as error:  # any error of a foreign engine is its result
        traceback.print_exc()
        result = PeerResult(error=f"{type(error).__name__}: {error}")
    result_path.write_bytes(msgspec.json.encode(result))


def step_figures(ends_s: Sequence[float]) -> dict[str, Any]:
    """Return fields of a PeerResult, computed from the times at which steps ended."""
    first, last = (round(share * (len(ends_s) - 1)) for share in STEADY)
    window = ends_s[first : last + 1]
    gaps_ms = [(b - a) * 1e3 for a, b in itertools.pairwise(window)]
    p50, p99 = percentiles(gaps_ms, 50, 99)
    return {
        "num_steps": len(ends_s),
        "steady_ms_per_step": sum(gaps_ms) / len(gaps_ms) if gaps_ms else None,
        "step_p50_ms": p50,
        "step_p99_ms": p99,
    }
