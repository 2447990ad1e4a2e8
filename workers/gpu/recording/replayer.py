"""Runs recorded steps again: the same model, an executor, and both ends of its rings in this process.

Each step is finished before the next one begins. So what differs from the recording depends on the model and its
kernels, or on how steps overlapped when they were recorded. Records get new tickets, because only their order matters.
"""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np
import torch

from ipc.errors import ConfigError
from ipc.long_values import long_layout, num_words
from ipc.mask_records import MaskRecord, mask_layout
from ipc.record_layout import Layout, R
from ipc.records import (
    PROMPT_RECORD_TOKENS,
    UPLOAD_RING,
    ResultRecord,
    SamplerVariant,
    StepRecord,
    prompt_layout,
    result_layout,
    step_layout,
)
from ipc.ring import Ring, close_handle
from workers.gpu.execution.executor import Executor
from workers.gpu.execution.rings import GpuRings
from workers.gpu.recording.frames import RecordedStep, SegmentStart, StepMasks, Upload
from workers.gpu.recording.packing import StepPacking
from workers.gpu.worker import Loaded, Report, capture_graphs

_NUM_SLOTS: Final = 2  # of the rings: one step is under way
_WORD_BYTES: Final = 4


class Replayer:
    """Runs one segment. A segment begins with a new process, so its replay begins with a newly loaded model."""

    def __init__(self, start: SegmentStart, loaded: Loaded, progress: Report) -> None:
        """`loaded`: see `recorded_model.py`."""
        shape = start.shape
        longest = -(-shape.max_model_len // PROMPT_RECORD_TOKENS)
        long_words = num_words(long_layout(shape), -1)
        num_records = shape.max_admissions * (longest + -(-long_words // PROMPT_RECORD_TOKENS))
        self._shape = shape
        self._device = loaded.device
        self._vocab_size = loaded.runner.vocab_size
        self._num_blocks = start.num_blocks
        self._packing = StepPacking(shape)
        self._long_layout = long_layout(shape)
        self._steps, steps = _ring("step", step_layout(shape), _NUM_SLOTS)
        results, self._results = _ring("result", result_layout(shape), _NUM_SLOTS)
        self._uploads, uploads = _ring("prompt", prompt_layout(), num_records)
        masks = [_ring(f"mask.{i}", mask_layout(shape), _NUM_SLOTS) for i in range(shape.num_grammar_workers)]
        self._masks: list[Ring[MaskRecord]] = [ours for ours, _ in masks]
        rings = GpuRings(steps, results, [uploads], [theirs for _, theirs in masks])
        self._expected_memory = memoryview(bytearray(result_layout(shape).num_bytes))
        self._expected = result_layout(shape).views(self._expected_memory)
        self._executor = Executor(
            loaded.device, loaded.runner, shape, 1, start.num_blocks, rings, buckets=loaded.buckets
        )  # fmt: skip
        if loaded.buckets is not None:
            capture_graphs(progress, loaded.device, self._executor)

    def run(self, recorded: RecordedStep) -> tuple[StepRecord, ResultRecord, ResultRecord]:
        """Run a step. Returns its record, the recorded result and the result of now, all valid until the next call.

        Raises ConfigError for a step that no scheduler makes: it could make the device read what is not there.
        """
        record = self._steps.claim()
        self._packing.unpack_step(recorded.step, record, self._steps.memory(self._steps.next_ticket))
        self._packing.unpack_result(recorded.result, record, self._expected_memory)
        self._check(record)
        first_upload = self._uploads.next_ticket
        self._publish_uploads(record, recorded.uploads)
        self._publish_masks(record, recorded.masks)
        self._steps.publish()
        with torch.inference_mode():
            step = self._executor.submit_next(time.monotonic_ns())
            assert step is not None, "everything that the step needs is there"
            self._device.synchronize(step.outputs_done)
            self._executor.publish()
        if self._uploads.next_ticket > first_upload:
            self._uploads.release_through(self._uploads.next_ticket - 1)
        result = self._results.take()
        assert result is not None, "the result was published"
        self._results.release_through(self._results.next_ticket - 1)
        return record, self._expected, result

    def close(self) -> None:
        """Unmap the rings. Records that `run` returned must not be used afterwards."""
        self._device.settle()
        self._executor.close()
        ours: list[Ring[Any]] = [self._steps, self._results, self._uploads, *self._masks]
        for ring in ours:
            ring.close()

    def _check(self, record: StepRecord) -> None:
        shape, rows = self._shape, (0, self._shape.max_num_seqs - 1)
        num_seqs, num_appends = int(record.num_seqs[0]), int(record.num_appends[0])
        num_admissions, num_tokens = int(record.num_admissions[0]), int(record.num_tokens[0])
        seqs, appends, admissions = slice(num_seqs), slice(num_appends), slice(num_admissions)
        variants = list(SamplerVariant)
        for name, values, (least, most) in (
            ("a row", record.seq_row[seqs], rows),
            ("a number of tokens", record.seq_num_tokens[seqs], (1, shape.max_num_batched_tokens)),
            ("tokens", record.num_tokens, (0, shape.max_num_batched_tokens)),
            ("a variant", record.variant, (variants[0], variants[-1])),
            ("a mask", record.seq_mask[seqs], (-1, shape.max_num_seqs - 1)),
            ("a row", record.append_row[appends], rows),
            ("a place in a block table", record.append_index[appends], (0, shape.max_blocks_per_seq - 1)),
            ("a block", record.append_block[appends], (0, self._num_blocks - 1)),
            ("a row", record.admit.row[admissions], rows),
            ("a length", record.admit.length[admissions], (0, shape.max_model_len)),
            ("computed tokens", record.admit.num_computed_tokens[admissions], (0, shape.max_model_len)),
            ("a token", record.prompt_logprob_index[: int(record.num_prompt_logprobs[0])], (0, num_tokens - 1)),
        ):
            if len(values) and not (least <= values.min() and values.max() <= most):
                raise ConfigError(f"a step has {name} ({values.min()} to {values.max()}) outside {least} to {most}")
        if (total := int(record.seq_num_tokens[seqs].sum())) != num_tokens:
            raise ConfigError(f"a step has {num_tokens} tokens, and its sequences have {total}")

    def _publish_uploads(self, record: StepRecord, uploads: list[Upload]) -> None:
        admit, by_admission = record.admit, {upload.admission: upload for upload in uploads}
        num_admissions = int(record.num_admissions[0])
        admit.ring[:num_admissions] = UPLOAD_RING
        for i in range(num_admissions):
            upload = by_admission.pop(i, Upload(i, b"", b""))
            has_long = bool(admit.long_ticket[i])
            needed = int(admit.length[i]), num_words(self._long_layout, int(admit.long_columns[i])) * has_long
            found = len(upload.token_ids) / _WORD_BYTES, len(upload.long_values) / _WORD_BYTES
            if found != needed:
                raise ConfigError(f"an admission brings {found} words, and {needed} are needed")
            ids = np.frombuffer(upload.token_ids, np.int32)
            if len(ids) and not (ids.min() >= 0 and ids.max() < self._vocab_size):
                raise ConfigError(f"a prompt has a token outside the vocabulary of {self._vocab_size}")
            admit.ticket[i] = self._upload(ids)
            if has_long:
                admit.long_ticket[i] = self._upload(np.frombuffer(upload.long_values, np.int32))
        if by_admission:
            raise ConfigError(f"a step has uploads for the admissions {sorted(by_admission)}, which it lacks")

    def _upload(self, words: np.ndarray[Any, np.dtype[np.int32]]) -> int:
        """Publish words. Returns the ticket of their first record."""
        first = self._uploads.next_ticket
        for at in range(0, len(words), PROMPT_RECORD_TOKENS):
            part = words[at : at + PROMPT_RECORD_TOKENS]
            self._uploads.claim().token_ids[: len(part)] = part
            self._uploads.publish()
        return first

    def _publish_masks(self, record: StepRecord, recorded: list[StepMasks]) -> None:
        masks, num_masks = {part.worker: part.masks for part in recorded}, 0
        for worker, ring in enumerate(self._masks):
            if not record.mask_ticket[worker]:
                continue
            num = int(record.num_masks[worker])
            num_masks += num
            if not num > 0 or num_masks > int(record.num_seqs[0]) or record.variant[0] != SamplerVariant.ADJUSTED:
                raise ConfigError(f"a step needs {num_masks} masks, and it has {int(record.num_seqs[0])} sequences")
            record.mask_ticket[worker] = ring.next_ticket
            mask = ring.claim()
            mask.step[0], mask.num_masks[0] = self._steps.next_ticket, 0  # no masks: they count as closed
            if (found := masks.pop(worker, None)) is not None:
                if len(found) != num * self._shape.mask_words * _WORD_BYTES:
                    raise ConfigError(f"a step has {len(found)} bytes of masks, which are not {num} masks")
                mask.num_masks[0] = num
                mask.masks[:num] = np.frombuffer(found, np.int32).reshape(num, -1)
            ring.publish()
        if masks:
            raise ConfigError(f"a step has masks of the grammar processes {sorted(masks)}, which it does not need")


def _ring(name: str, layout: Layout[R], num_slots: int) -> tuple[Ring[R], Ring[R]]:
    """Both ends of a ring: the writer's and the reader's."""
    ring = Ring.create(name, layout, num_slots, epoch=1)
    other = Ring.attach(ring.handle, layout)
    close_handle(ring.handle)
    return ring, other
