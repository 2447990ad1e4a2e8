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
        clock | record <- staging[k % D] | admit | append | batch + model | sampler | clock | outputs[k % D] <- output

No buffer is overwritten while a step still uses it (D = depth): the scheduler publishes step k+D only after it has
applied result k, thus after outputs_done[k]. So staging[k % D], outputs[k % D] and the three events of k are free when
submit_next takes k+D. Graphs know record and output by address; only the compute stream reads and writes these two.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ipc.errors import RingFull
from ipc.records import (
    PROMPT_RECORD_TOKENS,
    PromptRecord,
    ResultRecord,
    SamplerVariant,
    StepRecord,
    StepShape,
    result_layout,
    step_layout,
)
from ipc.ring import Ring
from workers.gpu.device.base import Device
from workers.gpu.execution.accesses import Copied, LaunchAccesses
from workers.gpu.execution.batch_builder import BatchBuilder
from workers.gpu.execution.buckets import Buckets
from workers.gpu.execution.kept_work import KeptWork
from workers.gpu.execution.model_runner import ModelRunner
from workers.gpu.execution.prompt_logprobs import PromptLogprobs
from workers.gpu.execution.record_parts import needed_parts, result_parts, step_parts
from workers.gpu.execution.row_tables import RowTables
from workers.gpu.execution.tensor_views import ResultTensors, StepTensors, tensor_views
from workers.gpu.sampling.sampler import sample


@dataclass(frozen=True)
class GpuRings:
    """The GPU process's view of its rings. `prompts[0]` is the scheduler's upload ring, the others the tokenizers'."""

    step: Ring[StepRecord]
    result: Ring[ResultRecord]
    prompts: Sequence[Ring[PromptRecord]]


@dataclass(frozen=True)
class StepBuffers:
    """The buffers and events that each of D steps under way has for itself."""

    staging: Copied  # a step record
    outputs: Copied  # a result record
    inputs_ready: Any
    step_done: Any
    outputs_done: Any


