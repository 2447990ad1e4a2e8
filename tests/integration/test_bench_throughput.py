"""The throughput benchmark's whole command on the CPU, with the rates of the device made up."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.bench import throughput
from pipeline.bench.engine import Engine
from pipeline.bench.kernel_table import kernel_table
from pipeline.bench.roofline import ModelShape
from pipeline.bench.workload import Work
from pipeline.timeline.reader import load_timeline

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.toml"
RATES = {"device": "a toy", "read_bytes_per_s": 1e10, "matrix_flops_per_s": 1e11}


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(throughput._Benchmark, "_measure_rates", lambda self: dict(RATES))
    parser = ArgumentParser()
    throughput.add_arguments(parser)
    with pytest.raises(SystemExit) as ended:
        throughput.run(parser.parse_args(["--config", str(CONFIG), "--json", *arguments]))
    assert ended.value.code == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_requests_at_once_give_a_row_against_the_bounds_and_a_timeline(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lengths = ("--num-requests", "3", "--prompt-len", "20", "--output-len", "40")
    arguments = (*lengths, "--depth", "2", "--timeline", str(tmp_path / "traces"))
    before, row, after = run(monkeypatch, capsys, *arguments)
    assert (before["rates"], after["rates"]) == ("before", "after")
    assert row["engine"] == "depth 2"
    assert row["num_steps"] >= 40
    assert row["num_preemptions"] == 0
    assert row["x_floor"] == pytest.approx(row["total_s"] / row["floor_s"], rel=0.01)
    assert row["x_steady_floor"] > 0
    assert load_timeline(tmp_path / "traces" / "depth2.json.gz").steps
    assert row["gap_p99_ms"] >= row["gap_p50_ms"] > 0


@pytest.mark.slow
def test_arrivals_beside_streams_give_steps_with_prompts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--arrivals", "poisson", "--background", "2", "--rate", "20", "--seconds", "2")
    _, row, _ = run(monkeypatch, capsys, "--prompt-len", "40", "--output-len", "2", *arguments)
    assert row["num_arrivals"] > 0
    assert 0 < row["mixed_percent"] <= 100
    assert row["gap_p50_ms"] > 0
    assert row["first_token_p50_ms"] > 0


@pytest.mark.slow
def test_the_kernels_of_a_step_have_the_bytes_that_an_engine_read() -> None:
    engine = Engine(CONFIG, ("scheduler.max_num_seqs=3",), vocab_size=1000)
    profile = engine.profile(Work(num_requests=3, prompt_len=50, output_len=192))
    shape = ModelShape.from_config(json.loads((CONFIG.parent / "tiny-model" / "config.json").read_text()))
    table = kernel_table(profile, shape)
    num_bytes = {row.group: row.num_bytes for row in table.groups}
    assert num_bytes["products and head"] == shape.weight_bytes
    attention = num_bytes["attention"]
    assert attention is not None
    # The profiled steps are about the 78th to the 142nd of the 192 that follow the prompts.
    assert 3 * (50 + 70) < attention / shape.kv_bytes_per_token < 3 * (50 + 150)
    assert sum(row.us for row in table.groups) == pytest.approx(table.busy_us)
    assert table.busy_us < table.step_us
