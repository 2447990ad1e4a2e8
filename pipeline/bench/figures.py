"""Computes rows of figures from measurements: one dict per engine and depth, with ratios to bounds and to peers.

Names end in their unit (`_s`, `_ms`, `_percent`, `_per_s`); `x_...` are ratios of our time to another. Figures are
rounded only here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Final

from pipeline.bench.peers import PeerResult
from pipeline.bench.roofline import Bounds, ModelShape, Rates, bounds, decode_steps, run_steps
from pipeline.bench.workload import GREEDY, MixedRun, Run, Times, Work, percentiles

Row = dict[str, Any]

_MAX_KERNELS: Final = 25  # the kernels of a profile that take longest
_MAX_NAME: Final = 100  # characters


def engine_row(
    depth: int, work: Work, ready_s: float, run: Run, shape: ModelShape | None, rates: Rates, max_tokens: int
) -> Row:
    """Return the row of a run of all requests at once. `shape` None: the model's bounds are unknown. `max_tokens`: per
    step."""
    num_tokens = work.num_requests * work.output_len
    row: Row = {
        "engine": f"depth {depth}", **_lengths(work), "ready_s": ready_s, "total_s": run.total_s,
        "tokens_per_s": num_tokens / run.total_s, "num_steps": run.whole.num_steps,
        "whole_ms_per_step": run.total_s * 1e3 / max(run.whole.num_steps, 1),
        "whole_idle_percent": 100 * run.whole.device_idle_share, "num_preemptions": run.num_preemptions,
    }  # fmt: skip
    if work.output_len == 1:
        row["prompt_tokens_per_s"] = work.num_requests * work.prompt_len / run.total_s
    elif run.steady is not None:
        row["steady_ms_per_step"] = run.steady.seconds * 1e3 / run.steady.num_steps
        row["steady_device_ms"] = run.steady.device_us_per_step / 1e3
        row["steady_idle_percent"] = 100 * run.steady.device_idle_share
        row["steady_host_us"] = {role: round(us) for role, us in run.steady.host_us_per_step.items()}
    row |= _latencies(run.times)
    if shape is not None:
        whole = bounds(shape, run_steps(work.num_requests, work.prompt_len, work.output_len, max_tokens), rates)
        row |= {
            "floor_s": whole.floor_s, "x_floor": run.total_s / whole.floor_s,
            "roofline_s": whole.roofline_s, "x_roofline": run.total_s / whole.roofline_s,
            "tflops_per_s": whole.flops / run.total_s / 1e12,
            "matrix_rate_percent": 100 * whole.matrix_s / run.total_s,
        }  # fmt: skip
        steady = _steady_bounds(work, run, shape, rates)
        if steady is not None:
            floor_ms, roofline_ms = (s * 1e3 / steady.num_steps for s in (steady.floor_s, steady.roofline_s))
            row |= {
                "steady_floor_ms": floor_ms, "x_steady_floor": row["steady_ms_per_step"] / floor_ms,
                "steady_roofline_ms": roofline_ms, "x_steady_roofline": row["steady_ms_per_step"] / roofline_ms,
            }  # fmt: skip
    return rounded(row)


def mixed_row(depth: int, work: Work, ready_s: float, num_background: int, run: MixedRun) -> Row:
    """Return the row of streams that run while others arrive. It has no bounds, because the contents of each step are
    unknown."""
    figures = run.figures
    row: Row = {
        "engine": f"depth {depth}", "num_background": num_background, "num_arrivals": run.num_arrivals,
        "num_unanswered": run.num_unanswered, "prompt_len": work.prompt_len, "output_len": work.output_len,
        "ready_s": ready_s, "seconds": figures.seconds, "tokens_per_s": figures.tokens_per_s,
        "num_steps": figures.num_steps, "mixed_percent": 100 * figures.num_prefill_steps / max(figures.num_steps, 1),
        "steady_ms_per_step": figures.seconds * 1e3 / max(figures.num_steps, 1),
        "steady_device_ms": figures.device_us_per_step / 1e3,
        "steady_idle_percent": 100 * figures.device_idle_share,
        "steady_host_us": {role: round(us) for role, us in figures.host_us_per_step.items()},
    }  # fmt: skip
    row |= _latencies(Times(run.arrivals.first_token_s, run.background.gap_s))
    return rounded(row)


def peer_row(name: str, asked: Work, done: Work, result: PeerResult, ours: Iterable[Row]) -> Row:
    """Return the row of a peer that ran `done`, which replaces `asked` if it is shorter. `ours` are the engine's rows.

    `x_peer`, by our depth: our total over the peer's. Over a shorter run of the same mean context, the peer's total is
    taken as its steady step times the number of output tokens of a request.
    """
    if result.error:
        return {"engine": name, "error": result.error}
    row: Row = {
        "engine": name, **_lengths(done), "ready_s": result.ready_s, "total_s": result.total_s,
        "tokens_per_s": result.num_tokens / result.total_s, "num_steps": result.num_steps, "note": result.note,
    }  # fmt: skip
    if done.output_len == 1:
        row["prompt_tokens_per_s"] = done.num_requests * done.prompt_len / result.total_s
    else:
        row["steady_ms_per_step"] = result.steady_ms_per_step
        row |= {"gap_p50_ms": result.step_p50_ms, "gap_p99_ms": result.step_p99_ms}
    if result.num_steps:
        row["whole_ms_per_step"] = result.total_s * 1e3 / result.num_steps
    total_s: float | None = result.total_s
    if done != asked:
        row["note"] += f"; stands in for prompt {asked.prompt_len}, output {asked.output_len} at equal mean context"
        step_ms = result.steady_ms_per_step
        total_s = None if step_ms is None else step_ms * 1e-3 * asked.output_len
        row["estimated_total_s"] = total_s
    if total_s is not None:
        row["x_peer"] = {our["engine"]: round(our["total_s"] / total_s, 3) for our in ours}
    return rounded(row | profile_figures(result.profile))


def profile_figures(profile: dict[str, Any] | None) -> Row:
    """Return a row's figures from a profile of `workers/gpu/profiling/step_profiler.py`."""
    if profile is None:
        return {}
    return rounded(
        {
            "profile_ms_per_step": profile["window_us"] / 1e3 / profile["num_steps"],
            "profile_busy_percent": profile["busy_percent"],
            "profile_idle_percent": profile.get("between_steps_percent"),
            "profile_idle_p50_us": profile.get("between_steps_p50_us"),
            "profile_idle_max_us": profile.get("between_steps_max_us"),
            "profile_kernels": [
                [name[:_MAX_NAME], count, round(total_us)]
                for name, count, total_us, *_ in profile["kernels"][:_MAX_KERNELS]
            ],
        }
    )