@dataclass(frozen=True)
class Submitted:
    """A step under way. When `outputs_done` fires, its result record is complete, except for the times that `publish`
    writes."""

    ticket: int
    received_at_ns: int
    num_seqs: int
    outputs_done: Any
    bucket: tuple[int, int]  # sequences and tokens that it runs as


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
    ) -> None:
        """`buckets`: sizes to pad batches to, and which of them to capture where the device has graphs. None = each
        step runs at its own size, and nothing is captured."""
        self._device = device
        self._runner = runner
        self._shape = shape
        self._rings = rings
        self._buckets = buckets
        self._captured = frozenset(() if buckets is None else buckets.captured)
        self._captured_seqs = {num_seqs for num_seqs, _ in self._captured}
        self.tables = RowTables(device, shape, num_blocks, runner.vocab_size, runner.row_states)

        steps, results = step_layout(shape), result_layout(shape)
        self._step_ring = [step_parts(steps, record) for record in _device_records(device, rings.step)]
        self._result_ring = [result_parts(results, record) for record in _device_records(device, rings.result)]
        self._prompt_rings = [[r.view(torch.int32) for r in _device_records(device, ring)] for ring in rings.prompts]
        memory = partial(device.zeros, dtype=torch.uint8)
        self._copy_in = device.stream("copy_in")
        self._compute = device.stream("compute")
        self._copy_out = device.stream("copy_out")
        self._step_buffers = [
            StepBuffers(
                step_parts(steps, memory(f"staging.{i}", (steps.num_bytes,))),
                result_parts(results, memory(f"outputs.{i}", (results.num_bytes,))),
                *(device.event(f"{name}.{i}") for name in ("inputs_ready", "step_done", "outputs_done")),
            )
            for i in range(depth)
        ]
        self._record = step_parts(steps, memory("record", (steps.num_bytes,)))
        self._output = result_parts(results, memory("output", (results.num_bytes,)))
        self._step = tensor_views(StepTensors, steps, self._record[-1])
        self._result = tensor_views(ResultTensors, results, self._output[-1])
        self._builder = BatchBuilder(device, self.tables, self._step)
        # Between the graphs of a step; at an address of its own, so that one sampler serves all buckets with its S.
        self._logits = device.zeros("logits", (shape.max_num_seqs, runner.vocab_size), runner.logits_dtype)
        self._accesses = LaunchAccesses(self.tables, self._record, self._builder.buffers, self._logits, self._output)
        self._admit = device.capture(self._builder.admit)
        self._append = device.capture(self._builder.append)
        self._model_work = KeptWork(
            self._make_model_work, device.capture, lambda num_seqs, num_tokens: (num_seqs, num_tokens) in self._captured
        )
        self._sampler_work = KeptWork(
            self._make_sampler_work, device.capture, lambda num_seqs, *_: num_seqs in self._captured_seqs
        )
        records = self._step, self._result
        self._prompt_logprobs = PromptLogprobs(runner, self._builder, self.tables, *records, self._logits)
        self.under_way: deque[Submitted] = deque()  # oldest first
        device.settle()

    def bucket(self, num_seqs: int, num_tokens: int) -> tuple[int, int]:
        """The sizes (S, T) of the batch as which such a step runs."""
        return (num_seqs, num_tokens) if self._buckets is None else self._buckets.choose(num_seqs, num_tokens)

    def warm_up(self, progress: Callable[[float], None]) -> None:
        """Launch every captured piece once, before the first step, so that no step waits for a capture.

        The record is all zero until then, which is a step without sequences: only the trash row and the trash block
        are written.
        """
        work: list[Callable[[], None]] = [
            self._admit,
            self._append,
            *(self._model_work(*bucket) for bucket in sorted(self._captured, reverse=True)),  # the largest allocates
            *(
                self._sampler_work(num_seqs, variant, want_logprobs)
                for num_seqs in sorted(self._captured_seqs, reverse=True)
                for variant in SamplerVariant
                for want_logprobs in (False, True)
            ),
        ]
        for i, piece in enumerate(work, start=1):
            self._device.launch(self._compute, piece, self._accesses.warm_up)
            progress(i / len(work))
        self._device.settle()

    def submit_next(self, now_ns: int) -> Submitted | None:
        """Take the next step record, if there is one, and enqueue all its work. Never waits.

        Raises RingError if the record, or a prompt record that it names, is not published; RingFull if its result
        record is not free. Either is the scheduler's fault, and ends this process.
        """
        device, ring, accesses = self._device, self._rings.step, self._accesses
        record = ring.take()
        if record is None:
            return None
        ticket = ring.next_ticket - 1
        buffers = self._step_buffers[ticket % len(self._step_buffers)]
        num_seqs, num_tokens = int(record.num_seqs[0]), int(record.num_tokens[0])
        num_admissions, want_logprobs = int(record.num_admissions[0]), bool(record.want_logprobs[0])
        num_prompt_logprobs = int(record.num_prompt_logprobs[0])
        in_part, out_part = needed_parts(record)

        device.copy(self._copy_in, buffers.staging[in_part], self._step_ring[ticket % ring.num_slots][in_part])
        for i in range(num_admissions):
            self._upload_prompt(record, i)
        device.record(buffers.inputs_ready, self._copy_in)

        # The step reads its staged record, and ids that were uploaded with it or before it.
        device.wait(self._compute, buffers.inputs_ready)
        device.read_clock(self._compute, self._result.device_start_ns)
        device.copy(self._compute, self._record[in_part], buffers.staging[in_part])
        if num_admissions:
            admitted = record.admit.row[:num_admissions]
            device.launch(self._compute, self._admit, lambda: accesses.admit(admitted))
        if record.num_appends[0]:
            device.launch(self._compute, self._append, accesses.append)
        bucket = self.bucket(num_seqs, num_tokens)
        rows = record.seq_row[:num_seqs]
        if num_prompt_logprobs:
            work = self._prompt_logprobs.work(*bucket, num_prompt_logprobs)
            device.launch(self._compute, work, lambda: accesses.prompt_logprobs(rows))
        else:
            device.launch(self._compute, self._model_work(*bucket), lambda: accesses.model(rows))
        sampler = self._sampler_work(bucket[0], SamplerVariant(int(record.variant[0])), want_logprobs)
        device.launch(self._compute, sampler, lambda: accesses.sampler(rows))
        device.read_clock(self._compute, self._result.device_end_ns)
        device.copy(self._compute, buffers.outputs[out_part], self._output[out_part])
        device.record(buffers.step_done, self._compute)

        device.wait(self._copy_out, buffers.step_done)
        device.copy(self._copy_out, self._result_record(ticket)[out_part], buffers.outputs[out_part])
        device.record(buffers.outputs_done, self._copy_out)
        submitted = Submitted(ticket, now_ns, num_seqs, buffers.outputs_done, bucket)
        self.under_way.append(submitted)
        return submitted

    def publish(self) -> None:
        """Publish the oldest step's result and release its record. Its `outputs_done` must just have fired.

        Ring the scheduler's doorbell afterwards.
        """
        seen_at_ns = time.monotonic_ns()
        step, ring = self.under_way[0], self._rings.result
        assert step.ticket == ring.next_ticket, f"result {ring.next_ticket} is due, not {step.ticket}"
        record = ring.records[step.ticket % ring.num_slots]
        start_ns, end_ns = int(record.device_start_ns[0]), int(record.device_end_ns[0])
        record.device_start_ns[0], record.device_end_ns[0] = self._device.clock.to_monotonic(
            start_ns, end_ns, step.received_at_ns, seen_at_ns
        )
        record.received_at_ns[0] = step.received_at_ns
        self._rings.step.release_through(step.ticket)
        ring.publish()
        self.under_way.popleft()  # last: until then no other thread sees the next step as the oldest

    def _upload_prompt(self, record: StepRecord, admission: int) -> None:
        """Enqueue copies of an admission's ids from the prompt ring to its row, on copy-in.

        No step under way reads or writes this row: the scheduler reassigns a row only after its last owner's last step.
        """
        admit = record.admit
        row, length = int(admit.row[admission]), int(admit.length[admission])
        ring_index, ticket = int(admit.ring[admission]), int(admit.ticket[admission])
        for start in range(0, length, PROMPT_RECORD_TOKENS):
            ring = self._rings.prompts[ring_index]
            ring.record(ticket)  # raises RingError if it is not published
            end = min(start + PROMPT_RECORD_TOKENS, length)
            source = self._prompt_rings[ring_index][ticket % ring.num_slots]
            self._device.copy(self._copy_in, self.tables.token_ids[row, start:end], source[: end - start])
            ticket += 1

    def _result_record(self, ticket: int) -> Copied:
        """The result record for a step's outputs; the step's ticket claims it, ahead of publishing."""
        ring = self._rings.result
        if ticket - ring.read_cursor >= ring.num_slots:
            raise RingFull(f"ring {ring.name}: step {ticket} came before result {ring.read_cursor} was read")
        return self._result_ring[ticket % ring.num_slots]

    def _make_model_work(self, num_seqs: int, num_tokens: int) -> Callable[[], None]:
        """A bucket's first half: the step's record becomes a batch, and the batch logits."""
        batch = self._builder.batch(num_seqs, num_tokens)
        fill = self._builder.filler(batch)

        def model() -> None:
            fill()
            self._runner.logits(batch, out=self._logits[:num_seqs])

        return model

    def _make_sampler_work(self, num_seqs: int, variant: SamplerVariant, want_logprobs: bool) -> Callable[[], None]:
        """The second half, for every bucket of `num_seqs` sequences.

        It reads only those parts of the batch that have an entry for each sequence.
        """
        batch = self._builder.batch(num_seqs, 1)
        flags = self._step.seq_sample[:num_seqs]

        def sampler() -> None:
            sample(variant, want_logprobs, self._logits[:num_seqs], batch, flags, self.tables, self._result)

        return sampler


def _device_records(device: Device[Any, Any], ring: Ring[Any]) -> list[torch.Tensor]:
    """Each ring slot's record as [layout.num_bytes] uint8, for the device's copies. Page-locks the ring."""
    segment = device.register_host(ring.name, ring.buffer)
    return [segment[offset : offset + ring.layout.num_bytes] for offset in ring.record_offsets]
