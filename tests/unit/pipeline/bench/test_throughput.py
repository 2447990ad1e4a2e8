"""The throughput benchmark: its arithmetic by hand-computed numbers, its bookkeeping with a client that is made up."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
from argparse import ArgumentParser
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from ipc.errors import ConfigError
from ipc.sampling_params import SamplingParams
from pipeline.bench import throughput, workload
from pipeline.bench.figures import engine_row, mixed_row, peer_row, profile_figures
from pipeline.bench.peers import PeerResult, PeerSpec, run_peer, step_figures
from pipeline.bench.report import print_table
from pipeline.bench.roofline import (
    ModelShape,
    Rates,
    StepWork,
    WeightFormat,
    bounds,
    decode_steps,
    prefill_steps,
    run_steps,
)
from pipeline.bench.transformers_peer import generation_fields
from pipeline.bench.workload import (
    GREEDY,
    MixedRun,
    Run,
    Sampling,
    Times,
    Work,
    make_prompts,
    percentiles,
    poisson_arrivals,
    run_all,
)
from pipeline.metrics.figures import DeviceTime, Figures
from workers.gpu.config import ModelConfig
from workers.gpu.profiling import device_rates as rates
from workers.gpu.profiling.step_profiler import DeviceActivity, StepProfiler, between_steps_us, summarize, union_us

ROOT = Path(__file__).parents[4]
# One layer; a step of one token reads 2 * (4*8 + 4*4 + 4*12 + 6*4 + 4*10) = 320 bytes of weights, 2*2*1*2 = 8 of KV.
SHAPE = ModelShape(
    hidden_size=4, intermediate_size=6, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=2, vocab_size=10,
    bytes_per_value=2, layer_weights=WeightFormat(bits=16), bytes_per_kv_value=2,
)  # fmt: skip
RATES = Rates(read_bytes_per_s=100.0, matrix_flops_per_s=200.0)


def shape_of(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((ROOT / "configs" / "shapes" / name / "config.json").read_text())
    return config


# Bounds


def test_an_8b_step_reads_fifteen_gigabytes_and_128_kib_per_token() -> None:
    shape = ModelShape.from_config(shape_of("llama-3.1-8b"))
    assert shape.weight_bytes == 15_009_316_864
    assert shape.kv_bytes_per_token == 131_072


def test_a_tied_head_is_read_once() -> None:
    shape = ModelShape.from_config(shape_of("llama-3.2-1b"))
    assert shape.weight_bytes == 2 * (16 * (2048 * (3072 + 2048) + 3 * 2048 * 8192) + 2048 * 128_256)


def test_a_floor_is_weights_and_kv_over_the_read_rate() -> None:
    assert SHAPE.weight_bytes == 2 * (4 * 8 + 4 * 4 + 4 * 12 + 6 * 4 + 4 * 10)
    assert SHAPE.kv_bytes_per_token == 8
    assert SHAPE.floor_s(StepWork.decode(3, 5), RATES) == pytest.approx((320 + 3 * 5 * 8) / 100)


def test_a_roofline_takes_the_longer_side_of_each_operation() -> None:
    # One token: each weight costs 2 bytes (20 ms) and 2 operations (10 ms): reading is longer everywhere.
    # Attention to 5 entries reads 40 bytes (0.4 s) and takes 4 * 2 * 2 * 5 = 80 operations (0.4 s).
    assert SHAPE.roofline_s(StepWork.decode(1, 5), RATES) == pytest.approx(3.2 + 0.4)
    # Four tokens: 8 operations for each weight (40 ms), so computing is longer, except for the head of the one output.
    work = StepWork(num_tokens=4, num_outputs=1, num_kv_read=4, num_attended=10)
    assert SHAPE.roofline_s(work, RATES) == pytest.approx(120 * 0.04 + max(32 / 100, 160 / 200) + 40 * 0.02)


def formatted(quantization: str = "none", cache_dtype: str = "auto", dtype: str = "bfloat16") -> ModelShape:
    return ModelShape.from_config(
        {
            "model_type": "llama", "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "vocab_size": 10,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2,
        },
        dtype, quantization, cache_dtype,
    )  # fmt: skip


def test_fp8_weights_take_a_byte_each_and_a_scale_per_output_channel_except_in_the_head() -> None:
    assert formatted() == SHAPE
    assert formatted("fp8").weight_bytes == (4 * 8 + 4 * 4 + 4 * 12 + 6 * 4) + 4 * (8 + 4 + 12 + 4) + 2 * 4 * 10
    assert formatted("fp8").kv_bytes_per_token == SHAPE.kv_bytes_per_token


def test_an_fp8_cache_takes_a_byte_a_value_and_leaves_the_weights() -> None:
    shape = formatted(cache_dtype="fp8_e4m3")
    assert shape.weight_bytes == SHAPE.weight_bytes
    assert shape.floor_s(StepWork.decode(3, 5), RATES) == pytest.approx((320 + 3 * 5 * 4) / 100)


@pytest.mark.parametrize(("measured", "rate"), [(None, 2 * 10.0), (15.0, 15.0)])
def test_only_products_of_many_rows_multiply_at_the_fp8_rate(measured: float | None, rate: float) -> None:
    rates = Rates(read_bytes_per_s=1e9, matrix_flops_per_s=10.0, fp8_flops_per_s=measured)  # reading takes no time
    for num_tokens, layers_rate in ((64, 10.0), (65, rate)):
        work = StepWork(num_tokens, num_outputs=1, num_kv_read=1, num_attended=10)
        others_s = (4 * 2 * 2 * 10 + 2 * 40) / 10
        expected_s = 2 * num_tokens * 120 / layers_rate + others_s
        assert formatted("fp8").roofline_s(work, rates) == pytest.approx(expected_s)
        assert formatted("fp8").matrix_s(work, rates) == pytest.approx(expected_s)
        for shape in (SHAPE, formatted("fp8", dtype="float16")):
            assert shape.matrix_s(work, rates) == pytest.approx(2 * num_tokens * 12 + others_s)


def test_operations_count_causal_attention_and_the_head_of_outputs_only() -> None:
    work = StepWork(num_tokens=4, num_outputs=1, num_kv_read=4, num_attended=10)
    assert SHAPE.flops(work) == 2 * 4 * 120 + 4 * 2 * 2 * 10 + 2 * 40


def test_prompts_are_computed_in_steps_of_the_budget() -> None:
    first, second = prefill_steps(num_requests=2, prompt_len=3, max_tokens=4)
    assert first == StepWork(num_tokens=4, num_outputs=1, num_kv_read=3 + 1, num_attended=6 + 1)
    assert second == StepWork(num_tokens=2, num_outputs=1, num_kv_read=3, num_attended=2 + 3)


def test_chunks_attend_to_all_that_a_whole_prompt_does() -> None:
    whole, chunked = (list(prefill_steps(3, 10, budget)) for budget in (30, 7))
    assert len(whole) == 1
    assert len(chunked) == 5
    for name in ("num_tokens", "num_outputs", "num_attended"):
        assert sum(getattr(work, name) for work in chunked) == getattr(whole[0], name)


def test_the_first_token_comes_with_the_prompt() -> None:
    steps = list(run_steps(num_requests=2, prompt_len=3, output_len=4, max_tokens=6))
    assert steps[1:] == [StepWork.decode(2, length) for length in (4, 5, 6)]
    assert sum(work.num_outputs for work in steps) == 2 * 4


def test_bounds_are_integrated_over_growing_contexts() -> None:
    total = bounds(SHAPE, decode_steps(2, 4, 6), RATES)
    assert total.num_steps == 3
    assert total.floor_s == pytest.approx(3 * 3.2 + 2 * (4 + 5 + 6) * 8 / 100)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mixtral"},
        {"model_type": "mistral", "sliding_window": 4096},
        {"dtype": "int8"},
        {"quantization_config": {"quant_method": "gptq"}},
    ],
)
def test_models_that_do_not_read_everything_have_no_floor(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no floor is known"):
        ModelShape.from_config(shape_of("llama-3.1-8b") | changes)


def test_a_window_that_is_switched_off_does_no_harm() -> None:
    config = shape_of("llama-3.1-8b") | {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}
    assert ModelShape.from_config(config, "float32").bytes_per_value == 4


# Profile


def test_what_runs_side_by_side_is_busy_once() -> None:
    assert union_us([(5, 7), (0, 2), (1, 3), (1, 2), (7, 8)]) == 6
    assert union_us([]) == 0


def test_a_summary_has_the_longest_kernels_first() -> None:
    summary = summarize([DeviceActivity("a", 0, 2), DeviceActivity("b", 4, 9), DeviceActivity("a", 8, 10)])
    assert summary["window_us"] == 10
    assert summary["busy_us"] == 8
    assert summary["busy_percent"] == 80
    assert summary["kernels"] == [["b", 1, 5, 5], ["a", 2, 4, 3]]


@pytest.mark.parametrize("skip", [0, 1])
def test_gaps_between_steps_are_found_wherever_the_window_begins(skip: int) -> None:
    markers = [(0, 1), (100, 101), (104, 105), (200, 201), (202, 203), (300, 301)]
    assert between_steps_us(markers[skip:]) == [3, 1]


def test_the_profiler_writes_its_window_and_nothing_of_before(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profiler = StepProfiler(path, torch.device("cpu"), num_skipped=2, num_discarded=1, num_profiled=2)
    x = torch.ones(4, 4)
    for step in range(6):
        assert path.exists() == (step == 5)
        torch.mm(x, x) if step in (3, 4) else torch.cos(x)
        profiler.step()
    profile = json.loads(path.read_text())
    names = {name for name, *_ in profile["kernels"]}
    assert "aten::mm" in names
    assert "aten::cos" not in names
    assert profile["num_steps"] == 2
    assert 0 < profile["busy_us"] <= profile["window_us"]


def test_rates_are_measured_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_CPU_READ_BYTES", 1 << 16)
    monkeypatch.setattr(rates, "_CPU_MATRIX_SIZE", 16)
    measured = rates.measure("cpu")
    assert measured["read_bytes_per_s"] > 0
    assert measured["matrix_flops_per_s"] > 0
    assert measured["read_bytes"] == 1 << 16
    assert Rates.of(measured).flops_per_s(in_fp8=True) == 2 * measured["matrix_flops_per_s"]


def test_the_fp8_product_of_the_rates_is_a_product() -> None:
    a, b = torch.randint(-4, 5, (16, 32)).bfloat16(), torch.randint(-4, 5, (32, 48)).bfloat16()
    assert torch.equal(rates.fp8_product(a, b)(), a @ b)


# Work


def test_prompts_differ_and_are_the_same_every_time() -> None:
    prompts = make_prompts(8, 16, 4096)
    assert prompts == make_prompts(8, 16, 4096) != make_prompts(8, 16, 4096, seed=1)
    assert len({tuple(prompt) for prompt in prompts}) == 8
    assert all(len(prompt) == 16 and min(prompt) > 0 and max(prompt) < 4096 for prompt in prompts)


def test_arrivals_come_at_the_rate_and_irregularly() -> None:
    moments = poisson_arrivals(10.0, 1000.0)
    assert len(moments) == pytest.approx(10_000, rel=0.05)
    assert moments == sorted(moments)
    assert moments[0] >= 0
    assert moments[-1] < 1000
    gaps = [b - a for a, b in itertools.pairwise(moments)]
    assert sum(gap > 0.1 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)  # exponential: 1/e


def test_a_shorter_run_has_the_same_mean_context() -> None:
    work = Work(32, 128, 8192)
    shorter = work.at_equal_context(192)
    assert shorter.output_len == 192
    assert shorter.prompt_len + shorter.output_len / 2 == work.prompt_len + work.output_len / 2


def test_sampled_work_stays_sampled_where_it_is_shortened_and_says_so_in_its_row() -> None:
    sampling = Sampling(temperature=0.7, top_k=20, top_p=0.9)
    work = Work(4, 100, 1000, sampling).at_equal_context(100)
    assert work.sampling == sampling
    assert sampling.params(5) == SamplingParams(temperature=0.7, top_k=20, top_p=0.9, max_tokens=5, ignore_eos=True)
    row = engine_row(2, work, 5.0, run_of(20.0), None, RATES, 12)
    assert (row["temperature"], row["top_k"], row["top_p"]) == (0.7, 20, 0.9)
    assert "temperature" not in engine_row(2, Work(4, 100, 1000), 5.0, run_of(20.0), None, RATES, 12)


def test_percentiles_of_nothing_are_none() -> None:
    assert percentiles([], 50, 99) == [None, None]
    assert percentiles([1.0, 3.0], 50) == [2.0]


class MadeUpClient:
    """Gives every request `num_given` tokens, one per turn of the loop, and counts like a scheduler."""

    def __init__(self, num_given: int, sampling: Sampling = GREEDY) -> None:
        self.num_given = num_given
        self.sampling = sampling
        self.num_sampled = 0

    async def stats(self) -> dict[str, dict[str, float]]:
        device = (f"device_{name}_ns" for name in ("busy", "no_work", "scheduler", "copies", "masks"))
        names = ("num_prefill_steps", "plan_ns", "apply_ns", *device)
        counters = dict.fromkeys(names, 0.0) | {"num_preemptions": 3.0, "cpu_ns": 0.0}
        return {"scheduler": counters | {"num_steps": self.num_sampled, "num_sampled_tokens": self.num_sampled}}

    def generate(self, prompt: list[int], params: SamplingParams, *, stream: bool = False) -> Any:
        assert params == self.sampling.params(params.max_tokens)
        return self._stream() if stream else self._whole()

    async def _stream(self) -> AsyncIterator[Any]:
        for _ in range(self.num_given):
            await asyncio.sleep(0)
            self.num_sampled += 1
            yield SimpleNamespace(token_ids=[1])

    async def _whole(self) -> Any:
        return SimpleNamespace(token_ids=[1 async for _ in self._stream()])


@pytest.mark.parametrize("stream", [True, False])
def test_a_run_is_looked_into_between_a_quarter_and_three_quarters(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload, "POLL_S", 0)
    sampling = Sampling(temperature=0.5, min_p=0.1)
    client: Any = MadeUpClient(100, sampling)
    run = asyncio.run(run_all(client, make_prompts(4, 8, 100), 100, stream, sampling))
    assert run.whole.num_sampled_tokens == 400
    assert run.steady is not None
    begun, ended = run.steady_tokens
    assert 100 <= begun < 120
    assert 300 <= ended < 320
    assert run.steady.num_sampled_tokens == ended - begun
    assert run.num_preemptions == 0
    assert len(run.times.first_token_s) == (4 if stream else 0)
    assert len(run.times.gap_s) == (4 * 99 if stream else 0)


def test_a_run_that_gives_other_numbers_of_tokens_is_refused() -> None:
    client: Any = MadeUpClient(7)
    with pytest.raises(RuntimeError, match="7 to 7 tokens instead of 8"):
        asyncio.run(run_all(client, make_prompts(2, 8, 100), 8, False))


def test_steps_of_a_peer_are_timed_in_the_same_window() -> None:
    ends = [0.0, 5.0, *(5.0 + 0.01 * i for i in range(1, 7)), 10.0]  # slow first and last steps
    figures = step_figures(ends)
    assert figures["num_steps"] == 9
    assert figures["steady_ms_per_step"] == pytest.approx(10.0)
    assert figures["step_p50_ms"] == pytest.approx(10.0)
    assert step_figures([])["steady_ms_per_step"] is None


def test_a_peer_samples_with_what_is_on_and_nothing_else() -> None:
    assert generation_fields(Sampling()) == {"do_sample": False}
    assert generation_fields(Sampling(top_p=0.9)) == {"do_sample": False}  # the temperature is 0
    fields = generation_fields(Sampling(temperature=0.7, top_k=20))
    assert fields == {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 1.0}
    assert generation_fields(Sampling(temperature=0.7, min_p=0.1))["min_p"] == 0.1


# Rows


def figures_of(seconds: float, num_steps: int, num_prefill_steps: int = 0) -> Figures:
    return Figures(
        seconds=seconds, num_steps=num_steps, num_prefill_steps=num_prefill_steps, num_sampled_tokens=4 * num_steps,
        host_us_per_step={"scheduler": 12.3}, plan_us_per_step=1.0, apply_us_per_step=1.0,
        device=DeviceTime(9e5 * num_steps, no_work_ns=3e4 * num_steps, scheduler_ns=7e4 * num_steps, copies_ns=0.0),
    )  # fmt: skip


def run_of(total_s: float, times: Times | None = None) -> Run:
    return Run(total_s, figures_of(total_s, 9), figures_of(2.0, 4), (8, 24), times or Times(), 0)


def test_a_row_holds_the_run_against_its_bounds() -> None:
    work = Work(4, 3, 8)
    row = engine_row(2, work, 5.0, run_of(80.0, Times([0.2], [0.001, 0.003])), SHAPE, RATES, 12)
    floor_s = 3.2 + 4 * 3 * 0.08 + sum(3.2 + 4 * length * 0.08 for length in range(4, 11))
    assert row["engine"] == "depth 2"
    assert row["floor_s"] == pytest.approx(floor_s, rel=1e-3)
    assert row["x_floor"] == pytest.approx(80 / floor_s, rel=1e-3)
    assert row["tokens_per_s"] == pytest.approx(4 * 8 / 80)
    assert row["steady_ms_per_step"] == 500
    assert row["steady_floor_ms"] == pytest.approx(1000 * (3.2 + 4 * (5 + 6 + 7 + 8) / 4 * 0.08), abs=1)
    assert row["steady_idle_percent"] == 10.0
    assert row["gap_p50_ms"] == 2
    assert row["first_token_p99_ms"] == 200


def test_without_a_shape_a_row_has_everything_but_bounds() -> None:
    row = engine_row(1, Work(4, 3, 8), 5.0, run_of(80.0), None, RATES, 12)
    assert row["total_s"] == 80
    assert not [key for key in row if "floor" in key or "roofline" in key]


def test_prefill_is_counted_in_prompt_tokens() -> None:
    run = Run(2.0, figures_of(2.0, 1), None, (0, 0), Times(), 0)
    row = engine_row(2, Work(4, 50, 1), 5.0, run, SHAPE, Rates(100.0, 1e6), 200)
    assert row["prompt_tokens_per_s"] == 100
    flops = 2 * 200 * 120 + 4 * 2 * 2 * 4 * (50 * 51 // 2) + 2 * 4 * 40
    assert row["matrix_rate_percent"] == pytest.approx(100 * flops / 2 / 1e6, rel=1e-3)


def test_a_mixed_row_tells_the_share_of_steps_with_prompts() -> None:
    run = MixedRun(figures_of(2.0, 10, 7), Times([9.0], [0.01, 0.03]), Times([0.5], [0.1]), 5, 1)
    row = mixed_row(2, Work(1, 512, 4), 5.0, 32, run)
    assert row["mixed_percent"] == 70
    assert row["gap_p50_ms"] == 20  # of the streams in the background
    assert row["first_token_p50_ms"] == 500  # of the arrivals


def test_a_peer_that_ran_all_of_the_work_is_compared_by_total() -> None:
    work = Work(4, 3, 8)
    ours = engine_row(2, work, 5.0, run_of(20.0), None, RATES, 12)
    row = peer_row("vllm", work, work, PeerResult(total_s=40.0, num_tokens=32), [ours])
    assert row["x_peer"] == {"depth 2": 0.5}


def test_a_peer_that_ran_less_is_compared_by_its_step_and_says_so() -> None:
    work = Work(4, 100, 1000)
    ours = engine_row(2, work, 5.0, run_of(20.0), None, RATES, 12)
    result = PeerResult(total_s=9.0, num_tokens=400, num_steps=100, steady_ms_per_step=80.0, note="fast")
    row = peer_row("transformers-async", work, work.at_equal_context(100), result, [ours])
    assert row["x_peer"] == {"depth 2": 0.25}
    assert "stands in for prompt 100, output 1000" in row["note"]
    assert row["prompt_len"] == 550


def test_a_profile_keeps_its_longest_kernels() -> None:
    kernels = [[f"{'k' * 200}{i}", 1, 100.0 - i] for i in range(50)]
    row = profile_figures({"window_us": 4000.0, "num_steps": 2, "busy_percent": 98.76, "kernels": kernels})
    assert row["profile_ms_per_step"] == 2
    assert len(row["profile_kernels"]) == 25
    assert row["profile_kernels"][0] == ["k" * 100, 1, 100]
    assert "profile_idle_percent" not in row


def test_the_table_has_a_column_per_engine_and_the_ratio_to_each_peer() -> None:
    work = Work(4, 3, 8)
    ours = [engine_row(depth, work, 5.0, run_of(20.0 / depth), SHAPE, RATES, 12) for depth in (1, 2)]
    peers = [
        peer_row("transformers-sync", work, work, PeerResult(total_s=40.0, num_tokens=32, note="slowly"), ours),
        peer_row("vllm", work, work, PeerResult(error="is not here"), ours),
    ]
    text = io.StringIO()
    print_table("on a toy", ours + peers, Console(file=text, width=150))
    lines = text.getvalue().splitlines()
    assert any(all(name in line for name in ("depth 1", "depth 2", "transformers-sync", "vllm")) for line in lines)
    ratios = next(line for line in lines if "total / transformers-sync" in line)
    assert [cell.strip() for cell in ratios.split("│")[2:4]] == ["0.5", "0.25"]
    assert "transformers-sync: slowly" in lines
    assert "vllm: is not here" in lines


# Command


def test_a_peer_that_cannot_run_here_says_why() -> None:
    model = ModelConfig(path=str(ROOT / "configs" / "nothing"), device="cpu", load_format="dummy")
    spec = PeerSpec(name="vllm", model=model, vocab_size=9, max_num_batched_tokens=8, work=Work(1, 2, 3))
    error = run_peer(spec).error
    assert error.startswith("ModuleNotFoundError: No module named 'vllm'")
    assert "Traceback" in error, "its output is not reported"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output-len", "2000"], "more than one sequence may have (1024)"),
        (["--output-len", "100", "--profile"], "must be at least as much"),
        (["--output-len", "100", "--peer-output-len", "200"], "must lie in [1, --output-len (100)]"),
        (["--output-len", "0"], "must be at least 1"),
        (["--temperature", "0.7", "--top-p", "1.5"], "top_p"),
        (["--arrivals", "poisson", "--background", "0"], "--background (0) must be at least 1"),
        (["--arrivals", "poisson", "--peers", "vllm"], "not with --arrivals poisson"),
    ],
)
def test_work_that_cannot_be_done_is_refused_before_anything_runs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = ArgumentParser()
    throughput.add_arguments(parser)
    with pytest.raises(SystemExit) as ended:
        throughput.run(parser.parse_args(["--config", str(ROOT / "configs" / "tiny.toml"), *arguments]))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_peer_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    throughput.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--config", "x", "--peers", "vllm,nobody"])
    assert "there is no peer 'nobody'" in capsys.readouterr().err
