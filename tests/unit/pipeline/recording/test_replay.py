"""Replayed recordings of a toy model: everything is the same, or the first difference is named."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from ipc.errors import ConfigError
from ipc.records import NO_TOKEN, StepShape
from pipeline.recording.__main__ import verdict
from pipeline.recording.file import recording_file
from tests.reference.recordings import (
    change_step,
    frames_of,
    recorded,
    replay_toy,
    toy_segment,
    with_field,
    with_other_token,
    write_frames,
)
from tests.simulation.harness import ToyModel
from tests.unit.workers.gpu.execution.test_executor import Ends
from tests.unit.workers.gpu.execution.test_replaced_rings import executor_on, requests, run
from tests.unit.workers.gpu.execution.test_step_masks import NUM_BLOCKS as NUM_MASK_BLOCKS
from tests.unit.workers.gpu.execution.test_step_masks import SHAPE as MASK_SHAPE
from tests.unit.workers.gpu.execution.test_step_masks import TIMEOUT_NS, Engine, WideToyModel, tokens
from workers.gpu.device.cpu import CpuDevice
from workers.gpu.recording.frames import RecordedStep, RingsReplaced, SegmentStart

SHAPE = StepShape(max_num_seqs=3, max_num_batched_tokens=16, max_model_len=32, block_size=4)
NUM_BLOCKS = 16


class ChangedModel(ToyModel):
    """Computes something else from position 20 on, as one changed weight might."""

    def _logits(self, batch: Any, rows: Any, lengths: Any, out: Any) -> torch.Tensor:
        logits = super()._logits(batch, rows, lengths, out)
        return torch.where((lengths >= 20)[:, None], logits.flip(1), logits, out=out)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A recording of requests with penalties, bad words and preemptions, which a new scheduler continues."""
    path, device = tmp_path / "r.steps", CpuDevice()
    served = requests(seed=2)
    for request in served[::3]:
        request.wants_prompt = True
    with recording_file(path) as fd:
        executor = executor_on(device, ends := Ends(SHAPE, 2))
        with recorded(executor, fd, toy_segment(SHAPE, NUM_BLOCKS)) as recording:
            run(executor, device, ends, requests(seed=7), max_steps=9)
            executor.replace_rings((ends := Ends(SHAPE, 2)).gpu)
            recording.rings_replaced(2)
            run(executor, device, ends, served)
    return path


def test_a_recorded_run_is_the_same_when_it_is_replayed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [frame for frame in frames_of(path) if isinstance(frame, RecordedStep)]
    found = replay_toy(path, monkeypatch)
    assert found.notes == []
    assert found.comparison.is_same
    assert found.comparison.num_steps == len(steps) > 20
    assert any(isinstance(frame, RingsReplaced) for frame in frames_of(path))
    assert found.comparison.num_tokens >= sum(len(request.tokens) for request in requests(seed=2))
    assert found.comparison.num_logprobs > 0, "log-probabilities of prompts"
    assert verdict(found.comparison).startswith(f"all {found.comparison.num_tokens} tokens and ")


def test_a_changed_token_is_found_at_its_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_step(path, 6, lambda step: with_other_token(step, SHAPE))
    comparison = replay_toy(path, monkeypatch).comparison
    assert comparison.first is not None
    assert (comparison.first.step, comparison.first.what) == (6, "token")
    assert int(comparison.first.recorded) == int(comparison.first.found) ^ 1
    assert (comparison.num_different_tokens, comparison.different_steps) == (1, {6})
    assert verdict(comparison).startswith("first difference in step 6 (segment 1, ticket 6): row ")


