"""`ringfeed batch` with the small model: killed in the middle, started again, and compared with single requests."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import Pipeline, SamplingParams
from pipeline.engine.small_model import CONFIG

pytestmark = pytest.mark.slow

NUM_REQUESTS = 120
QUESTIONS = ["What is the for statement?", "What does str.join do?", "Who are you?", "Explain list displays."]


def test_a_killed_batch_goes_on_and_answers_every_request_once(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with source.open("w") as file:
        for i in range(NUM_REQUESTS):
            messages = [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}]
            body = {"messages": messages, "temperature": 0, "max_tokens": 40, "ignore_eos": True}
            line = {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            print(json.dumps(line), file=file)
        print(json.dumps({"custom_id": "bad", "url": "/v1/completions", "body": {"prompt": "a", "n": 0}}), file=file)
    with Pipeline(CONFIG) as pipeline:
        command = [sys.executable, "-m", "pipeline.cli", "batch", str(source), str(target), "--endpoint",
                   pipeline.endpoint, "--concurrency", "8"]  # fmt: skip
        first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not target.exists() or target.read_bytes().count(b"\n") < 20:
            assert time.monotonic() < deadline, first.stderr
            assert first.poll() is None, "the batch ended before it could be killed"
            time.sleep(0.005)
        first.kill()
        first.communicate()
        with target.open("ab") as file:
            file.write(b'{"id":"batch_req_torn')
        num_done = target.read_bytes().count(b"\n")
        assert num_done < NUM_REQUESTS
        second = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert second.returncode == 1, second.stderr
        assert f"{num_done} of them answered earlier" in second.stderr
        answers = [json.loads(line) for line in target.read_bytes().splitlines()]
        assert sorted(each["custom_id"] for each in answers) == sorted(["bad", *(f"r{i}" for i in range(NUM_REQUESTS))])
        params = SamplingParams(max_tokens=40, ignore_eos=True)
        expected = [pipeline.client.generate([{"role": "user", "content": each}], params).text for each in QUESTIONS]
        for each in answers:
            response = each["response"]
            if each["custom_id"] == "bad":
                assert (response["status_code"], response["body"]["error"]["param"]) == (400, "n")
                continue
            text = response["body"]["choices"][0]["message"]["content"]
            assert text == expected[int(each["custom_id"][1:]) % len(QUESTIONS)]
        third = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert third.returncode == 1, "the failed request stays failed until it is asked again"
        assert "failed requests: 1;" in third.stderr
        again = subprocess.run([*command, "--retry-failed"], capture_output=True, text=True, timeout=60)
        assert "120 of them answered earlier" in again.stderr
        assert target.read_bytes().count(b"\n") == NUM_REQUESTS + 1
