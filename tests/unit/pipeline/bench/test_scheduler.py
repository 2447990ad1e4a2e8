"""The scheduler's benchmark runs, and measures what it says."""

from __future__ import annotations

import json
from argparse import ArgumentParser

import pytest

from pipeline.bench import scheduler


def test_every_size_gives_one_json_line_with_all_figures(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    scheduler.add_arguments(parser)
    scheduler.run(parser.parse_args(["--num-seqs", "2,5", "--steps", "5", "--json"]))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["num_seqs"] for line in lines] == [2, 5]
    for line in lines:
        assert line["plan_apply_p50_us"] > 0
        assert line["plan_p99_us"] >= line["plan_p50_us"] > 0
        assert {"apply_p50_us", "apply_p99_us", "arrival_us", "end_us"} <= line.keys()


def test_sequences_end_and_arrive_while_their_price_is_taken() -> None:
    engine = scheduler._Engine(4, 10)
    engine.fill()
    assert engine.scheduler.gauges()["num_running"] == 4
    engine.churn(2)
    gauges = engine.scheduler.gauges()
    assert gauges["num_finished"] == 2 * scheduler.NUM_CHURN_STEPS // 4
    assert gauges["num_running"] == 4
    assert gauges["num_preemptions"] == 0
