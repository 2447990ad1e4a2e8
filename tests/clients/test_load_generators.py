"""Load generators, run to their end against a running engine. Token counts come from the server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NUM_REQUESTS = 20
OUTPUT_TOKENS = 16


def run(program: str, *arguments: str) -> str:
    """Run a program of this environment to its end. Returns what it has printed."""
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0, done.stdout[-4_000:] + done.stderr[-4_000:]
    return done.stdout


@pytest.mark.parametrize("request_format", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm_completes_each_request(
    url: str, model: str, tokenizer: str, tmp_path: Path, request_format: str
) -> None:
    report = tmp_path / "report.json"
    run(
        "guidellm", "run", "--disable-console-interactive",
        "--backend", f"kind=openai_http,target={url},model={model},request_format={request_format}",
        "--profile", "kind=concurrent,streams=4", "--constraint", f"kind=max_requests,count={NUM_REQUESTS}",
        "--tokenizer", f"kind=huggingface_auto,model={tokenizer}",
        "--data", f"kind=synthetic_text,prompt_tokens=64,output_tokens={OUTPUT_TOKENS}",
        "--output", f"kind=json,path={report}",
    )  # fmt: skip
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    metrics: Any = benchmark["metrics"]
    assert metrics["request_totals"] == {
        "successful": NUM_REQUESTS,
        "errored": 0,
        "incomplete": 0,
        "total": NUM_REQUESTS,
    }
    assert metrics["output_token_count"]["successful"]["mean"] == OUTPUT_TOKENS
    assert metrics["time_to_first_token_ms"]["successful"]["mean"] > 0


@pytest.mark.parametrize("endpoint", ["chat", "completions", "responses", "messages"])
def test_aiperf_completes_each_request(url: str, model: str, tokenizer: str, tmp_path: Path, endpoint: str) -> None:
    # aiperf counts an empty answer as a failure, so chats and completions ignore the end that the model chooses.
    ignores_eos = endpoint in ("chat", "completions")
    extra = ["--extra-inputs", "ignore_eos:true"] if ignores_eos else []
    run(
        "aiperf", "profile", "--model", model, "--url", url, "--endpoint-type", endpoint, "--streaming",
        "--random-seed", "1", "--concurrency", "4",
        "--request-count", str(NUM_REQUESTS), "--isl", "64", "--osl", str(OUTPUT_TOKENS),
        "--tokenizer", tokenizer, "--artifact-dir", str(tmp_path), "--ui", "none", *extra,
    )  # fmt: skip
    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == NUM_REQUESTS
    assert report["error_summary"] == []
    assert not report["was_cancelled"]
    if ignores_eos:
        assert report["usage_completion_tokens"]["avg"] == OUTPUT_TOKENS
    else:  # of Responses, aiperf reads the usage of complete answers only, so it counts the tokens of the text itself
        assert 0 < report["output_sequence_length"]["avg"] <= OUTPUT_TOKENS + 1
    assert report["time_to_first_token"]["avg"] > 0
    assert "ringfeed" in (tmp_path / "server_metrics_export.json").read_text()
