"""A whole engine is recorded, while its GPU process is killed once, and replayed: every result is the same. What is
changed afterwards is found at its step."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pipeline import Pipeline, SamplingParams, StructuredOutputs
from pipeline.cli import main
from tests.integration.conftest import TINY_CONFIG
from tests.integration.test_timeline import until
from tests.reference.recordings import change_step, frames_of, with_other_token
from workers.gpu.recording.frames import RecordedStep, SegmentStart

pytestmark = pytest.mark.slow

OVERRIDES = {"cache.num_blocks": 64, "scheduler.max_num_seqs": 16, "scheduler.max_num_batched_tokens": 96}
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "top_p": 0.9},
    {"structured_outputs": StructuredOutputs(regex="[a-z ]{20,40}")},
    {"logprobs": 3},
    {"prompt_logprobs": 2},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "logit_bias": {7: 3.0}},
    {"temperature": 1.1, "n": 3, "bad_words": [" the"]},
]
NUM_REQUESTS = 50
MODEL = TINY_CONFIG.parent / "tiny-model"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "run.steps"
    prompts = ["A module is a file. " * (1 + i % 7) for i in range(NUM_REQUESTS)]
    params = [SamplingParams(max_tokens=90, seed=i, **KINDS[i % len(KINDS)]) for i in range(NUM_REQUESTS)]
    with Pipeline(TINY_CONFIG, OVERRIDES, record=path) as pipeline:
        first = pipeline.client.generate(prompts[0], SamplingParams(max_tokens=5, prompt_logprobs=0))
        assert first.error is None
        until(lambda: num_steps_of(path) > 0)  # a killed process loses the steps of its last 0.1 s
        stream = pipeline.client.generate("A list", SamplingParams(max_tokens=200, ignore_eos=True), stream=True)
        next(iter(stream))
        os.kill(pipeline.pids["gpu"], signal.SIGKILL)
        assert all(output.error is None for output in pipeline.client.generate_batch(prompts, params))
        assert pipeline.client.stats()["scheduler"]["num_preemptions"] > 0
    return path


def num_steps_of(path: Path) -> int:
    return sum(isinstance(frame, RecordedStep) for frame in frames_of(path))


def replayed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    status = main(["replay", *arguments])
    return status, capsys.readouterr().out.splitlines()


def test_everything_is_the_same_in_both_lives_of_the_gpu_process(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [type(frame) for frame in frames_of(path)].count(SegmentStart) == 2
    num_steps = num_steps_of(path)
    status, lines = replayed(capsys, str(path))
    assert status == 0, lines
    assert f" of {num_steps} steps are the same, bit for bit" in lines[-1]
    assert lines[2].startswith("note: segment 1 has no end: segment 2 begins there")
    assert len(lines) == 4


def test_a_changed_weight_is_found_in_the_first_step(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(MODEL, folder := tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    weights[name][0, 0] += 0.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if (folder / "model.safetensors").stat().st_size != (MODEL / "model.safetensors").stat().st_size:
        pytest.fail("the changed weights must look the same from outside")
    status, lines = replayed(capsys, str(path), "--model", str(folder))
    assert status == 1
    assert lines[-2].startswith("first difference in step 1 (segment 1, ticket 1): row ")
    assert "prompt position 1: prompt_logprob was " in lines[-2]


def test_a_changed_token_is_found_at_its_step(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = Path(shutil.copy(path, tmp_path / "changed.steps"))

    start = frames_of(path)[0]
    assert isinstance(start, SegmentStart)
    number = num_steps_of(path) - 5
    change_step(changed, number, lambda step: with_other_token(step, start.shape))
    status, lines = replayed(capsys, str(changed))
    assert status == 1
    assert lines[-2].startswith(f"first difference in step {number} (segment 2, ticket ")
    assert lines[-1].startswith("1 tokens differ, in 1 of ")