def rounded(row: Row) -> Row:
    """Round to four significant digits, but keep all digits before the point."""
    return {k: _four_digits(v) if isinstance(v, float) else v for k, v in row.items() if v is not None}


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}") if abs(value) < 1000 else round(value)


def _lengths(work: Work) -> Row:
    row: Row = {"num_requests": work.num_requests, "prompt_len": work.prompt_len, "output_len": work.output_len}
    return row if work.sampling == GREEDY else row | asdict(work.sampling)


def _latencies(times: Times) -> Row:
    row: Row = {}
    for name, values in (("first_token", times.first_token_s), ("gap", times.gap_s)):
        if values:
            p50, p99 = percentiles((value * 1e3 for value in values), 50, 99)
            row |= {f"{name}_p50_ms": p50, f"{name}_p99_ms": p99}
    return row


def _steady_bounds(work: Work, run: Run, shape: ModelShape, rates: Rates) -> Bounds | None:
    """Return the bounds of the steps in the steady window, from the number of tokens generated at its start and end."""
    if run.steady is None or work.output_len == 1:
        return None
    first, last = (work.prompt_len + num_tokens // work.num_requests for num_tokens in run.steady_tokens)
    return bounds(shape, decode_steps(work.num_requests, first, last - 1), rates) if last > first else None