def test_a_changed_model_is_found_where_it_first_computes_something_else(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = replay_toy(path, monkeypatch, ChangedModel).comparison
    assert comparison.first is not None
    assert comparison.first.position >= 20
    assert comparison.first.admitted_in <= comparison.first.step
    assert 0 < len(comparison.different_sequences) < comparison.num_sequences


def test_masks_that_came_and_masks_that_were_closed_are_replayed(tmp_path: Path, monkeypatch: Any) -> None:
    path, engine = tmp_path / "r.steps", Engine()
    with (
        recording_file(path) as fd,
        recorded(engine.executor, fd, toy_segment(MASK_SHAPE, NUM_MASK_BLOCKS)),
    ):
        engine.plan(1, 1, num_free=1)
        engine.answer(0, 1, 33)
        assert engine.submit() is None
        engine.now_ns += TIMEOUT_NS
        assert engine.submit() is not None, "the masks of the other worker are late"
        results = engine.results()
    assert results[:2] == tokens(33, NO_TOKEN)
    (step,) = [frame for frame in frames_of(path) if isinstance(frame, RecordedStep)]
    assert [masks.masks is None for masks in step.masks] == [False, True]
    assert replay_toy(path, monkeypatch, WideToyModel).comparison.is_same
    change_step(path, 1, lambda step: replace(step, masks=[replace(step.masks[0], masks=None), step.masks[1]]))
    first = replay_toy(path, monkeypatch, WideToyModel).comparison.first
    assert first is not None
    assert (first.recorded, first.found) == ("33", str(NO_TOKEN))


def test_a_process_that_was_started_again_has_a_segment_of_its_own(path: Path, monkeypatch: Any) -> None:
    frames = frames_of(path)
    write_frames(path, [*frames[:8], *frames])
    found = replay_toy(path, monkeypatch)
    assert found.comparison.is_same
    assert found.comparison.num_segments == 2
    assert found.notes == [
        "segment 1 has no end: segment 2 begins there, because a process was killed or the disk was full"
    ]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"layouts": {"step": 1}}, r"has records \(long_values, mask, result, step\) of another version of ringfeed"),
        ({"config_sha256": "a" * 64}, r"was recorded with another model: config\.json of toy differ"),
        (
            {"weights_sha256": "a" * 64},
            r"was recorded with another model: names and sizes of weight files of toy",
        ),
    ],
)
def test_a_recording_of_another_model_or_version_is_refused(
    change: Any, error: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, *steps = frames_of(path)
    assert isinstance(start, SegmentStart)
    write_frames(path, [replace(start, **change), *steps])
    with pytest.raises(ConfigError, match=f"{path}: {error}"):
        replay_toy(path, monkeypatch)


def test_a_replay_says_what_is_not_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, *steps = frames_of(path)
    assert isinstance(start, SegmentStart)
    old = replace(start, versions=start.versions | {"torch": "1.0"})
    write_frames(path, [old, *steps])
    assert replay_toy(path, monkeypatch).notes == [
        f"segment 1: torch: 1.0 when it was recorded, {importlib.metadata.version('torch')} here"
    ]


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("num_seqs", 4, "num_seqs = 4, which is not from 0 to 3"),
        ("num_appends", -1, "num_appends = -1, which is not from 0 to"),
        ("num_admissions", 0, r"a record has \d+ bytes, and \d+ are needed"),
        ("num_tokens", 1, r"1 tokens, and its sequences have \d+"),
        ("num_tokens", 17, r"tokens \(17 to 17\) outside 0 to 16"),
        ("variant", 7, "a variant"),
        ("seq_row", 3, "a row"),
        ("seq_num_tokens", 0, "a number of tokens"),
        ("append_row", -1, "a row"),
        ("append_index", 8, "a place in a block table"),
        ("append_block", NUM_BLOCKS, "a block"),
        ("admit_row", 3, "a row"),
        ("admit_length", 33, "a length"),
        ("admit_length", 1, "an admission brings"),
        ("admit_num_computed_tokens", -1, "computed tokens"),
        ("admit_long_ticket", 1, "an admission brings"),
    ],
)
def test_a_step_that_no_scheduler_makes_is_refused_and_not_run(
    field: str, value: int, error: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_step(path, 1, lambda step: with_field(step, SHAPE, field, value))
    with pytest.raises(ConfigError, match=f"^{path}: is damaged: step 1: .*{error}") as raised:
        replay_toy(path, monkeypatch)
    assert "\n" not in str(raised.value)


def test_a_prompt_outside_the_vocabulary_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(step: RecordedStep) -> RecordedStep:
        first, *others = step.uploads
        ids = np.frombuffer(first.token_ids, np.int32) + ToyModel.vocab_size
        return replace(step, uploads=[replace(first, token_ids=ids.tobytes()), *others])

    change_step(path, 1, other)
    with pytest.raises(ConfigError, match="step 1: a prompt has a token outside the vocabulary of 16"):
        replay_toy(path, monkeypatch)
