"""Enqueues steps on the device, and says when their results may be read.

Owns the order of copies, launches and events, and the buffers between them. It never waits for the device:
`submit_next` only enqueues. The worker decides which thread waits for a result and rings the scheduler's doorbell.

    copy-in   |record k+1, prompt ids|  |record k+2 ...|
                          inputs_ready[k+1] v
    compute   |======== step k ========|======== step k+1 ========|
                                       v step_done[k]
    copy-out                           |outputs k|
                                                 v outputs_done[k]: result k may be published, record k released

    a step on compute:
        first half   clock | record <- staging[k % D] | admit | append | batch + model
        second half  adjust, if its variant asks for it | sampler | clock | outputs[k % D] <- output

No buffer is overwritten while a step still uses it (D = depth): the scheduler publishes step k+D only after it has
applied result k, thus after outputs_done[k]. So staging[k % D], outputs[k % D] and the three events of k are free when
submit_next takes k+D. Graphs know record and output by address; only the compute stream reads and writes these two.
A step copies the parts of its records that it needs (`record_parts.py`). The first half of a step that computes
log-probabilities of prompts is not captured, and writes these to the output as well (`prompt_logprobs.py`).

A step that owes masks is held back between its halves. Its model runs while the scheduler applies the result before it
and the grammar worker makes the masks from that result's tokens. Later steps stay in their ring meanwhile.

    copy-in    |record k+1|                                        |masks k+1|
                          v inputs_ready[k+1]                                v masks_ready
    compute    |=== step k ===|=============== first half k+1 ================|== second half k+1 ==|
                              v step_done[k]                                                        v step_done[k+1]
    copy-out                  |outputs k|                                                           |outputs k+1|
                                        v outputs_done[k]
    host                                |publish k|               |enqueue the second half k+1|
                                                  v               ^
    scheduler                                     |apply k|       |
                                                          v       |
    grammar                                               |masks|-|

The second half is enqueued when result k is published and each owed mask is there, or counts as closed (see
`step_masks.py`). The device has nothing to do in between only if the masks come after the end of the first half. The
launching thread sleeps until its doorbell rings: after a grammar worker has published masks, and after result k if a
step is held back.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from ipc.records import SamplerVariant, StepShape, result_layout, step_layout
from workers.gpu.device.base import Device
from workers.gpu.execution.attached_rings import AttachedRings, Tap, no_tap
from workers.gpu.execution.buckets import Buckets
from workers.gpu.execution.model_runner import ModelRunner
from workers.gpu.execution.record_parts import needed_parts, result_parts, step_parts
from workers.gpu.execution.rings import GpuRings
from workers.gpu.execution.row_tables import RowTables
from workers.gpu.execution.step_work import StepWork
from workers.gpu.execution.steps import StepBuffers, Submitted
from workers.gpu.sampling.logprobs import WantedLogprobs


class Executor:
    """One model on one device. One thread calls the methods; `publish` alone may run on another, one call at a time."""

    def __init__(
        self,
        device: Device[Any, Any],
        runner: ModelRunner,
        shape: StepShape,
        depth: int,
        num_blocks: int,
        rings: GpuRings,
        *,
        buckets: Buckets | None = None,
        mask_timeout_s: float = 0.1,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Allocate everything that steps need.

        Args:
            buckets: sizes to pad batches to, and which of them to capture where the device has graphs. None = each
                step runs at its own size, and nothing is captured.
            mask_timeout_s: how long after its first half, and after the result before it, a step waits for masks.
            monotonic_ns: reads CLOCK_MONOTONIC.
        """
        self._device = device
        self._mask_timeout_ns = round(mask_timeout_s * 1e9)
        self._monotonic_ns = monotonic_ns
        self._buckets = buckets
        self.tables = RowTables(device, shape, num_blocks, runner.vocab_size, runner.row_states)
        self._work = StepWork(device, runner, self.tables, buckets)
        steps, results = step_layout(shape), result_layout(shape)
        self._copy_in = device.stream("copy_in")
        self._compute = device.stream("compute")
        self._copy_out = device.stream("copy_out")
        self._step_buffers = [
            StepBuffers(
                step_parts(steps, device.zeros(f"staging.{i}", (steps.num_bytes,), torch.uint8)),
                result_parts(results, device.zeros(f"outputs.{i}", (results.num_bytes,), torch.uint8)),
                *(device.event(f"{name}.{i}") for name in ("inputs_ready", "step_done", "outputs_done")),
            )
            for i in range(depth)
        ]
        self._rings = AttachedRings(device, rings, self.tables, self._copy_in, self._work.masks)
        self.under_way: deque[Submitted] = deque()  # oldest first
        self.held_back: Submitted | None = None  # its first half is enqueued, and its second half waits for masks
        self._published_at_ns = 0  # when the newest result was published
        self.tap: Tap = no_tap
        device.settle()

    def bucket(self, num_seqs: int, num_tokens: int) -> tuple[int, int]:
        """The sizes (S, T) of the batch as which such a step runs."""
        return (num_seqs, num_tokens) if self._buckets is None else self._buckets.choose(num_seqs, num_tokens)

    def warm_up(self, progress: Callable[[float], None]) -> None:
        """Launch every captured piece once, before the first step, so that no step waits for a capture.

        The record is all zero until then, a step without sequences: only trash row and trash block are written.
        """
        work = list(self._work.captured())
        for i, piece in enumerate(work, start=1):
            self._device.launch(self._compute, piece, self._work.accesses.warm_up)
            progress(i / len(work))
        self._device.settle()

    def submit_next(self, now_ns: int) -> Submitted | None:
        """Enqueue the next step that can be: its record must be there, and so must the masks that it owes. Never waits.

        Returns the step that it has enqueued as a whole. None with `held_back` set means that this step waits for
        masks: call again after a ring of the doorbell, and at `mask_deadline_ns`.
        Raises RingError if the record, or a prompt record that it names, is not published; RingFull if its result
        record is not free. Either is the scheduler's fault, and ends this process.
        """
        self._rings.masks.release_late()
        step = self.held_back or self._submit_first_half(now_ns)
        if step is None or (step.owed and not self._masks_are_decided(step, now_ns)):
            return None
        self.held_back = None
        self._submit_second_half(step)
        step.enqueued_at_ns = now_ns
        self.under_way.append(step)
        return step

    @property
    def mask_deadline_ns(self) -> int | None:
        """When the missing masks of the step held back count as closed, CLOCK_MONOTONIC in ns.

        None = no step is held back, or it waits for earlier results first: then `publish` may make it ready.
        """
        step = self.held_back
        if step is None or not self._earlier_are_published(step):
            return None
        return self._masks_due_since_ns(step) + self._mask_timeout_ns

    def replace_rings(self, rings: GpuRings) -> None:
        """Take steps from new rings, from ticket 1 on: the processes at their other ends are new.

        The device must be idle. Drops the step held back, and steps that are not published. Everything else stays: an
        admission sets all of its row that is read.
        """
        self.under_way.clear()
        self.held_back = None
        self._published_at_ns = 0
        old, self._rings = self._rings, AttachedRings(self._device, rings, self.tables, self._copy_in, self._work.masks)
        old.close()

    def close(self) -> None:
        """Unmap the rings. The device must be idle, and no step may follow."""
        self._rings.close()

    def stalled_s(self, now_ns: int) -> float:
        """For how many seconds the oldest step has made no progress, by CLOCK_MONOTONIC; 0.0 = no step is due.

        A step progresses when it is enqueued and when the step before it is published. A step that waits for masks is
        due at `mask_deadline_ns`.
        """
        try:
            since_ns = max(self.under_way[0].enqueued_at_ns, self._published_at_ns)
        except IndexError:  # also if another thread has just published the last one
            if (deadline_ns := self.mask_deadline_ns) is None:
                return 0.0
            since_ns = deadline_ns
        return max(0, now_ns - since_ns) * 1e-9

    def publish(self) -> None:
        """Publish the oldest step's result, whose `outputs_done` must just have fired, and release its records.

        Ring the scheduler's doorbell afterwards, and if a step is `held_back`, have `submit_next` called again.
        """
        seen_at_ns = self._monotonic_ns()
        step, ring = self.under_way[0], self._rings.result
        assert step.ticket == ring.next_ticket, f"result {ring.next_ticket} is due, not {step.ticket}"
        record = ring.records[step.ticket % ring.num_slots]
        start_ns, end_ns = int(record.device_start_ns[0]), int(record.device_end_ns[0])
        record.device_start_ns[0], record.device_end_ns[0] = self._device.clock.to_monotonic(
            start_ns, end_ns, step.received_at_ns, seen_at_ns
        )
        record.received_at_ns[0] = step.received_at_ns
        for part in step.owed:
            record.closed_masks[part.worker] = part in step.closed
        self.tap(self._rings, step, record)
        self._rings.step.release_through(step.ticket)
        if step.owed:
            self._rings.masks.finish(step.owed)
        self._published_at_ns = seen_at_ns
        ring.publish()
        self.under_way.popleft()  # last: until then no other thread sees the next step as the oldest

    def _submit_first_half(self, now_ns: int) -> Submitted | None:
        """Take the next record, if there is one, and enqueue its first half. A step that owes masks is held back."""
        device, ring, work = self._device, self._rings.step, self._work
        record = ring.take()
        if record is None:
            return None
        ticket = ring.next_ticket - 1
        buffers = self._step_buffers[ticket % len(self._step_buffers)]
        num_seqs, num_tokens = int(record.num_seqs[0]), int(record.num_tokens[0])
        num_admissions = int(record.num_admissions[0])
        num_prompt_logprobs = int(record.num_prompt_logprobs[0])
        part, _ = needed_parts(record)

        device.copy(self._copy_in, buffers.staging[part], self._rings.step_record(ticket)[part])
        for i in range(num_admissions):
            self._rings.uploads.enqueue(record, i)
        device.record(buffers.inputs_ready, self._copy_in)

        # The step reads its staged record, and ids that were uploaded with it or before it.
        device.wait(self._compute, buffers.inputs_ready)
        device.read_clock(self._compute, work.result.device_start_ns)
        device.copy(self._compute, work.record[part], buffers.staging[part])
        if num_admissions:
            admitted = record.admit.row[:num_admissions]
            device.launch(self._compute, work.admit, lambda: work.accesses.admit(admitted))
        if record.num_appends[0]:
            device.launch(self._compute, work.append, work.accesses.append)
        bucket = self.bucket(num_seqs, num_tokens)
        rows = record.seq_row[:num_seqs]
        if num_prompt_logprobs:
            model = work.prompt_logprobs.model(*bucket, num_prompt_logprobs)
            device.launch(self._compute, model, lambda: work.accesses.prompt_logprobs(rows))
        else:
            device.launch(self._compute, work.model(*bucket), lambda: work.accesses.model(rows))

        owed = self._rings.masks.owed_by(record)
        begun_at_ns = self._monotonic_ns() if owed else now_ns
        step = Submitted(ticket, record, now_ns, num_seqs, buffers.outputs_done, bucket, owed, begun_at_ns)
        if owed:
            device.read_clock(self._compute, work.result.device_pause_ns[:1])
            self.held_back = step  # before we look for results: `publish` on another thread looks at it afterwards
        return step

    def _submit_second_half(self, step: Submitted) -> None:
        """Enqueue the second half of a step."""
        device, work, record = self._device, self._work, step.record
        buffers = self._step_buffers[step.ticket % len(self._step_buffers)]
        variant, want_logprobs = SamplerVariant(int(record.variant[0])), bool(record.want_logprobs[0])
        _, part = needed_parts(record)
        wanted = WantedLogprobs(want_logprobs + bool(want_logprobs and record.want_processed[0]))
        rows = record.seq_row[: step.num_seqs]

        if step.owed:
            assert variant == SamplerVariant.ADJUSTED, f"step {step.ticket} owes masks, and {variant.name} reads none"
            self._rings.masks.copy(step)
            device.wait(self._compute, self._rings.masks.ready)  # the adjustment reads the masks
            device.read_clock(self._compute, work.result.device_pause_ns[1:])
        if variant == SamplerVariant.ADJUSTED:
            device.launch(self._compute, work.adjust(step.bucket[0]), lambda: work.accesses.adjust(rows))
        sampler = work.sampler(step.bucket[0], variant, wanted)
        device.launch(self._compute, sampler, lambda: work.accesses.sampler(rows))
        device.read_clock(self._compute, work.result.device_end_ns)
        device.copy(self._compute, buffers.outputs[part], work.output[part])
        device.record(buffers.step_done, self._compute)

        device.wait(self._copy_out, buffers.step_done)
        device.copy(self._copy_out, self._rings.result_record(step.ticket)[part], buffers.outputs[part])
        device.record(buffers.outputs_done, self._copy_out)
        if step.owed:
            step.mask_wait_ns = self._monotonic_ns() - self._masks_due_since_ns(step)

    def _masks_are_decided(self, step: Submitted, now_ns: int) -> bool:
        """Whether nothing reads the buffer of masks any more, and each owed mask is there or counts as closed."""
        if not self._earlier_are_published(step):
            return False
        is_late = now_ns >= self._masks_due_since_ns(step) + self._mask_timeout_ns
        return is_late or self._rings.masks.are_there(step.owed)

    def _earlier_are_published(self, step: Submitted) -> bool:
        return step.ticket == 1 or self._rings.result.is_published(step.ticket - 1)

    def _masks_due_since_ns(self, step: Submitted) -> int:
        """When the wait for the step's masks began. All earlier results must have been published."""
        return max(step.begun_at_ns, self._published_at_ns)
